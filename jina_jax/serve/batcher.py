"""The one thread that computes: texts of all requests and all tasks, batch after batch."""

import logging
import math
import threading
import time
from collections import deque
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from ..embed.mixed_rows import MixedRows, Started
from ..model.device import platform
from ..text.packing import PackedBatch, lay_out
from .errors import ApiError
from .metrics import Metrics
from .options import ServeOptions
from .schedule import Batch, Entry, Waiting
from .work import Work

logger = logging.getLogger(__name__)

FAILURES = 8
"""Texts that fail by an exception, each computed by itself and one after the other, until the
device is taken for lost."""

_QUERIES_ON_TOP = 8
"""Queries may take one part in this many of the queue on top of it: bulk never locks them out."""

_LONGEST_WAIT = 120
"""Seconds that a client is told to wait, at most: the official ones do not wait longer."""


NOT_FINITE = "the model gives NaN or infinity for it; float16 overflows above 65,504: start the server with --dtype bfloat16"
NOT_COMPUTED = "it could not be computed; the server's log says why"


class TextFailed(Exception):
    """A text of a request that has no result, though it was computed by itself.

    Attributes:
        index: of the text in its request.
    """

    def __init__(self, index: int, why: str):
        super().__init__(why)
        self.index = index


class Pace(NamedTuple):
    """How much is computed at once."""

    slots: int
    """Token slots of a batch on each device, or one row."""
    batches: int
    """Batches that are under way at the same time."""


def pace(max_batch_tokens: int | None) -> Pace:
    """Returns the pace that suits the device.

    On an accelerator a second batch is started before the first ends, so that it never waits for
    the host; both together are as long as one of `Embedder.encode`, and a query waits for no more.
    On CPU two batches at once would share its cores and both end late, and one row of 512 is as
    fast as several.
    """
    cpu = platform() == "cpu"
    return Pace(max_batch_tokens or (512 if cpu else 4096), 1 if cpu else 2)


class Place(NamedTuple):
    """Where a text lies in its batch."""

    row: int
    segment: int
    embedding: int
    """Index of its first one in the row."""


class _UnderWay(NamedTuple):
    """A batch on the device."""

    batch: Batch
    places: list[Place]
    packed: PackedBatch
    started: Started
    began: float


class Batcher:
    """Owner of the device. Any thread may call its methods; `lost` says what ended its own."""

    def __init__(self, rows: MixedRows, pad_id: int, options: ServeOptions, metrics: Metrics):
        """Starts the thread; `rows` is compiled."""
        self._rows, self._pad_id, self._options, self._metrics = rows, pad_id, options, metrics
        self._pace = pace(options.max_batch_tokens)
        self._waiting = Waiting(self._pace.slots, rows.devices)
        self._pending: set[Work] = set()
        self._queued = {True: 0, False: 0}
        self._changed = threading.Condition()
        self._closed = False
        self._rate: float | None = None
        self._last_end = 0.0
        self._busy_since: float | None = None
        self._failures = 0
        self.lost: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="jax", daemon=True)
        self._thread.start()

    @property
    def queued_tokens(self) -> int:
        """Tokens of requests that are accepted and not computed yet."""
        return self._queued[True] + self._queued[False]

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs, and its batch has not taken ten deadlines."""
        busy = self._busy_since
        stuck = busy is not None and time.perf_counter() - busy > 10 * self._options.deadline
        return self._thread.is_alive() and not stuck

    def submit(self, work: Work) -> None:
        """Takes a request, whose future gets the results.

        Raises:
            ApiError: it is larger than the queue (413), or cannot be computed in time now (429).
        """
        with self._changed:
            if self._closed:
                raise shutting_down()
            self._admit(work)
            work.queued_at = time.perf_counter()
            self._pending.add(work)
            self._count(work, work.tokens)
            self._waiting.add(work)
            self._changed.notify()
        work.future.add_done_callback(lambda _: self._forget(work))

    def check_room(self) -> None:
        """Raises ApiError if no further request is taken, before it is read."""
        if self.queued_tokens >= self._limit(False) + self._limit(True):
            raise self._overloaded(self.queued_tokens)

    def drop(self, work: Work, reason: str, error: ApiError) -> None:
        """Ends a request early; what of it is not under way is never computed."""
        with self._changed:
            if not work.ended:
                self._metrics.dropped.labels(reason).inc(work.left)
                work.end(error)

    def fail_all(self, error: ApiError) -> None:
        """Ends all requests with an error, and takes no more."""
        with self._changed:
            self._closed = True
            for work in [*self._pending]:
                self.drop(work, "shutdown", error)
            self._changed.notify()

    def close(self, seconds: float) -> bool:
        """Ends all requests and the thread; returns whether it ended in time."""
        self.fail_all(shutting_down())
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # ---- admission

    def _limit(self, bulk: bool) -> int:
        """Most queued tokens of a kind of request."""
        most = self._options.max_queued_tokens
        return most if bulk else max(most // _QUERIES_ON_TOP, 1)

    def _admit(self, work: Work) -> None:
        deadline, rate = self._options.deadline, self._rate
        if work.is_bulk and work.tokens > self._limit(True):
            limit = f"the limit of a request is {self._limit(True):,} (--max-queued-tokens)"
            raise ApiError(413, f"the request has {work.tokens:,} tokens; {limit}; send fewer texts at once", code="too_large")
        ahead = self._queued[work.is_bulk]
        if ahead and ahead + work.tokens > self._limit(work.is_bulk):
            raise self._overloaded(ahead)
        # Queries overtake bulk: they wait for one another only. Without others before it a request
        # is always tried, since the rate may be that of a bad moment.
        before = self.queued_tokens if work.is_bulk else ahead
        if before and rate is not None and before + work.tokens > rate * deadline:
            raise self._overloaded(before)

    def _overloaded(self, before: int) -> ApiError:
        """The error while `before` tokens are to be computed first."""
        self._metrics.dropped.labels("overload").inc()
        wait = 1 if self._rate is None else min(max(math.ceil(before / self._rate), 1), _LONGEST_WAIT)
        return ApiError(429, f"the queue is full; try again in {wait} s", code="overloaded", retry_after=wait)

    def _count(self, work: Work, tokens: int) -> None:
        """Adds to the queued tokens of a request's kind; the lock is held."""
        self._queued[work.is_bulk] += tokens
        self._metrics.queued_tokens.set(self.queued_tokens)
        self._metrics.queued_requests.set(len(self._pending))

    def _forget(self, work: Work) -> None:
        """Takes an ended request out of the count, with the tokens that were never computed."""
        with self._changed:
            self._pending.discard(work)
            self._count(work, -work.uncounted)

    # ---- the thread

    def _run(self) -> None:
        under_way: deque[_UnderWay] = deque()
        try:
            while True:
                batch = None
                with self._changed:
                    while not under_way and not self._closed and (batch := self._waiting.next_batch()) is None:
                        self._changed.wait()
                    if self._closed:
                        return
                    if batch is None and len(under_way) < self._pace.batches:
                        batch = self._waiting.next_batch()
                if batch is not None and (started := self._start(batch)) is not None:
                    under_way.append(started)
                if under_way and (batch is None or len(under_way) >= self._pace.batches):
                    self._finish(under_way.popleft())
        except BaseException as error:
            logger.exception("the thread that computes has died")
            self.lost = error
            self.fail_all(ApiError(503, "the server has lost its device and ends", code="device_lost"))

    def _start(self, batch: Batch) -> _UnderWay | None:
        """Lays a batch out and hands it to the device; a batch that raises fails alone."""
        began = self._busy_since = time.perf_counter()
        for entry in batch.entries:
            if entry.work.started_at is None:
                entry.work.started_at = began
                self._metrics.queue_seconds.observe(began - entry.work.queued_at)
        try:
            packed, places, adapter_ids = lay_out_batch(batch, self._pad_id)
            return _UnderWay(batch, places, packed, self._rows.start(packed, adapter_ids), began)
        except Exception as error:
            self._failed(batch, error)
            return None
        finally:
            self._busy_since = None

    def _finish(self, done: _UnderWay) -> None:
        """Waits for a batch and hands its results out."""
        entries = done.batch.entries
        self._busy_since = time.perf_counter()
        try:
            pooled = np.asarray(done.started.embeddings, np.float32)
            wanted = any(entry.work.states for entry in entries)
            states = np.asarray(done.started.states, np.float32) if wanted else None
        except Exception as error:
            self._failed(done.batch, error)
            return
        finally:
            self._busy_since = None
        self._measure(done)
        self._failures = 0
        not_finite = []
        for entry, place in zip(entries, done.places, strict=True):
            text = entry.work.texts[entry.text]
            if entry.work.states and states is not None:
                result = states[place.row][done.packed.segment_ids[place.row] == place.segment]
            else:
                result = pooled[place.row, place.embedding : place.embedding + text.embeddings]
                result = result[0] if text.pool_ids is None else result
            if np.isfinite(result).all():
                self._hand_out(entry, result)
            else:
                not_finite.append(entry)
        # NaN spreads over its row: each text of it is computed again, by itself.
        self._alone_or_failed(not_finite, len(entries), NOT_FINITE)

    def _hand_out(self, entry: Entry, result: np.ndarray) -> None:
        with self._changed:
            if not entry.work.ended:
                self._count(entry.work, -entry.tokens)
                entry.work.uncounted -= entry.tokens
                entry.work.put(entry.text, result.copy())

    def _failed(self, batch: Batch, error: Exception) -> None:
        """Computes the texts of a batch that raised again, each by itself."""
        logger.error("a batch of %d texts failed", len(batch.entries), exc_info=error)
        if len(batch.entries) == 1:
            self._failures += 1
            if self._failures >= FAILURES:
                raise RuntimeError(f"{FAILURES} texts in a row failed, each by itself") from error
        self._alone_or_failed(batch.entries, len(batch.entries), NOT_COMPUTED)

    def _alone_or_failed(self, entries: list[Entry], batch_size: int, why: str) -> None:
        """Has texts computed again, each by itself, or ends the request of one that was."""
        with self._changed:
            if batch_size > 1:
                self._waiting.add_alone(entries)
                return
            for entry in entries:
                self._metrics.dropped.labels("failed").inc()
                entry.work.end(TextFailed(entry.text, why))

    def _measure(self, done: _UnderWay) -> None:
        """Records how long a batch took, and by full ones how many tokens a second are computed."""
        now = time.perf_counter()
        seconds = now - max(done.began, self._last_end)
        self._last_end = now
        tokens = sum(entry.tokens for entry in done.batch.entries)
        b, t = done.batch.plan.shape
        self._metrics.observe_batch(seconds, texts=len(done.batch.entries), tokens=tokens, slots=b * t)
        if 2 * b * t >= self._pace.slots * self._rows.devices and seconds > 0:
            self._rate = tokens / seconds if self._rate is None else 0.8 * self._rate + 0.2 * tokens / seconds


def lay_out_batch(batch: Batch, pad_id: int) -> tuple[PackedBatch, list[Place], Int[np.ndarray, "b g"]]:
    """Returns the arrays of a batch, the place of each of its texts, and the adapter of each text
    of a row."""
    texts = [entry.work.texts[entry.text] for entry in batch.entries]
    packed = lay_out([text.token_ids for text in texts], batch.plan, pad_id)
    places = [Place(0, 0, 0)] * len(texts)
    for row, indices in enumerate(batch.plan.rows):
        embeddings = 0
        for segment, index in enumerate(indices, 1):
            places[index] = Place(row, segment, embeddings)
            pool_ids = texts[index].pool_ids
            if pool_ids is not None or embeddings != segment - 1:
                slots = packed.segment_ids[row] == segment
                ids = 1 if pool_ids is None else pool_ids
                packed.pool_ids[row, slots] = np.where(ids == 0, 0, embeddings + ids)
            embeddings += texts[index].embeddings
    adapters = np.array([text.adapter for text in texts], np.int32)
    return packed, places, np.where(packed.texts < 0, -1, adapters[packed.texts]).astype(np.int32)


def shutting_down() -> ApiError:
    """Returns the error of requests that come too late."""
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=1)

"""A loaded model behind the routes: from a request's texts to its vectors."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from starlette.requests import ClientDisconnect, Request

from ..embed.embedder import Embedder
from ..text.tokenizer import private_backend
from .batcher import Batcher, TextFailed, pace
from .call import EmbedCall, ServedModel
from .errors import ApiError
from .late import join_chunks, tokenize_chunks
from .metrics import Metrics
from .options import ServeOptions
from .tasks import resolve_task
from .texts import TokenizedText, tokenize_texts
from .work import Work

T = TypeVar("T")

SLICE_CHARACTERS = 50_000
"""Characters that are tokenised at a time, or one text: between two slices the tokenizer is free
for others, and a client that has left is noticed."""

QUERY_CHARACTERS = 4_000
"""Characters of a request up to which it is tokenised beside the long ones, and not behind them."""


MOST_STATES = 16_384
"""Tokens of a request for token states: at the published width their JSON has 200 MB."""


class Embedded(NamedTuple):
    """The vectors of a request, and its tokens."""

    results: list[np.ndarray]
    tokens: int


class Service:
    """The model, its tokenizer threads and its batcher. It is there when requests can be taken."""

    def __init__(self, embedder: Embedder, options: ServeOptions, metrics: Metrics):
        """Compiles every program and starts the batcher.

        Raises:
            ApiError: the default task is not one of the model's.
        """
        resolve_task(options.default_task, embedder.config, "--default-task")
        slots = pace(options.max_batch_tokens).slots
        rows = embedder.mixed_rows(slots)
        rows.compile()
        self.model = ServedModel(
            config=embedder.config,
            names=options.names,
            default_task=options.default_task,
            dim=embedder.get_sentence_embedding_dimension(),
            max_length=embedder.max_length,
            max_texts=options.max_texts,
            max_queued_tokens=options.max_queued_tokens,
            max_batch_tokens=slots * rows.devices,
            dtype=str(np.dtype(embedder.encoder.dtype)),
            created=int(time.time()),
        )
        self.backend = private_backend(embedder.tokenizer)
        self.batcher = Batcher(rows, embedder.config.pad_id, options, metrics)
        self._options, self._metrics = options, metrics
        self._short = ThreadPoolExecutor(1, "tokenizer-short")
        self._long = ThreadPoolExecutor(1, "tokenizer-long")
        self._answers = ThreadPoolExecutor(1, "answers")

    async def embed(self, request: Request, call: EmbedCall) -> Embedded:
        """Embeds the texts of a request.

        Raises:
            ApiError: a text is not valid or has no result, the queue is full, or the deadline has
                passed.
            ClientDisconnect: the client has left; what is not under way is dropped.
        """
        deadline = time.perf_counter() + self._options.deadline
        gone = asyncio.create_task(_gone(request))
        try:
            if call.late_chunking:
                embedded = await self._embed_chunks(call, gone, deadline)
            else:
                work = Work(await self._tokenize(call, gone, deadline), call.states)
                if call.states and work.tokens > MOST_STATES:
                    message = f"the request has {work.tokens:,} tokens; the limit for token states is {MOST_STATES:,}"
                    raise ApiError(413, message, code="too_large")
                embedded = Embedded(await self._result(work, call.limits.name, gone, deadline), work.tokens)
                self._metrics.truncated.inc(sum(text.cut for text in work.texts))
        finally:
            gone.cancel()
        self._metrics.texts.inc(len(call.texts))
        self._metrics.tokens.inc(embedded.tokens)
        return embedded

    async def tokenizer(self, function: Callable[..., T], *arguments: object) -> T:
        """Runs a function in the thread that tokenises long requests."""
        return await asyncio.get_running_loop().run_in_executor(self._long, function, *arguments)

    async def answer(self, texts: int, function: Callable[[], T]) -> T:
        """Writes an answer: one of many texts in a thread, so that others do not wait for it."""
        if texts <= 16:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._answers, function)

    def close(self, seconds: float) -> bool:
        """Ends all threads; returns whether that of the batcher ended in time."""
        for pool in (self._short, self._long, self._answers):
            pool.shutdown(wait=False, cancel_futures=True)
        return self.batcher.close(seconds)

    async def _embed_chunks(self, call: EmbedCall, gone: asyncio.Task[None], deadline: float) -> Embedded:
        chunks = await self.tokenizer(tokenize_chunks, self.backend, call, self.model.config)
        results = await self._result(Work(chunks.texts), lambda _: "input", gone, deadline)
        return Embedded(join_chunks(chunks, results, len(call.texts)), chunks.tokens)

    async def _tokenize(self, call: EmbedCall, gone: asyncio.Task[None], deadline: float) -> list[TokenizedText]:
        began, loop = time.perf_counter(), asyncio.get_running_loop()
        pool = self._short if sum(map(len, call.texts)) <= QUERY_CHARACTERS else self._long
        done: list[TokenizedText] = []
        while len(done) < len(call.texts):
            some = _slice(call.texts, len(done))
            done += await loop.run_in_executor(pool, tokenize_texts, self.backend, some, len(done), call.task, call.limits)
            if gone.done():
                self._metrics.dropped.labels("client_gone").inc(len(call.texts))
                raise ClientDisconnect
            if time.perf_counter() > deadline:
                self._metrics.dropped.labels("deadline").inc(len(call.texts))
                raise self._too_late()
        self._metrics.tokenizer_seconds.observe(time.perf_counter() - began)
        return done

    async def _result(
        self, work: Work, name: Callable[[int], str], gone: asyncio.Task[None], deadline: float
    ) -> list[np.ndarray]:
        """Results of a request's texts, whose names in it `name` gives."""
        self.batcher.submit(work)
        future = asyncio.wrap_future(work.future)
        try:
            left = deadline - time.perf_counter()
            await asyncio.wait({future, gone}, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                self.batcher.drop(work, "client_gone" if gone.done() else "deadline", self._too_late())
                if gone.done():
                    raise ClientDisconnect
            return await future
        except TextFailed as failed:
            raise ApiError(500, f"{name(failed.index)}: {failed}", param=name(failed.index), code="not_computed") from failed
        except asyncio.CancelledError:
            self.batcher.drop(work, "shutdown", self._too_late())
            raise
        finally:
            future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # it is not lost, but not needed

    def _too_late(self) -> ApiError:
        limit = f"the deadline of {self._options.deadline:g} s (--deadline)"
        return ApiError(503, f"not computed within {limit}; send fewer texts at once", code="deadline", retry_after=1)


async def _gone(request: Request) -> None:
    """Waits until the client of a request that has been read leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _slice(texts: list[str], start: int) -> list[str]:
    """The next texts to tokenise."""
    characters = 0
    for end in range(start, len(texts)):
        characters += len(texts[end])
        if characters > SLICE_CHARACTERS:
            return texts[start : max(end, start + 1)]
    return texts[start:]

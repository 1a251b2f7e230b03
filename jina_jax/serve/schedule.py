"""Which waiting texts make the next batch.

Queries, requests that fit into one short row, go before bulk requests; what their rows leave free
is filled with bulk. Every fourth batch begins with the bulk that has waited longest, so that a
flood of queries does not starve it. A bulk request is computed batch by batch, and so delays a
query by no more than the batches that are under way.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ..text.packing import (
    ROW_LENGTHS,
    SMALL_ROW_LENGTHS,
    TOKENS_PER_TEXT,
    BatchPlan,
    best_fit_decreasing,
    max_texts,
    most_rows,
    next_count,
    row_length,
)
from .work import Work

BULK_FIRST = 4
"""One batch in this many begins with bulk, where bulk waits."""

_LOOKED_AT = 64
"""Waiting texts that are tried for the free slots of a batch."""


class Entry(NamedTuple):
    """One text of a request."""

    work: Work
    text: int
    """Index of the text in it."""

    @property
    def tokens(self) -> int:
        return len(self.work.texts[self.text].token_ids)

    @property
    def size(self) -> int:
        """Slots that it counts for: its tokens, but at least `TOKENS_PER_TEXT` for each embedding,
        of which a row has no more than its slots hold."""
        return max(self.tokens, TOKENS_PER_TEXT * self.work.texts[self.text].embeddings)


@dataclass
class Batch:
    """Texts that are computed together; `plan.rows` are indices in `entries`."""

    entries: list[Entry]
    plan: BatchPlan


@dataclass
class Waiting:
    """Texts that wait, by kind of request and length of row, each in the order of arrival.

    Not thread-safe: the batcher holds its lock.
    """

    slots: int
    """Most token slots of a batch on each device, or one row."""
    devices: int
    _alone: deque[Entry] = field(default_factory=deque)
    _lines: dict[bool, dict[int, deque[Entry]]] = field(
        default_factory=lambda: {bulk: {length: deque() for length in ROW_LENGTHS} for bulk in (False, True)}
    )
    _turn: int = 0

    def add(self, work: Work) -> None:
        """Adds the texts of a request behind those of its kind."""
        for index in range(len(work.texts)):
            entry = Entry(work, index)
            self._lines[work.is_bulk][row_length(entry.size)].append(entry)

    def add_alone(self, entries: list[Entry]) -> None:
        """Adds texts that are computed next, each by itself: their batch has failed."""
        self._alone += entries

    def next_batch(self) -> Batch | None:
        """Takes the next batch; texts of requests that have ended are dropped on the way."""
        while self._alone:
            entry = self._alone.popleft()
            if not entry.work.ended:
                return Batch([entry], self._plan([entry], row_length(entry.size)))
        turn_of_bulk = self._turn % BULK_FIRST == BULK_FIRST - 1
        for bulk in (True, False) if turn_of_bulk else (False, True):
            if (length := self._oldest(bulk)) is not None:
                # Counted only while bulk waits: its turn then comes after at most three batches.
                self._turn = 0 if bulk else self._turn + (self._oldest(True) is not None)
                return self._batch(bulk, length)
        return None

    def _oldest(self, bulk: bool) -> int | None:
        """Row length of the text that has waited longest."""
        heads = []
        for length, line in self._lines[bulk].items():
            while line and line[0].work.ended:
                line.popleft()
            if line:
                heads.append((line[0].work.number, line[0].text, length))
        return min(heads)[2] if heads else None

    def _batch(self, bulk: bool, length: int) -> Batch:
        line = self._lines[bulk][length]
        taken = _take(line, most_rows(self.slots, length) * self.devices, length)
        plan = self._plan(taken, length)
        held = {index for row in plan.rows for index in row}
        line.extendleft(taken[index] for index in reversed(range(len(taken))) if index not in held)
        numbers = {index: number for number, index in enumerate(held)}
        rows = [[numbers[index] for index in row] for row in plan.rows]
        batch = Batch([taken[index] for index in held], plan._replace(rows=rows))
        self._fill(batch, not bulk)
        return batch

    def _plan(self, entries: list[Entry], length: int) -> BatchPlan:
        """Plans one batch with the first of some texts, all of which fit into rows of a length."""
        sizes = [entry.size for entry in entries]
        for small in SMALL_ROW_LENGTHS:
            if sum(sizes) <= small:
                return BatchPlan([list(range(len(entries)))], (self.devices, small))
        rows = best_fit_decreasing(sizes, length, max_texts(length))
        rows.sort(key=min)  # the row of the text that has waited longest comes first
        count = next_count(-(-len(rows) // self.devices), most_rows(self.slots, length)) * self.devices
        return BatchPlan(rows[:count], (count, length))

    def _fill(self, batch: Batch, bulk: bool) -> None:
        """Puts waiting texts of the other kind into the slots that a batch leaves free."""
        count, length = batch.plan.shape
        rows = [*batch.plan.rows, *([] for _ in range(count - len(batch.plan.rows)))]
        free = [length - sum(batch.entries[index].size for index in row) for row in rows]
        for line_length, line in self._lines[bulk].items():
            if line_length > max(length, ROW_LENGTHS[0]):
                break
            kept = []
            for entry in _first(line, _LOOKED_AT):
                row = next((row for row, left in enumerate(free) if entry.size <= left), None)
                if row is None:
                    kept.append(entry)
                    continue
                rows[row].append(len(batch.entries))
                batch.entries.append(entry)
                free[row] -= entry.size
            line.extendleft(reversed(kept))
        batch.plan = batch.plan._replace(rows=[row for row in rows if row])


def _take(line: deque[Entry], rows: int, length: int) -> list[Entry]:
    """Takes the texts that have waited longest, as many as surely fill so many rows."""
    taken, tokens, texts = [], 0, 0
    while line and tokens < rows * length and texts < rows * max_texts(length):
        entry = line.popleft()
        if not entry.work.ended:
            taken.append(entry)
            tokens, texts = tokens + entry.size, texts + 1
    return taken


def _first(line: deque[Entry], count: int) -> Iterator[Entry]:
    """Takes the first texts of a line whose requests have not ended."""
    for _ in range(min(count, len(line))):
        entry = line.popleft()
        if not entry.work.ended:
            yield entry

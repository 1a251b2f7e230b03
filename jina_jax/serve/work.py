"""A request as the batcher sees it: its texts, and how far they are."""

import itertools
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..text.packing import ROW_LENGTHS, max_texts
from .texts import TokenizedText

_numbers = itertools.count()


@dataclass(eq=False)
class Work:
    """The texts of one request.

    Attributes:
        future: gets `results`, or an exception.
        tokens: of all texts.
        uncounted: those of texts that are not computed yet.
        is_bulk: whether it is more than a short row holds.
        results: of each text: its vector [d], its vectors [n, d] where it has several, or its token
            states [t, d].
    """

    texts: list[TokenizedText]
    states: bool = False
    """Whether token states are asked for."""
    number: int = field(default_factory=lambda: next(_numbers))
    future: "Future[list[np.ndarray]]" = field(default_factory=Future)
    results: list[Any] = field(default_factory=list)
    left: int = 0
    """Texts that are not computed yet."""
    queued_at: float = 0.0
    started_at: float | None = None
    """When its first batch started; of `time.perf_counter`, as the others."""
    ended_at: float | None = None

    def __post_init__(self) -> None:
        self.left = len(self.texts)
        self.results = [None] * self.left
        self.tokens = sum(len(text.token_ids) for text in self.texts)
        self.uncounted = self.tokens
        shortest = ROW_LENGTHS[0]
        self.is_bulk = self.tokens > shortest or sum(text.embeddings for text in self.texts) > max_texts(shortest)

    @property
    def ended(self) -> bool:
        return self.ended_at is not None

    def put(self, index: int, result: np.ndarray) -> None:
        """Takes the result of a text; the last one ends the request."""
        self.results[index] = result
        self.left -= 1
        if not self.left:
            self.end(None)

    def end(self, error: BaseException | None) -> None:
        """Ends the request with its results or an error; what comes later is dropped."""
        if self.ended:
            return
        self.ended_at = time.perf_counter()
        if self.future.set_running_or_notify_cancel():
            if error is None:
                self.future.set_result(self.results)
            else:
                self.future.set_exception(error)

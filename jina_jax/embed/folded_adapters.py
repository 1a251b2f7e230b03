"""Encoders with one adapter folded into their kernels, made at first use and kept."""

import threading
from collections import OrderedDict
from collections.abc import Callable

from ..model.adapters import fold_adapter
from ..model.encoder import Encoder


class FoldedAdapters:
    """The folded encoders of a model, at most `limit` of them; the least recently used one goes
    first.

    Each holds a copy of the kernels. Any number of threads may ask for one at the same time.
    """

    def __init__(self, encoder: Encoder, limit: int, prepare: Callable[[Encoder], Encoder]):
        """Keeps nothing yet.

        Args:
            encoder: the model with all its adapters.
            limit: encoders to keep, at least 1.
            prepare: what is made of a folded encoder before it is kept.
        """
        self._encoder, self._limit, self._prepare = encoder, limit, prepare
        self._kept: OrderedDict[str, Encoder] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, task: str) -> Encoder:
        """Returns the encoder with the adapter of a task folded in."""
        with self._lock:
            if task not in self._kept:
                while len(self._kept) >= self._limit:  # freed before the next one is made
                    self._kept.popitem(last=False)
                self._kept[task] = self._prepare(fold_adapter(self._encoder, task))
            self._kept.move_to_end(task)
            return self._kept[task]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks whose encoders are kept, the least recently used one first."""
        return tuple(self._kept)

"""Encoders with one adapter folded into their kernels, made at first use and kept."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int

from ..model.adapters import fold_adapter
from ..model.device import platform
from ..model.encoder import Encoder
from ..model.parameters import variables

_SHARE_OF_MEMORY = 4
"""Folded encoders fill at most one part in this many of an accelerator's memory."""


def how_many_to_keep(encoder: Encoder) -> int:
    """Returns how many folded encoders to keep, at least 1 and at most one a task.

    On an accelerator it is what a quarter of its memory holds: the published model's five take 3 GB
    in half precision. On CPU it is one, since folding there takes longer than a small call, which
    has the adapter computed beside the kernels for a few percent.
    """
    tasks = len(encoder.config.tasks)
    if platform() == "cpu" or not tasks:
        return 1
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    kernels = [
        v.get_value() for path, v in variables(encoder).items() if path.startswith("layers.") and path.endswith("kernel")
    ]
    size = sum(kernel.size * kernel.dtype.itemsize for kernel in kernels)
    return min(max(memory // _SHARE_OF_MEMORY // size, 1), tasks)


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

    def ready(self, task: str) -> bool:
        """True if asking for a task folds nothing, or folds it once and for good."""
        with self._lock:
            return task in self._kept or self._limit >= len(self._encoder.config.tasks)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks whose encoders are kept, the least recently used one first."""
        return tuple(self._kept)


def group_by_adapter(
    base: Encoder, folded: FoldedAdapters, sizes: Sequence[int], adapter_ids: Int[np.ndarray, " n"], worth_folding: int
) -> Iterator[tuple[Encoder, Int[np.ndarray, " m"], bool]]:
    """Yields (encoder, indices of texts, whether their adapters are mixed): each large task with
    its adapter folded, the rest together.

    Args:
        base: the encoder with all its adapters.
        folded: of the same.
        sizes: characters of each text.
        adapter_ids: adapter of each text, -1 = none.
        worth_folding: characters of one task from which on its adapter is folded anew.
    """
    tasks = base.config.tasks
    names = np.unique(adapter_ids).tolist()
    mixed = []
    for index in names:
        members = np.flatnonzero(adapter_ids == index)
        # A small call never folds one anew because another task was called meanwhile.
        kept = len(names) == 1 and (index < 0 or folded.ready(tasks[index]))
        if kept or sum(sizes[i] for i in members.tolist()) >= worth_folding:
            yield base if index < 0 else folded[tasks[index]], members, False
        else:
            mixed.append(members)
    if mixed:
        members = np.sort(np.concatenate(mixed))
        base_alone = (adapter_ids[members] < 0).all()
        yield base, members, not base_alone

"""Rows whose texts have any mix of adapters, in a fixed list of shapes that are compiled ahead of
time: what a server computes."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int

from ..model.encoder import Encoder
from ..parallel.mesh import shard_batch
from ..text.packing import PackedBatch, max_texts
from .forward import embeddings_and_states

Shape = tuple[int, int]
"""Rows, and token slots of each."""

_COMPILERS = 4
"""Threads that compile, at most."""


class Started(NamedTuple):
    """Results of a batch, which may still be under way."""

    embeddings: Float[Array, "b g d"]
    """Means by `pool_ids`, before normalisation."""
    states: Float[Array, "b t d"]


class MixedRows:
    """The forward pass over rows of any adapters. Nothing is compiled after `compile`.

    Attributes:
        shapes: what `start` takes, the smallest first.
        devices: that a batch is split over; its number of rows is a multiple of this.
    """

    def __init__(self, encoder: Encoder, mesh: Mesh | None, shapes: Sequence[Shape]):
        self.shapes = tuple(shapes)
        self.devices = 1 if mesh is None else mesh.size
        self._encoder, self._mesh = encoder, mesh
        self._programs: dict[Shape, Any] = {}

    def compile(self) -> None:
        """Compiles the program of every shape, several at a time, and runs the smallest once."""
        with ThreadPoolExecutor(min(_COMPILERS, os.cpu_count() or 1)) as pool:
            self._programs = dict(zip(self.shapes, pool.map(self._compiled, self.shapes), strict=True))
        started = self.start(*_empty(self.shapes[0]))
        np.asarray(started.embeddings)

    def start(self, batch: PackedBatch, adapter_ids: Int[np.ndarray, "b g"]) -> Started:
        """Starts the computation of a batch.

        Args:
            batch: of one of `shapes`.
            adapter_ids: adapter of each text of a row, -1 = the base model.
        """
        return Started(*self._programs[batch.tokens.shape](self._encoder, *self._inputs(batch, adapter_ids)))

    def _compiled(self, shape: Shape) -> Any:
        inputs = self._inputs(*_empty(shape))
        return embeddings_and_states.lower(self._encoder, *inputs, mesh=self._mesh).compile()

    def _inputs(self, batch: PackedBatch, adapter_ids: np.ndarray) -> tuple[Any, ...]:
        adapters = adapter_ids if self._encoder.config.tasks else None
        inputs = batch.tokens, batch.segment_ids, batch.positions, adapters, batch.pool_ids
        return inputs if self._mesh is None else shard_batch(inputs, self._mesh)


def _empty(shape: Shape) -> tuple[PackedBatch, np.ndarray]:
    """A batch without texts, and its adapters."""
    b, t = shape
    slots, texts = np.zeros((b, t), np.int32), np.full((b, max_texts(t)), -1, np.int32)
    return PackedBatch(slots, slots, slots, texts, slots), texts

"""Rows of a batch: validity, gathering over shards, chunks and checks; shared by the losses."""

from collections.abc import Callable
from math import inf
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

AxisName = str | tuple[str, ...] | None
Tree = TypeVar("Tree")
Rows = TypeVar("Rows", bound=tuple[Array, ...])

NEVER = np.finfo(np.float32).min
"""Logit of what does not count. Finite: a row of -inf alone would have NaN gradients."""


def zero_where_invalid(x: Array, valid: Array) -> Array:
    """Zeroes invalid rows, in float32: a NaN that is only masked would still make NaN gradients."""
    return jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x.astype(jnp.float32), 0)


def global_row_numbers(n: int, axis_name: AxisName) -> Array:
    """Numbers the n rows of this shard so that no two rows of all shards have the same number."""
    return jnp.arange(n) + (0 if axis_name is None else n * jax.lax.axis_index(axis_name))


def all_gather_rows(rows: Tree, axis_name: AxisName) -> Tree:
    """Gathers the rows of all shards.

    Float arrays must be float32: gradients are reduced over shards in their dtype.
    """
    if axis_name is None:
        return rows
    gathered = jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), rows)
    # Without the barrier XLA gathers again in each step of a loop over chunks.
    return jax.lax.optimization_barrier(gathered)


def map_chunks(function: Callable[..., Array], rows: tuple[Array, ...], chunk: int | None) -> Array:
    """Computes function(*rows), [n], for `chunk` rows at a time.

    Large intermediates of `function` must be under `jax.checkpoint`.
    """
    n = rows[0].shape[0]
    if chunk is None or chunk >= n:
        return function(*rows)
    return jax.lax.map(lambda rows: function(*rows), split_rows(rows, chunk)).reshape(-1)[:n]


def split_rows(rows: Rows, chunk: int | None) -> Rows:
    """Splits rows [n, ...] into the fewest chunks of at most `chunk` rows, [chunks, rows, ...].

    Chunks are of about equal size, a multiple of 8 rows (a tile) where `chunk` allows it, so that
    at most 8 rows are added per chunk. Zeros fill the last chunk.
    """
    n = rows[0].shape[0]
    chunks = -(-n // (chunk or n))
    size = -(-n // chunks)
    size = min(size + -size % 8, chunk or n)

    def split(x: Array) -> Array:
        return jnp.pad(x, [(0, chunks * size - n)] + [(0, 0)] * (x.ndim - 1)).reshape(chunks, size, *x.shape[1:])

    return jax.tree.map(split, rows)


def check_rows(like: Array, axes: int = 2, **arrays: Array | None) -> None:
    """Raises ValueError unless `like` is [n, d] and other arrays have its first `axes` axes."""
    if like.ndim != 2 or 0 in like.shape:
        raise ValueError(f"embeddings are {like.shape}, should be [n, d] with at least one row")
    for name, array in arrays.items():
        if array is not None and array.shape != like.shape[:axes]:
            raise ValueError(f"{name} is {array.shape}, should be {like.shape[:axes]}")


def check_positive(**numbers: float | int) -> None:
    for name, number in numbers.items():
        if not 0 < number < inf:
            raise ValueError(f"{name} is {number}, should be above 0")


def check_chunk(chunk: int | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}, should be 1 or more, or None")

"""Loops over the rows of a batch in chunks: gradient caching and gradient accumulation.

Memory holds the activations of one chunk, and gradients are accumulated in place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from jina_jax.model.encoder import Encoder
from jina_jax.model.gradient_sums import GradientSums

from ..data.collate import PackedRows
from ..data.row_counts import ChunkRows, chunk_count, in_even_chunks

ChunkFunction = Callable[[Encoder, GradientSums, PackedRows], tuple[Array, GradientSums]]
"""Function of the encoder, the gradient sums before some rows of a batch, and these rows; returns a
result, and the sums after them."""


def encode_cached(
    function: ChunkFunction, encoder: Encoder, sums: GradientSums, rows: PackedRows, chunk_rows: ChunkRows
) -> Array:
    """Encodes chunks of rows with gradient caching (Gao et al., 2021).

    This is for a loss that needs all chunks before any gradient is known: each chunk is recomputed
    in the backward pass.

    Args:
        function: called for each chunk as function(encoder, sums, chunk of rows).
        encoder: model to differentiate.
        sums: the first chunk's.
        rows: of the batch; they are split into chunks.
        chunk_rows: most rows of a chunk; None = all.

    Returns:
        The function's results, stacked along a new first axis; those of empty rows, which fill the
        last chunk, come last.
    """
    if (chunks := _chunks(rows, chunk_rows)) is None:
        return function(encoder, sums, rows)[0][None]
    graphdef, state = nnx.split(encoder)

    # In a scan nothing can be merged with the first pass.
    @partial(jax.checkpoint, prevent_cse=False)
    def step(sums: GradientSums, state: nnx.State, chunk: PackedRows) -> tuple[GradientSums, Array]:
        result, sums = function(nnx.merge(graphdef, state), sums, chunk)
        return sums, result

    return jax.lax.scan(lambda sums, chunk: step(sums, state, chunk), sums, chunks)[1]


def accumulate_loss(function: ChunkFunction, encoder: Encoder, rows: PackedRows, chunk_rows: ChunkRows) -> Float[Array, ""]:
    """Sums a loss over chunks of rows, with gradient accumulation.

    No chunk's gradient depends on another chunk, so each is computed in the first pass, and nothing
    is recomputed.

    Args:
        function: called for each chunk as function(encoder, sums, chunk of rows); its result is a
            scalar.
        encoder: model to differentiate.
        rows: of the batch; they are split into chunks.
        chunk_rows: most rows of a chunk; None = all.

    Returns:
        The sum of the function's results.
    """
    if (chunks := _chunks(rows, chunk_rows)) is None:
        return function(encoder, GradientSums.start(encoder), rows)[0]
    graphdef, large, small = nnx.split(encoder, _is_summed, ...)

    def chunk_loss(sums: GradientSums, large: nnx.State, small: nnx.State, chunk: PackedRows) -> tuple[Array, GradientSums]:
        return function(nnx.merge(graphdef, large, small), sums, chunk)

    @jax.custom_vjp
    def total(sums: GradientSums, large: nnx.State, small: nnx.State) -> Array:
        return jax.lax.map(lambda chunk: chunk_loss(sums, large, small, chunk)[0], chunks).sum()

    def forward(sums: GradientSums, large: nnx.State, small: nnx.State) -> tuple[Array, tuple[GradientSums, nnx.State]]:
        def step(
            carry: tuple[Array, GradientSums, nnx.State], chunk: PackedRows
        ) -> tuple[tuple[Array, GradientSums, nnx.State], None]:
            so_far, d_sums, d_small = carry
            (share, _), pull = jax.vjp(lambda sums, small: chunk_loss(sums, large, small, chunk), sums, small)
            d_sums, own = pull((jnp.ones_like(share), d_sums))
            return (so_far + share, d_sums, jax.tree.map(jnp.add, d_small, own)), None

        zeros = partial(jax.tree.map, jnp.zeros_like)
        (result, *gradients), _ = jax.lax.scan(step, (jnp.zeros(()), zeros(sums), zeros(small)), chunks)
        return result, tuple(gradients)

    def backward(gradients: tuple[GradientSums, nnx.State], d_total: Array) -> tuple[GradientSums, None, nnx.State]:
        d_sums, d_small = jax.tree.map(lambda gradient: (d_total * gradient).astype(gradient.dtype), gradients)
        return d_sums, None, d_small

    total.defvjp(forward, backward)
    return total(GradientSums.start(encoder), large, small)


def _chunks(rows: PackedRows, chunk_rows: ChunkRows) -> PackedRows | None:
    """Splits rows into the fewest equal chunks, along a new first axis; None if they are one.

    Empty rows follow where their number asks for it.
    """
    count = rows.tokens.shape[0]
    if (chunks := chunk_count(count, chunk_rows)) == 1:
        return None
    even = in_even_chunks(count, chunk_rows)

    def split(x: Array, empty: int) -> Array:
        padded = jnp.pad(jnp.asarray(x), ((0, even - count), (0, 0)), constant_values=empty)
        return padded.reshape(chunks, even // chunks, x.shape[1])

    return PackedRows(**{name: split(x, -1 if name == "labels" else 0) for name, x in rows._asdict().items()})


def _is_summed(path: tuple[Any, ...], _: Any) -> bool:
    """True if the gradient of an encoder's parameter arrives at `GradientSums`."""
    return path[0] == "layers" or path == ("tokens", "table")

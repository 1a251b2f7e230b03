"""What each objective makes of a batch: pure functions of an encoder and a batch to this device's share of the loss."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from jina_jax import accumulate
from jina_jax.losses import cosent, info_nce, masked_lm
from jina_jax.model import Encoder, Gather, Sums, pool

from .batches import Batch
from .config import Stage
from .masking import max_masked

AxisName = str | tuple[str, ...] | None
States = Callable[[Encoder, Sums, Batch], tuple[Float[Array, "b t d"], Sums]]
Loss = Callable[[Encoder, Batch], Float[Array, ""]]
"""A device's share: the shares of all devices add up to the loss."""
Chunk = dict[str, Array]
OfChunk = Callable[[Encoder, Sums, Batch], tuple[Array, Sums]]
"""Of some rows of a batch, and the sums behind them."""


def objective(stage: Stage, kind: str, axis_name: AxisName = None, gather: Gather | None = None) -> Loss:
    """The loss of a stage on batches of one record kind.

    Args:
        stage: says which objective and with which constants.
        kind: record kind of the batch's dataset.
        axis_name: mesh axes over which the batch is split, inside a `shard_map`.
        gather: as the encoder takes it.
    """
    states = partial(token_states, stage=stage, gather=gather)
    if kind == "text":
        return partial(masked_language_loss, states=states, stage=stage, axis_name=axis_name)
    of_embeddings = {"pair": contrast, "triplet": contrast, "scored_pair": rank}.get(kind)
    if kind == "labelled_text":
        of_embeddings = contrast if stage.objective == "classification" else separate
    assert of_embeddings is not None

    def loss(encoder: Encoder, batch: Batch) -> Float[Array, ""]:
        return of_embeddings(embed_texts(encoder, batch, states, stage), batch, stage, axis_name)

    return loss


def contrast(embeddings: Float[Array, "n s d"], batch: Batch, stage: Stage, axis_name: AxisName) -> Float[Array, ""]:
    """InfoNCE in both directions of anchors and positives, with all other texts of an example as negatives of every anchor."""
    return info_nce(
        embeddings[:, 0],
        embeddings[:, 1],
        embeddings[:, 2:] if embeddings.shape[1] > 2 else None,
        temperature=stage.temperature,
        dims=stage.dims or None,
        weights=stage.dim_weights or None,
        group=jnp.asarray(batch.groups),
        chunk=stage.loss_chunk,
        axis_name=axis_name,
    )


def rank(embeddings: Float[Array, "n s d"], batch: Batch, stage: Stage, axis_name: AxisName) -> Float[Array, ""]:
    """CoSENT on graded pairs."""
    return cosent(
        embeddings[:, 0],
        embeddings[:, 1],
        jnp.asarray(batch.scores),
        temperature=stage.temperature,
        dims=stage.dims or None,
        weights=stage.dim_weights or None,
        axis_name=axis_name,
    )


def separate(embeddings: Float[Array, "n s d"], batch: Batch, stage: Stage, axis_name: AxisName) -> Float[Array, ""]:
    """CoSENT with two grades: a text is closer to one of its own class than any text to one of another class.

    The paper's equation (5) has pairs of one class alone, which leaves nothing to rank; pairs across classes are the others.
    """
    own, other = embeddings[:, 1], embeddings[:, 2]
    return cosent(
        jnp.concatenate([embeddings[:, 0], embeddings[:, 0]]),
        jnp.concatenate([own, other]),
        jnp.concatenate([jnp.ones(len(own)), jnp.zeros(len(other))]),
        temperature=stage.temperature,
        dims=stage.dims or None,
        weights=stage.dim_weights or None,
        axis_name=axis_name,
    )


def masked_language_loss(
    encoder: Encoder, batch: Batch, *, states: States, stage: Stage, axis_name: AxisName
) -> Float[Array, ""]:
    """Cross-entropy of the masked tokens, rows in chunks."""
    assert encoder.mlm_head is not None
    rows = stage.chunk_rows or batch.tokens.shape[0]
    # Each text rounds its share up, and a row of t slots has t / 16 texts at most.
    most = max_masked(rows * batch.tokens.shape[1], stage.mask_rate, rows * batch.tasks.shape[1])
    total = (jnp.asarray(batch.labels) >= 0).sum()
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)

    def share(encoder: Encoder, sums: Sums, chunk: Batch) -> tuple[Array, Sums]:
        assert encoder.mlm_head is not None
        x, sums = states(encoder, sums, chunk)
        table, of_table = accumulate.whole(encoder.tokens.table[...], sums.table)
        mean = masked_lm(x, chunk.labels, table, encoder.mlm_head, max_masked=most, chunk=stage.loss_chunk)
        return mean * (chunk.labels >= 0).sum() / jnp.maximum(total, 1), sums._replace(table=of_table)

    return _sum_over_chunks(share, encoder, batch, stage)


def embed_texts(encoder: Encoder, batch: Batch, states: States, stage: Stage) -> Float[Array, "n s d"]:
    """Embeddings of this device's examples, rows in chunks (gradient caching, Gao et al., 2021): the loss sees the whole batch,
    and memory holds the activations of one chunk."""

    def pooled(encoder: Encoder, sums: Sums, chunk: Batch) -> tuple[Array, Sums]:
        x, sums = states(encoder, sums, chunk)
        return pool(x, jnp.asarray(chunk.segments), chunk.tasks.shape[1]), sums

    pooled_rows = _over_chunks(pooled, encoder, batch, stage)
    return jnp.take(pooled_rows.reshape(-1, pooled_rows.shape[-1]), jnp.asarray(batch.places), axis=0)


def token_states(
    encoder: Encoder, sums: Sums, batch: Batch, *, stage: Stage, gather: Gather | None
) -> tuple[Float[Array, "b t d"], Sums]:
    """Token states of packed rows, and the sums behind them."""
    # Per text and not folded: a folded kernel would need the base kernel's whole gradient on the way to its adapter's.
    tasks = jnp.asarray(batch.tasks) if stage.adapters else None
    rows = batch.tokens, batch.segments, batch.positions
    return encoder.in_chunks(sums, *rows, tasks, gather=gather, remat=stage.remat)  # type: ignore[arg-type]


def _over_chunks(function: OfChunk, encoder: Encoder, batch: Batch, stage: Stage) -> Array:
    """function(encoder, sums, chunk of rows) for each chunk, stacked, and computed again in the backward pass."""
    if (chunks := _chunks(batch, stage)) is None:
        return function(encoder, Sums.of(encoder), batch)[0][None]
    graphdef, state = nnx.split(encoder)

    @partial(jax.checkpoint, prevent_cse=False)  # in a scan nothing can be merged with the first pass
    def step(sums: Sums, state: nnx.State, chunk: Chunk) -> tuple[Sums, Array]:
        result, sums = function(nnx.merge(graphdef, state), sums, batch._replace(**chunk))
        return sums, result

    return jax.lax.scan(lambda sums, chunk: step(sums, state, chunk), Sums.of(encoder), chunks)[1]


def _sum_over_chunks(function: OfChunk, encoder: Encoder, batch: Batch, stage: Stage) -> Float[Array, ""]:
    """The sum of function(encoder, sums, chunk of rows), a number for each chunk. Its gradient is made chunk by chunk in the
    first pass, since no chunk's depends on another, so nothing is computed twice as for a loss that needs all chunks."""
    if (chunks := _chunks(batch, stage)) is None:
        return function(encoder, Sums.of(encoder), batch)[0]
    graphdef, large, small = nnx.split(encoder, _is_summed, ...)

    def of_chunk(sums: Sums, large: nnx.State, small: nnx.State, chunk: Chunk) -> tuple[Array, Sums]:
        return function(nnx.merge(graphdef, large, small), sums, batch._replace(**chunk))

    @jax.custom_vjp
    def total(sums: Sums, large: nnx.State, small: nnx.State) -> Array:
        return jax.lax.map(lambda chunk: of_chunk(sums, large, small, chunk)[0], chunks).sum()

    def forward(sums: Sums, large: nnx.State, small: nnx.State) -> tuple[Array, tuple[Sums, nnx.State]]:
        def step(carry: tuple[Array, Sums, nnx.State], chunk: Chunk) -> tuple[tuple[Array, Sums, nnx.State], None]:
            so_far, d_sums, d_small = carry
            (share, _), pull = jax.vjp(lambda sums, small: of_chunk(sums, large, small, chunk), sums, small)
            d_sums, own = pull((jnp.ones_like(share), d_sums))
            return (so_far + share, d_sums, jax.tree.map(jnp.add, d_small, own)), None

        zeros = partial(jax.tree.map, jnp.zeros_like)
        (result, *gradients), _ = jax.lax.scan(step, (jnp.zeros(()), zeros(sums), zeros(small)), chunks)
        return result, tuple(gradients)

    def backward(gradients: tuple[Sums, nnx.State], d_total: Array) -> tuple[Sums, None, nnx.State]:
        d_sums, d_small = jax.tree.map(lambda gradient: (d_total * gradient).astype(gradient.dtype), gradients)
        return d_sums, None, d_small

    total.defvjp(forward, backward)
    return total(Sums.of(encoder), large, small)


def _chunks(batch: Batch, stage: Stage) -> Chunk | None:
    """What the encoder reads of a batch, split by rows; None where all rows are one chunk."""
    rows, chunk = batch.tokens.shape[0], stage.chunk_rows
    if chunk is None or chunk >= rows:
        return None
    arrays = {name: getattr(batch, name) for name in ("tokens", "segments", "positions", "tasks", "labels")}
    return jax.tree.map(lambda x: x.reshape(rows // chunk, chunk, x.shape[1]), arrays)


def _is_summed(path: tuple[Any, ...], _: Any) -> bool:
    """Whether the gradient of an encoder's parameter arrives at `Sums`."""
    return path[0] == "layers" or path == ("tokens", "table")

"""Losses of the objectives: pure functions of an encoder and a batch to a device's local loss."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jina_jax.losses import cosent, info_nce, masked_lm
from jina_jax.losses.batch_rows import all_gather_rows
from jina_jax.model import gradient_sums
from jina_jax.model.encoder import Encoder, Gather, pool
from jina_jax.model.gradient_sums import GradientSums

from ..config import Stage
from ..data.collate import TrainBatch
from ..data.masking import max_masked
from .gradient_cache import accumulate_loss, encode_cached

AxisName = str | tuple[str, ...] | None
ChunkStates = Callable[[Encoder, GradientSums, TrainBatch], tuple[Float[Array, "b t d"], GradientSums]]
Loss = Callable[[Encoder, TrainBatch], Float[Array, ""]]
"""Local loss of a device: the local losses of all devices add up to the loss."""


def objective(stage: Stage, kind: str, axis_name: AxisName = None, gather: Gather | None = None) -> Loss:
    """Returns the loss of a stage on batches of one record kind.

    Args:
        stage: gives the objective and its constants.
        kind: record kind of the batch's dataset.
        axis_name: mesh axes over which the batch is split, inside a `shard_map`.
        gather: as `Encoder.__call__` takes it.
    """
    states = partial(chunk_states, stage=stage, gather=gather)
    if kind == "text":
        return partial(mlm_loss, states=states, stage=stage, axis_name=axis_name)
    embedding_loss = {"pair": info_nce_loss, "triplet": info_nce_loss, "scored_pair": cosent_loss}.get(kind)
    if kind == "labelled_text":
        embedding_loss = info_nce_loss if stage.objective == "classification" else separation_loss
    assert embedding_loss is not None

    def loss(encoder: Encoder, batch: TrainBatch) -> Float[Array, ""]:
        return embedding_loss(embed_texts(encoder, batch, states, stage), batch, stage, axis_name)

    return loss


def info_nce_loss(embeddings: Float[Array, "n s d"], batch: TrainBatch, stage: Stage, axis_name: AxisName) -> Float[Array, ""]:
    """InfoNCE in both directions of anchors and positives.

    All other texts of an example are negatives of every anchor of another group.
    """
    groups = jnp.asarray(batch.groups)
    further = embeddings.shape[1] > 2
    return info_nce(
        embeddings[:, 0],
        embeddings[:, 1],
        embeddings[:, 2:] if further else None,
        temperature=stage.temperature,
        dims=stage.dims or None,
        weights=stage.dim_weights or None,
        group=groups[:, 0],
        negative_group=groups[:, 1:] if further else None,
        chunk=stage.logit_chunk,
        axis_name=axis_name,
    )


def cosent_loss(embeddings: Float[Array, "n s d"], batch: TrainBatch, stage: Stage, axis_name: AxisName) -> Float[Array, ""]:
    """CoSENT loss on graded pairs."""
    ranks = score_ranks(jnp.asarray(batch.scores), axis_name)
    return cosent(
        embeddings[:, 0],
        embeddings[:, 1],
        ranks,
        temperature=stage.temperature,
        dims=stage.dims or None,
        weights=stage.dim_weights or None,
        axis_name=axis_name,
    )


def score_ranks(keys: Int[Array, "n 2"], axis_name: AxisName) -> Float[Array, " n"]:
    """Number of examples of the global batch with a lower score, for each of this device's.

    Args:
        keys: from `collate.score_keys`.
        axis_name: as in `objective`.
    """
    high, low = keys[:, 0], keys[:, 1]
    other_high, other_low = all_gather_rows((high, low), axis_name)
    high, low, other_high, other_low = high[:, None], low[:, None], other_high[None], other_low[None]
    lower = (other_high < high) | ((other_high == high) & (other_low < low))
    return lower.sum(1).astype(jnp.float32)


def separation_loss(
    embeddings: Float[Array, "n s d"], batch: TrainBatch, stage: Stage, axis_name: AxisName
) -> Float[Array, ""]:
    """CoSENT loss with two grades.

    A text should be closer to one of its class than any text to one of another class. The paper's
    equation (5) has only pairs of one class, which leaves nothing to rank; here pairs across
    classes are the others.
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


def mlm_loss(
    encoder: Encoder, batch: TrainBatch, *, states: ChunkStates, stage: Stage, axis_name: AxisName
) -> Float[Array, ""]:
    """Cross-entropy of the masked tokens, computed in chunks of rows."""
    assert encoder.mlm_head is not None
    rows = stage.encode_chunk_rows or batch.tokens.shape[0]
    # Each text rounds its masked tokens up, and a row of t slots has t / 16 texts at most.
    most = max_masked(rows * batch.tokens.shape[1], stage.mask_rate, rows * batch.adapter_ids.shape[1])
    total = (jnp.asarray(batch.labels) >= 0).sum()
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)

    def share(encoder: Encoder, sums: GradientSums, chunk: TrainBatch) -> tuple[Array, GradientSums]:
        assert encoder.mlm_head is not None
        x, sums = states(encoder, sums, chunk)
        table, table_sum = gradient_sums.track(encoder.tokens.table[...], sums.table)
        loss = masked_lm(x, chunk.labels, table, encoder.mlm_head, max_masked=most, chunk=stage.logit_chunk, total=total)
        return loss, sums._replace(table=table_sum)

    return accumulate_loss(share, encoder, batch, stage.encode_chunk_rows)


def embed_texts(encoder: Encoder, batch: TrainBatch, states: ChunkStates, stage: Stage) -> Float[Array, "n s d"]:
    """Embeddings of this device's examples, computed in chunks of rows.

    By gradient caching (Gao et al., 2021) the loss sees the complete batch, and memory holds the
    activations of one chunk.
    """

    def pooled(encoder: Encoder, sums: GradientSums, chunk: TrainBatch) -> tuple[Array, GradientSums]:
        x, sums = states(encoder, sums, chunk)
        return pool(x, jnp.asarray(chunk.segment_ids), chunk.adapter_ids.shape[1]), sums

    pooled_rows = encode_cached(pooled, encoder, batch, stage.encode_chunk_rows)
    return jnp.take(pooled_rows.reshape(-1, pooled_rows.shape[-1]), jnp.asarray(batch.places), axis=0)


def chunk_states(
    encoder: Encoder, sums: GradientSums, batch: TrainBatch, *, stage: Stage, gather: Gather | None
) -> tuple[Float[Array, "b t d"], GradientSums]:
    """Token states of packed rows, and the gradient sums after them."""
    # Adapters are per text and not folded: a folded kernel would need the full gradient of the base
    # kernel on the way to its adapter's.
    adapter_ids = jnp.asarray(batch.adapter_ids) if stage.adapters else None
    rows = batch.tokens, batch.segment_ids, batch.positions
    return gradient_sums.encode_accumulating(encoder, sums, *rows, adapter_ids, gather=gather, remat=stage.remat)  # type: ignore[arg-type]

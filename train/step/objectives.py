"""Losses of the objectives: pure functions of an encoder and a batch to a device's local loss."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jina_jax.losses import cosent, info_nce, masked_lm
from jina_jax.losses.batch_rows import all_gather_rows
from jina_jax.model import gradient_sums
from jina_jax.model.encoder import Encoder, Gather, pool
from jina_jax.model.frozen_base import fold_layer, fold_layers
from jina_jax.model.gradient_sums import GradientSums
from jina_jax.model.lora import AdapterParam
from jina_jax.text.packing import max_texts

from ..config import Stage
from ..data.collate import PackedRows, TrainBatch
from ..data.masking import max_masked
from ..data.row_counts import chunk_count, in_even_chunks, texts_per_row
from .gradient_cache import accumulate_loss, encode_cached

AxisName = str | tuple[str, ...] | None
ChunkStates = Callable[[Encoder, GradientSums, PackedRows], tuple[Float[Array, "b t d"], GradientSums]]
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
    if kind == "text":
        return partial(mlm_loss, states=partial(chunk_states, stage=stage, gather=gather), stage=stage, axis_name=axis_name)
    embedding_loss = {"pair": info_nce_loss, "triplet": info_nce_loss, "scored_pair": cosent_loss}.get(kind)
    if kind == "labelled_text":
        embedding_loss = info_nce_loss if stage.objective == "classification" else separation_loss
    assert embedding_loss is not None

    def loss(encoder: Encoder, batch: TrainBatch) -> Float[Array, ""]:
        return embedding_loss(embed_texts(encoder, batch, stage, gather), batch, stage, axis_name)

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
    (rows,) = batch.parts
    count, length = rows.tokens.shape
    chunk_rows = in_even_chunks(count, stage.encode_chunk_rows) // chunk_count(count, stage.encode_chunk_rows)
    most = max_masked(chunk_rows * length, stage.mask_rate, chunk_rows * texts_per_row(stage))
    total = (jnp.asarray(rows.labels) >= 0).sum()
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)

    def share(encoder: Encoder, sums: GradientSums, chunk: PackedRows) -> tuple[Array, GradientSums]:
        assert encoder.mlm_head is not None
        x, sums = states(encoder, sums, chunk)
        table, table_sum = gradient_sums.track(encoder.tokens.table[...], sums.table)
        loss = masked_lm(x, chunk.labels, table, encoder.mlm_head, max_masked=most, chunk=stage.logit_chunk, total=total)
        return loss, sums._replace(table=table_sum)

    return accumulate_loss(share, encoder, rows, stage.encode_chunk_rows)


def embed_texts(encoder: Encoder, batch: TrainBatch, stage: Stage, gather: Gather | None) -> Float[Array, "n s d"]:
    """Embeddings of this device's examples, computed in chunks of rows.

    By gradient caching (Gao et al., 2021) the loss sees the complete batch, and memory holds the
    activations of one chunk. An adapter is folded into the kernels once for the step, or, where
    these are sharded over devices, as they are gathered.
    """
    adapters = range(len(stage.adapters)) if stage.adapters else (None,)
    pooled = [_pooled_rows(encoder, rows, adapter, stage, gather) for adapter, rows in zip(adapters, batch.parts, strict=True)]
    return jnp.take(jnp.concatenate(pooled), jnp.asarray(batch.places), axis=0)


def _pooled_rows(
    encoder: Encoder, rows: PackedRows, adapter: int | None, stage: Stage, gather: Gather | None
) -> Float[Array, "places d"]:
    """Embeddings of one part of a batch, g for each of its rows."""
    if adapter is not None:
        if gather is None:
            encoder = fold_layers(encoder, adapter)
        else:
            gather = _folding(gather, adapter, encoder.dtype)
    states = partial(chunk_states, adapter=adapter, stage=stage, gather=gather)

    def pooled(encoder: Encoder, sums: GradientSums, chunk: PackedRows) -> tuple[Array, GradientSums]:
        x, sums = states(encoder, sums, chunk)
        return pool(x, jnp.asarray(chunk.segment_ids), max_texts(x.shape[1])), sums

    sums = GradientSums.start(encoder, nnx.Variable if adapter is None else AdapterParam)
    embeddings = encode_cached(pooled, encoder, sums, rows, stage.encode_chunk_rows)
    of_rows = embeddings.reshape(-1, *embeddings.shape[2:])[: rows.tokens.shape[0]]
    return of_rows.reshape(-1, of_rows.shape[-1])


def _folding(gather: Gather, adapter: int, dtype: DTypeLike) -> Gather:
    return lambda layer: fold_layer(gather(layer), adapter, dtype)


def chunk_states(
    encoder: Encoder, sums: GradientSums, rows: PackedRows, *, adapter: int | None = None, stage: Stage, gather: Gather | None
) -> tuple[Float[Array, "b t d"], GradientSums]:
    """Token states of packed rows, and the gradient sums after them.

    Args:
        adapter: index of the adapter of all rows, which is folded into the layers; None = the base.
    """
    adapter_ids = None if adapter is None else jnp.int32(adapter)
    inputs = rows.tokens, rows.segment_ids, rows.positions
    return gradient_sums.encode_accumulating(encoder, sums, *inputs, adapter_ids, gather=gather, remat=stage.remat)  # type: ignore[arg-type]

"""InfoNCE with in-batch and explicit negatives (van den Oord et al., 2018), in both directions."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from ..model.matmul import matmul
from .batch_rows import (
    NEVER,
    AxisName,
    all_gather_rows,
    check_chunk,
    check_positive,
    check_rows,
    global_row_numbers,
    map_chunks,
    zero_where_invalid,
)
from .matryoshka import prefixes, unit_prefix


@partial(jax.jit, static_argnames=("temperature", "bidirectional", "dims", "weights", "chunk", "axis_name"))
def info_nce(
    q: Float[Array, "n d"],
    p: Float[Array, "n d"],
    negatives: Float[Array, "n m d"] | None = None,
    *,
    temperature: float,
    bidirectional: bool = True,
    dims: tuple[int, ...] | None = None,
    weights: tuple[float, ...] | None = None,
    valid: Bool[Array, "n"] | None = None,
    group: Int[Array, "n"] | None = None,
    negative_group: Int[Array, "n m"] | None = None,
    chunk: int | None = None,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """InfoNCE with in-batch negatives, q -> p plus p -> q.

    Each direction is the mean over valid rows of -log of the softmax probability of the positive.
    With `negatives` it is the triplet loss of section 4.3. Without any valid row the loss and its
    gradient are zero.

    Args:
        q: embeddings of one side.
        p: embeddings of the other; row i of one is the positive of row i of the other.
        negatives: further candidates of every query, from all rows and shards; in q -> p only.
        temperature: cosines are divided by it.
        bidirectional: False computes q -> p only.
        dims: Matryoshka prefixes, see `jina_jax.losses`; None = the full width.
        weights: of the prefixes; None = 1 each.
        valid: an invalid row is neither anchor nor candidate, its negatives do not count, and its
            contents, even NaN, have no effect.
        group: rows of the same group are not negatives of one another.
        negative_group: group of each of `negatives`; one of an anchor's own group is no negative of
            that anchor, whichever row it comes from. None = explicit negatives always count.
        chunk: rows whose logits exist at a time, so that memory grows linearly with the rows.
            None = all, for small batches.
        axis_name: the candidates are those of all shards; each shard scores its local rows.

    Returns:
        The loss, a float32 scalar. With `axis_name` it is the per-shard term: the terms of all
        shards add up to the global loss.

    Raises:
        ValueError: array shapes do not match, or a number is out of range.

    Two pairs at right angles to one another; each direction gives log(1 + exp(-1)):

    >>> pairs = jnp.eye(2)
    >>> print(f"{info_nce(pairs, pairs, temperature=1.0):.4f}")
    0.6265
    """
    check_rows(q, p=p)
    check_rows(q, 1, valid=valid, group=group)
    if negatives is not None and (negatives.ndim != 3 or negatives.shape[::2] != q.shape or not negatives.shape[1]):
        raise ValueError(f"negatives are {negatives.shape}, should be {(q.shape[0], 'm >= 1', q.shape[1])}")
    _check_negative_group(negative_group, negatives, group)
    check_positive(temperature=temperature)
    check_chunk(chunk)
    matryoshka = prefixes(q.shape[1], dims, weights)
    valid = jnp.ones(q.shape[0], bool) if valid is None else valid
    group = global_row_numbers(q.shape[0], axis_name) if group is None else group
    q, p, negatives = (
        zero_where_invalid(q, valid),
        zero_where_invalid(p, valid),
        None if negatives is None else zero_where_invalid(negatives, valid),
    )
    all_q, all_p, all_negatives, all_valid, all_group, all_negative_group = all_gather_rows(
        (q, p, negatives, valid, group, negative_group), axis_name
    )
    score = partial(_row_losses, prefixes=matryoshka, temperature=temperature, chunk=chunk)
    loss = score(q, p, group, Candidates(all_p, all_valid, all_group, all_negatives, all_negative_group))
    if bidirectional:
        loss += score(p, q, group, Candidates(all_q, all_valid, all_group))
    return jnp.where(valid, loss, 0).sum() / jnp.maximum(all_valid.sum(), 1)


class Candidates(NamedTuple):
    """Rows that anchors are scored against, from all shards: embeddings and explicit negatives."""

    embeddings: Array
    valid: Array
    group: Array
    negatives: Array | None = None
    negative_group: Array | None = None


def _check_negative_group(negative_group: Array | None, negatives: Array | None, group: Array | None) -> None:
    if negative_group is None:
        return
    if negatives is None or group is None:
        raise ValueError("negative_group is compared with group, for negatives; give both of them as well")
    if negative_group.shape != negatives.shape[:2]:
        raise ValueError(f"negative_group is {negative_group.shape}, should be {negatives.shape[:2]}")


def _row_losses(
    anchors: Array,
    positives: Array,
    group: Array,
    candidates: Candidates,
    *,
    prefixes: list[tuple[int, float]],
    temperature: float,
    chunk: int | None,
) -> Array:
    """Loss of each anchor [n], summed over Matryoshka prefixes."""
    # A loop, not one program per prefix: seven of those take as long to compile as the encoder.
    dims, weights = (jnp.array(column) for column in zip(*prefixes, strict=True))

    def chunk_losses(*rows: Array) -> Array:
        def weighted(prefix: tuple[Array, Array]) -> Array:
            dim, weight = prefix
            return weight * _contrast(*rows, candidates, temperature, dim)

        return jax.lax.map(weighted, (dims, weights)).sum(0)

    return map_chunks(chunk_losses, (anchors, positives, group), chunk)


# A checkpoint per prefix: its logits are dropped before those of the next one are computed.
@partial(jax.checkpoint, static_argnums=(4,))
def _contrast(anchors: Array, positives: Array, group: Array, candidates: Candidates, temperature: float, dim: Array) -> Array:
    """Negative log-probability of each anchor's positive, on prefixes of length `dim`."""
    anchors = unit_prefix(anchors, dim) / temperature
    in_batch = candidates.valid[None] & (group[:, None] != candidates.group[None])
    others = _log_sum(anchors, unit_prefix(candidates.embeddings, dim), in_batch)
    if candidates.negatives is not None:
        n, m, d = candidates.negatives.shape
        explicit = jnp.repeat(candidates.valid, m)[None]
        if candidates.negative_group is not None:
            explicit &= group[:, None] != candidates.negative_group.reshape(1, n * m)
        others = jnp.logaddexp(others, _log_sum(anchors, unit_prefix(candidates.negatives.reshape(n * m, d), dim), explicit))
    # log(1 + exp(x)) keeps the digits of small losses, which a log-sum minus the positive loses.
    return jax.nn.softplus(others - (anchors * unit_prefix(positives, dim)).sum(-1))


def _log_sum(anchors: Array, candidates: Array, allowed: Array) -> Array:
    """Log of the sum of exp(anchor . candidate) over the allowed candidates of each anchor."""
    return jax.nn.logsumexp(jnp.where(allowed, matmul(anchors, candidates.T), NEVER), axis=1)

"""Losses: InfoNCE, CoSENT and masked language modelling. Pure functions of arrays, usable alone.

Shapes: n rows of this call, d model, m explicit negatives of a row, b t v as in `model.py`. Embeddings come raw, as pooled:
each Matryoshka prefix (`dims`, weighted by `weights`, 1 each by default) is normalised here, and its losses are summed. A zero
vector has cosine 0 with everything, and no gradient. All arithmetic is in float32.

Inside `shard_map(check_vma=False)`, `axis_name` names the axes over which the rows are split. The result is then **this shard's
share: the shares add up to the loss of all rows**. Differentiate the share and add up the gradients; a psum before the gradient
would multiply it, for without vma types the transpose of psum is psum.

Bad arguments raise ValueError. Sections are those of the jina-embeddings-v3 paper (arXiv 2409.10173).
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from .model.encoder import MLMHead
from .model.matmul import matmul, matmul_transposed

AxisName = str | tuple[str, ...] | None
Tree = TypeVar("Tree")
Rows = TypeVar("Rows", bound=tuple[Array, ...])

NEVER = np.finfo(np.float32).min
"""Logit of what is no candidate. Finite: a row of -inf alone would have NaN gradients."""

SMALLEST_SQUARE = 1e-24
"""Vectors of a smaller squared norm count as zero: the gradient of their direction would overflow."""


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
    chunk: int | None = None,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """InfoNCE over in-batch negatives: the mean over valid rows of -log of the positive's share, q -> p plus p -> q.

    With `negatives` it is the triplet loss of section 4.3. Without any valid row it is zero, and so is its gradient.

    Args:
        q, p: embeddings of the two sides; row i of one is the positive of row i of the other.
        negatives: further candidates of every query, of all rows and shards; in q -> p only.
        temperature: the cosine is divided by it.
        bidirectional: without it, q -> p alone.
        valid: a row that is not valid is neither anchor nor candidate, its negatives do not count, and what it holds, be it
            NaN, has no effect.
        group: rows of the same group are no negatives of one another; explicit negatives always count.
        chunk: rows whose logits exist at a time, so that memory grows linearly with the rows. None = all, for small batches.
        axis_name: the candidates are those of all shards; each shard scores its own rows.
    """
    _check_rows(q, p=p)
    _check_rows(q, 1, valid=valid, group=group)
    if negatives is not None and (negatives.ndim != 3 or negatives.shape[::2] != q.shape or not negatives.shape[1]):
        raise ValueError(f"negatives are {negatives.shape}, should be {(q.shape[0], 'm >= 1', q.shape[1])}")
    _check_positive(temperature=temperature)
    _check_chunk(chunk)
    prefixes = _prefixes(q.shape[1], dims, weights)
    valid = jnp.ones(q.shape[0], bool) if valid is None else valid
    group = _row_numbers(q.shape[0], axis_name) if group is None else group
    q, p, negatives = _clean(q, valid), _clean(p, valid), None if negatives is None else _clean(negatives, valid)
    all_q, all_p, all_negatives, all_valid, all_group = _gathered((q, p, negatives, valid, group), axis_name)

    def one_way(anchors: Array, positives: Array, candidates: _Candidates) -> Array:
        def losses(*rows: Array) -> Array:
            def weighted(prefix: tuple[Array, Array]) -> Array:
                dim, weight = prefix
                return weight * _contrast(*rows, candidates, temperature, dim)

            # A loop and not one program for each prefix: seven of them take the compiler as long as the encoder does.
            dims, weights = (jnp.array(column) for column in zip(*prefixes, strict=True))
            return jax.lax.map(weighted, (dims, weights)).sum(0)

        return _in_chunks(losses, (anchors, positives, group), chunk)

    loss = one_way(q, p, _Candidates(all_p, all_negatives, all_valid, all_group))
    if bidirectional:
        loss += one_way(p, q, _Candidates(all_q, None, all_valid, all_group))
    return jnp.where(valid, loss, 0).sum() / jnp.maximum(all_valid.sum(), 1)


@partial(jax.jit, static_argnames=("temperature", "dims", "weights", "axis_name"))
def cosent(
    a: Float[Array, "n d"],
    b: Float[Array, "n d"],
    score: Float[Array, "n"],
    *,
    temperature: float,
    dims: tuple[int, ...] | None = None,
    weights: tuple[float, ...] | None = None,
    valid: Bool[Array, "n"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """CoSENT (section 4.3): log(1 + sum of exp((s_i - s_j) / temperature) over rows with score_i < score_j).

    s_i is the cosine of a_i and b_i. Zero, with zero gradient, where no two valid rows have different scores. It holds one
    number for each pair of rows, [n, n].

    Args:
        a, b: embeddings of the two texts of each row.
        score: how similar they are; only the order of scores matters.
        temperature: differences of cosines are divided by it.
        valid: rows that count; what the others hold, be it NaN, has no effect.
        axis_name: pairs are formed over the rows of all shards. The logarithm does not split over rows: each shard computes the
            whole loss from the gathered cosines, and its share is an equal part.
    """
    _check_rows(a, b=b)
    _check_rows(a, 1, score=score, valid=valid)
    _check_positive(temperature=temperature)
    valid = jnp.ones(a.shape[0], bool) if valid is None else valid
    a, b = _clean(a, valid), _clean(b, valid)
    prefixes = _prefixes(a.shape[1], dims, weights)
    cosines = [(_unit(a[:, :dim]) * _unit(b[:, :dim])).sum(-1) for dim, _ in prefixes]
    cosines, score, valid = _gathered((cosines, score, valid), axis_name)

    wrong_if_higher = (score[:, None] < score[None]) & valid[:, None] & valid[None]
    total = jnp.zeros((), jnp.float32)
    for cosine, (_, weight) in zip(cosines, prefixes, strict=True):
        excess = (cosine[:, None] - cosine[None]) / temperature
        total += weight * jax.nn.softplus(jax.nn.logsumexp(jnp.where(wrong_if_higher, excess, NEVER)))
    return total if axis_name is None else total / jax.lax.axis_size(axis_name)


@partial(jax.jit, static_argnames=("max_masked", "chunk", "axis_name"))
def masked_lm(
    states: Float[Array, "b t d"],
    labels: Int[Array, "b t"],
    embedding: Float[Array, "v d"],
    head: MLMHead,
    *,
    max_masked: int,
    chunk: int | None = None,
    axis_name: AxisName = None,
    total: Int[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy of the masked tokens (section 4.1). Zero, with zero gradient, where there are none.

    Only masked positions are projected on the vocabulary.

    Args:
        states: token states of the encoder.
        labels: the token that was masked, or -1 where none was.
        embedding: the token table.
        max_masked: positions of this shard that are computed. The first ones in the order of `labels` are taken; those beyond
            are ignored and do not count in the mean either.
        chunk: positions whose logits exist at a time. None = all.
        axis_name: the mean is over the masked tokens of all shards.
        total: masked tokens of the mean, where these are a part of them: the parts' results add up to it.
    """
    if labels.shape != states.shape[:2]:
        raise ValueError(f"labels are {labels.shape}, should be {states.shape[:2]}")
    if embedding.ndim != 2 or embedding.shape[1] != states.shape[2]:
        raise ValueError(f"embedding is {embedding.shape}, should be {('v', states.shape[2])}")
    _check_positive(max_masked=max_masked)
    _check_chunk(chunk)
    positions = jnp.nonzero(labels.reshape(-1) >= 0, size=max_masked, fill_value=labels.size)[0]
    states = jnp.take(states.reshape(-1, states.shape[2]), positions, axis=0, mode="fill", fill_value=0)
    labels = jnp.take(labels.reshape(-1), positions, mode="fill", fill_value=-1)

    count = (labels >= 0).sum()
    if total is not None:
        count = total
    elif axis_name is not None:
        count = jax.lax.psum(count, axis_name)
    # The share of each in the mean, from the start: so the gradients that are made on the way are the final ones.
    shares = (labels >= 0) / jnp.maximum(count, 1).astype(jnp.float32)
    states, bias = head.transform(states[None])[0], head.bias[...].astype(jnp.float32)
    return _cross_entropy(states, jnp.maximum(labels, 0), shares, embedding, bias, chunk)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _cross_entropy(
    x: Float[Array, "n d"],
    targets: Int[Array, "n"],
    weight: Float[Array, "n"],
    table: Float[Array, "v d"],
    bias: Float[Array, "v"],
    chunk: int | None,
) -> Float[Array, ""]:
    """The sum over rows of weight times -log of the target's share in exp(x . table + bias). The weights have no gradient."""

    def log_sums(x: Array, weight: Array) -> Array:
        return weight * jax.nn.logsumexp(matmul_transposed(x, table) + bias[None], axis=1)

    own_logits = (x.astype(jnp.float32) * _rows(table, targets, x.dtype)).sum(-1) + jnp.take(bias, targets)
    return _in_chunks(log_sums, (x, weight), chunk).sum() - (weight * own_logits).sum()


def _cross_entropy_forward(x: Array, targets: Array, weight: Array, table: Array, bias: Array, chunk: int | None):
    """The gradient is made while a chunk's logits are there: later they would take their product and exponentials once more.

    Each row's share is multiplied to its [d] numbers and not to its [v] exponentials, which so are written once.
    """

    def of_chunk(sums: tuple[Array, Array], rows: tuple[Array, Array]):
        (d_table, d_bias), (x, weight) = sums, rows
        logits = matmul_transposed(x, operand) + bias[None]
        highest = logits.max(-1, keepdims=True)
        powers = jnp.exp(logits - highest)
        total = powers.sum(-1, keepdims=True)
        share = weight[:, None] / total
        powers = jax.lax.optimization_barrier(powers.astype(x.dtype))  # or every product makes them anew
        d_table += matmul(powers.T, (share * x).astype(x.dtype))
        # A tile of equal rows, as in `lora.add_bias`.
        d_bias += matmul(jnp.broadcast_to(share.T, (8, len(x))).astype(x.dtype), powers)[0]
        value = weight * (highest + jnp.log(total))[:, 0]
        return (d_table, d_bias), (value, share * matmul(powers, operand))

    own, weighted = _rows(table, targets, x.dtype), weight[:, None] * x.astype(jnp.float32)
    d_table = jnp.zeros(table.shape, jnp.float32).at[targets].add(-weighted)
    d_bias = jnp.zeros(bias.shape, jnp.float32).at[targets].add(-weight)
    operand = table.astype(x.dtype)  # once, and not in each chunk
    (d_table, d_bias), (values, d_x) = jax.lax.scan(of_chunk, (d_table, d_bias), _split((x, weight), chunk))
    value = values.sum() - (weighted * own).sum() - (weight * jnp.take(bias, targets)).sum()
    d_x = d_x.reshape(-1, x.shape[1])[: len(x)] - weight[:, None] * own
    return value, (d_x.astype(x.dtype), d_table.astype(table.dtype), d_bias)


def _cross_entropy_backward(chunk: int | None, gradients: tuple[Array, Array, Array], d_total: Array):
    d_x, d_table, d_bias = ((d_total * gradient).astype(gradient.dtype) for gradient in gradients)
    return d_x, None, None, d_table, d_bias


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _rows(table: Float[Array, "v d"], indices: Int[Array, "n"], dtype: DTypeLike) -> Float[Array, "n d"]:
    """Rows of a table in float32, rounded as a product in `dtype` rounds them."""
    return jnp.take(table.astype(dtype), indices, axis=0).astype(jnp.float32)


class _Candidates(NamedTuple):
    """What anchors are scored against, of all shards: one embedding of each row, and its explicit negatives."""

    embeddings: Array
    negatives: Array | None
    valid: Array
    group: Array


# Each prefix is checkpointed by itself: its logits are dropped before those of the next one are computed.
@partial(jax.checkpoint, static_argnums=(4,))
def _contrast(anchors: Array, positives: Array, group: Array, candidates: _Candidates, temperature: float, dim: Array) -> Array:
    """-log of the positive's share for each anchor, on prefixes of length `dim`."""
    anchors = _unit_prefix(anchors, dim) / temperature
    in_batch = candidates.valid[None] & (group[:, None] != candidates.group[None])
    others = _log_sum(anchors, _unit_prefix(candidates.embeddings, dim), in_batch)
    if candidates.negatives is not None:
        n, m, d = candidates.negatives.shape
        explicit = jnp.repeat(candidates.valid, m)[None]
        others = jnp.logaddexp(others, _log_sum(anchors, _unit_prefix(candidates.negatives.reshape(n * m, d), dim), explicit))
    # log(1 + exp(x)) keeps the digits of small losses, which the difference of a log-sum and the positive would lose.
    return jax.nn.softplus(others - (anchors * _unit_prefix(positives, dim)).sum(-1))


def _log_sum(anchors: Array, candidates: Array, allowed: Array) -> Array:
    """log of the sum of exp(anchor . candidate) over the allowed candidates of each anchor."""
    return jax.nn.logsumexp(jnp.where(allowed, matmul(anchors, candidates.T), NEVER), axis=1)


def _unit_prefix(x: Array, dim: Array) -> Array:
    """The prefix of length `dim`, normalised, with zeros behind it."""
    return _unit(jnp.where(jnp.arange(x.shape[-1]) < dim, x, 0))


def _unit(x: Array) -> Array:
    """Normalises the last axis."""
    square = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square > SMALLEST_SQUARE, square, jnp.inf))


def _clean(x: Array, valid: Array) -> Array:
    """In float32, with zeros in rows that are not valid: a masked NaN would still make NaN gradients."""
    return jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x.astype(jnp.float32), 0)


def _row_numbers(n: int, axis_name: AxisName) -> Array:
    """A number of its own for every row of all shards."""
    return jnp.arange(n) + (0 if axis_name is None else n * jax.lax.axis_index(axis_name))


def _gathered(rows: Tree, axis_name: AxisName) -> Tree:
    """The rows of all shards. Float arrays have to be float32: gradients are reduced over shards in their dtype."""
    if axis_name is None:
        return rows
    gathered = jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), rows)
    return jax.lax.optimization_barrier(gathered)  # or XLA gathers again in each step of a loop over chunks


def _in_chunks(function: Callable[..., Array], rows: tuple[Array, ...], chunk: int | None) -> Array:
    """function(*rows), [n], computed for `chunk` rows at a time. What is large in it has to be under `jax.checkpoint`."""
    n = rows[0].shape[0]
    if chunk is None or chunk >= n:
        return function(*rows)
    return jax.lax.map(lambda rows: function(*rows), _split(rows, chunk)).reshape(-1)[:n]


def _split(rows: Rows, chunk: int | None) -> Rows:
    """Rows [n, ...] in as few chunks as there can be of `chunk` rows at most, [chunks, rows, ...], with zeros behind the last.
    They are of about equal size, so that little is added: a tile of 8 rows in each at most, where so many fit."""
    n = rows[0].shape[0]
    chunks = -(-n // (chunk or n))
    size = -(-n // chunks)
    size = min(size + -size % 8, chunk or n)

    def split(x: Array) -> Array:
        return jnp.pad(x, [(0, chunks * size - n)] + [(0, 0)] * (x.ndim - 1)).reshape(chunks, size, *x.shape[1:])

    return jax.tree.map(split, rows)


def _prefixes(d: int, dims: tuple[int, ...] | None, weights: Sequence[float] | None) -> list[tuple[int, float]]:
    """(dimensions, weight) of each Matryoshka prefix."""
    dims = (d,) if dims is None else dims
    if not dims or min(dims) < 1 or max(dims) > d:
        raise ValueError(f"dims are {dims}, should be one or more numbers from 1 to {d}")
    weights = (1.0,) * len(dims) if weights is None else weights
    if len(weights) != len(dims):
        raise ValueError(f"weights are {weights}, should be {len(dims)} for dims {dims}")
    return list(zip(dims, weights, strict=True))


def _check_rows(like: Array, axes: int = 2, **arrays: Array | None) -> None:
    if like.ndim != 2 or 0 in like.shape:
        raise ValueError(f"embeddings are {like.shape}, should be [n, d] with at least one row")
    for name, array in arrays.items():
        if array is not None and array.shape != like.shape[:axes]:
            raise ValueError(f"{name} is {array.shape}, should be {like.shape[:axes]}")


def _check_positive(**numbers: float | int) -> None:
    for name, number in numbers.items():
        if not 0 < number < inf:
            raise ValueError(f"{name} is {number}, should be above 0")


def _check_chunk(chunk: int | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}, should be 1 or more, or None")

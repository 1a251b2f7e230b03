"""CoSENT: a ranking loss over the cosines of graded pairs."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from .batch_rows import NEVER, AxisName, all_gather_rows, check_positive, check_rows, zero_where_invalid
from .matryoshka import prefixes, unit


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
    """CoSENT loss (section 4.3), which ranks rows by the cosine of their two texts.

    It is log(1 + sum of exp((s_i - s_j) / temperature)) over the pairs of rows with
    score_i < score_j, where s_i is the cosine of a_i and b_i. It is zero, with zero gradient, where
    no two valid rows have different scores. Memory holds one element per pair of rows, [n, n].

    Args:
        a: embeddings of the first text of each row.
        b: embeddings of the second.
        score: similarity of the two texts; only the order of scores matters.
        temperature: differences of cosines are divided by it.
        dims: Matryoshka prefixes, see `jina_jax.losses`; None = the full width.
        weights: of the prefixes; None = 1 each.
        valid: rows that count; the contents of all other rows, even NaN, have no effect.
        axis_name: pairs are formed over the rows of all shards. The logarithm does not split over
            rows, so each shard computes the global loss from the gathered cosines and returns an
            equal fraction of it.

    Returns:
        The loss, a float32 scalar. With `axis_name` it is the per-shard term: the terms of all
        shards add up to the global loss.

    Raises:
        ValueError: array shapes do not match, or a number is out of range.

    A pair of cosine 1 with a higher score than a pair of cosine 0 gives log(1 + exp(-1)):

    >>> a, b = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.eye(2)
    >>> print(f"{cosent(a, b, jnp.array([5.0, 2.0]), temperature=1.0):.4f}")
    0.3133
    """
    check_rows(a, b=b)
    check_rows(a, 1, score=score, valid=valid)
    check_positive(temperature=temperature)
    valid = jnp.ones(a.shape[0], bool) if valid is None else valid
    a, b = zero_where_invalid(a, valid), zero_where_invalid(b, valid)
    matryoshka = prefixes(a.shape[1], dims, weights)
    cosines = [(unit(a[:, :dim]) * unit(b[:, :dim])).sum(-1) for dim, _ in matryoshka]
    cosines, score, valid = all_gather_rows((cosines, score, valid), axis_name)

    wrong_if_higher = (score[:, None] < score[None]) & valid[:, None] & valid[None]
    total = jnp.zeros((), jnp.float32)
    for cosine, (_, weight) in zip(cosines, matryoshka, strict=True):
        excess = (cosine[:, None] - cosine[None]) / temperature
        total += weight * jax.nn.softplus(jax.nn.logsumexp(jnp.where(wrong_if_higher, excess, NEVER)))
    return total if axis_name is None else total / jax.lax.axis_size(axis_name)

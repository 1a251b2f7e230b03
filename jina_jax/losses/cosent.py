"""CoSENT: a ranking loss over the cosines of graded pairs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from .matryoshka import prefixes, unit
from .rows import AxisName, all_gather_rows, check_positive, check_rows, zero_where_invalid

NEVER = np.finfo(np.float32).min
"""Exponent of a pair that is in order. Finite: a row of -inf alone would have NaN gradients."""


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

    Returns:
        This shard's share of the loss, a float32 scalar.

    Raises:
        ValueError: arrays whose shapes do not fit one another, or a number out of range.

    A pair of cosine 1 above one of cosine 0, as the scores ask, log(1 + exp(-1)):

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

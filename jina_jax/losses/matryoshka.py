"""Matryoshka representation learning (Kusupati et al., 2022): a loss summed over prefixes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

SMALLEST_SQUARE = 1e-24
"""Squared norm up to which a vector counts as zero: its direction's gradient would overflow."""


def prefixes(d: int, dims: tuple[int, ...] | None, weights: Sequence[float] | None) -> list[tuple[int, float]]:
    """Returns (dimensions, weight) of each prefix of embeddings of width d.

    Raises:
        ValueError: no dims, one that is not in 1..d, or not one weight for each.

    >>> prefixes(8, (2, 8), None)
    [(2, 1.0), (8, 1.0)]
    """
    dims = (d,) if dims is None else dims
    if not dims or min(dims) < 1 or max(dims) > d:
        raise ValueError(f"dims are {dims}, should be one or more numbers from 1 to {d}")
    weights = (1.0,) * len(dims) if weights is None else weights
    if len(weights) != len(dims):
        raise ValueError(f"weights are {weights}, should be {len(dims)} for dims {dims}")
    return list(zip(dims, weights, strict=True))


def unit_prefix(x: Array, dim: Array) -> Array:
    """Normalises the first `dim` elements of the last axis, and sets the rest to zero."""
    return unit(jnp.where(jnp.arange(x.shape[-1]) < dim, x, 0))


def unit(x: Array) -> Array:
    """Normalises the last axis; a zero vector stays zero and gets no gradient."""
    square = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square > SMALLEST_SQUARE, square, jnp.inf))

"""Rotary position embeddings ("rotate half")."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int


class RotaryTables(NamedTuple):
    """Cosines and sines of each token's rotary angles, in float32."""

    cos: Float[Array, "b t h_half"]
    sin: Float[Array, "b t h_half"]


def rotary_tables(positions: Int[Array, "b t"], head_dim: int, theta: float) -> RotaryTables:
    """Cosines and sines of the angles position / theta^(2i / h).

    In float32 throughout: bfloat16 cannot tell position 257 from 256.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(theta) ** exponents
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return RotaryTables(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "b t n h"], tables: RotaryTables | None) -> Float[Array, "b t n h"]:
    """Rotates the two halves of each head by the token's angles; without tables returns x."""
    if tables is None:
        return x
    cos, sin = tables.cos[:, :, None], tables.sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def rotated_heads(qkv: Array, tables: RotaryTables | None, n: int) -> tuple[Array, Array, Array]:
    """Returns q (scaled, rotated), k (rotated) and v, each [b, t, n, h]."""
    _, b, t, d = qkv.shape
    q, k, v = qkv.reshape(3, b, t, n, d // n)
    q, k = rotate(q, tables), rotate(k, tables)
    return (q * (d // n) ** -0.5).astype(q.dtype), k, v

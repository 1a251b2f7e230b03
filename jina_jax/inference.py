"""The compiled programs of the embedder: packed rows to token states, and to one vector for each text."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from .model import Encoder, pool
from .packing import max_texts


@jax.jit
def encode_rows(
    encoder: Encoder,
    tokens: Int[Array, "b t"],
    segments: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    tasks: Int[Array, "b g"] | Int[Array, ""] | None,
) -> Float[Array, "b t d"]:
    """Token states of packed rows, compiled once for each shape."""
    return _run(encoder, tokens, segments, positions, tasks)


@jax.jit
def embed_rows(
    encoder: Encoder,
    tokens: Int[Array, "b t"],
    segments: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    tasks: Int[Array, "b g"] | Int[Array, ""] | None,
) -> Float[Array, "b g d"]:
    """Mean of each text of packed rows, before normalisation, compiled once for each shape."""
    states = _run(encoder, tokens, segments, positions, tasks)
    return pool(states, segments, max_texts(tokens.shape[1]))


def _run(encoder: Encoder, *inputs: Any) -> Array:
    if encoder.dtype != jnp.bfloat16 or jax.default_backend() != "cpu":
        return encoder(*inputs)
    # XLA's CPU backend turns a bfloat16 array that is sliced in a loop into float32 first: a copy of all layers, at each call.
    # Their bits as integers it leaves alone. For inference only: there is no gradient through this.
    encoder.layers = jax.tree.map(lambda x: _cast_bits(x, jnp.bfloat16, jnp.uint16), encoder.layers)
    return encoder(*inputs, gather=partial(jax.tree.map, lambda x: _cast_bits(x, jnp.uint16, jnp.bfloat16)))


def _cast_bits(x: Array, old: DTypeLike, new: DTypeLike) -> Array:
    return jax.lax.bitcast_convert_type(x, new) if x.dtype == old else x

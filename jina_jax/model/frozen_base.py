"""Layers of a frozen base with one adapter folded into their kernels, for training that adapter.

    y = x @ W' + bias,  W' = kernel + scale a b

The matmul is the base model's. Its gradient has no part of the kernel's size: with dy that of y,

    dx = dy W'^T    da = scale x^T (dy b^T)    db = scale (x a)^T dy

which are those of the mixed form (`lora.py`), where W' is exact. Section 2.2 of the
jina-embeddings-v3 paper.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, UInt

from .encoder import Encoder, Layer
from .lora import AdaptedDense, AdapterIds, AdapterParam
from .matmul import add_bias, matmul_folded

DENSE = ("qkv", "out", "up", "down")
"""Modules of a layer that have adapters."""


class FoldedDense(nnx.Module):
    """Dense layer of a frozen kernel with one adapter folded in.

    kernel [i, *o] holds the adapter; a [i, cr] and b [cr, *o] are the adapter's, for the gradient.
    cr is the rank, or three times that where q, k and v have a down-projection each.
    """

    def __init__(self, dense: AdaptedDense, adapter: int, dtype: DTypeLike):
        self.dtype = dtype
        self.bias = dense.bias
        a, b = dense.adapter(adapter)
        self.a, self.b = AdapterParam(a), AdapterParam(b)
        self.kernel = nnx.Param(jax.lax.stop_gradient(folded_kernel(dense.kernel[...], a, b, dtype)))

    def __call__(self, x: Float[Array, "b t i"], adapter_ids: AdapterIds = None) -> Float[Array, "b t *o"]:
        """Applies the layer; the adapter is the folded one, whatever `adapter_ids` says."""
        y = matmul_folded(x, self.kernel[...], self.a[...], self.b[...])
        bias = self.bias[...].astype(jnp.float32)
        return add_bias(y, bias, self.dtype) if bias.ndim > 1 else (y + bias[None, None]).astype(self.dtype)


def fold_layer(layer: Layer, adapter: int, dtype: DTypeLike) -> Layer:
    """Returns a layer with one of its adapters folded in.

    Args:
        layer: one layer, its kernels complete.
        adapter: index of the adapter.
        dtype: of the folded kernels, the compute dtype.
    """
    folded = nnx.merge(*nnx.split(layer))
    for name in DENSE:
        setattr(folded, name, FoldedDense(getattr(layer, name), adapter, dtype))
    return folded


def fold_layers(encoder: Encoder, adapter: int) -> Encoder:
    """Returns an encoder with one of its adapters folded into its layers, for a gradient.

    The embedding tables stay unchanged; their adapter is computed beside them.
    """
    folded = nnx.merge(*nnx.split(encoder))
    # One layer at a time: its kernels are in float32 meanwhile.
    folded.layers = jax.lax.map(lambda layer: fold_layer(layer, adapter, encoder.dtype), encoder.stacked_layers)
    return folded


def folded_kernel(kernel: Array, a: Float[Array, "i cr"], b: Float[Array, "cr *o"], dtype: DTypeLike) -> Array:
    """Returns kernel + a b in `dtype`; in bfloat16 the update is rounded without bias.

    An update is often smaller than half a step of a bfloat16 kernel's grid, and would be rounded
    away. Here each element takes the next step with the probability that makes its mean exact, by
    numbers that depend on the element's place alone. Without an update the kernel is that of the
    base, exactly.
    """
    update = jnp.einsum(
        "ir,rp->ip",
        a.astype(jnp.float32),
        b.reshape(b.shape[0], -1).astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    ).reshape(kernel.shape)
    if jnp.dtype(dtype) != jnp.bfloat16:
        return (kernel.astype(jnp.float32) + update).astype(dtype)
    base = kernel.astype(dtype)
    bits = jax.lax.bitcast_convert_type(base.astype(jnp.float32) + update, jnp.uint32)
    noise = _noise(kernel.shape, jax.lax.bitcast_convert_type(base[(0,) * base.ndim], jnp.uint16).astype(jnp.uint32))
    rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(rounded, jnp.float32).astype(dtype)


def _noise(shape: tuple[int, ...], seed: Array) -> UInt[Array, "..."]:
    """Hashes of the places of an array, evenly spread over 16 bits (Murmur3's last step)."""
    place = seed * jnp.uint32(0x9E3779B1)
    size = 1
    for axis in reversed(range(len(shape))):
        place = place + size * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        size *= shape[axis]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        place = (place ^ (place >> shift)) * jnp.uint32(factor)
    return (place ^ (place >> 16)) & jnp.uint32(0xFFFF)

"""GELU and LayerNorm."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float


def gelu(x: Array) -> Array:
    """Exact GELU in float32.

    Written with erf: `jax.nn.gelu(approximate=False)` goes through erfc, far slower on TPU.
    """
    x = x.astype(jnp.float32)
    return 0.5 * x * (1 + jax.lax.erf(x * np.float32(0.5**0.5)))


class DeferredLayerNorm(NamedTuple):
    """LayerNorm that has its statistics and is applied by the code that reads it.

    Between two layers this saves TPUs a pass over the states: the statistics are sums that the
    preceding matmul accumulates, and the rest is computed as the following matmuls load their
    operand. The reader also has the full gradient, including that through the statistics, so a
    layer that is rematerialised for the gradient stops before its last matmul, whose result the
    reader has.
    """

    x: Float[Array, "*b d"]
    mean: Float[Array, "*b 1"]
    factor: Float[Array, "*b 1"]
    scale: Float[Array, " d"]
    bias: Float[Array, " d"]
    inverse_dim: Float[Array, ""]
    """Weight of one element in its row's mean: 1 / d, or 0 for the identity."""

    @classmethod
    def identity(cls, x: Float[Array, "*b d"]) -> "DeferredLayerNorm":
        """Normalisation that does nothing: `value` is x in float32."""
        one, d = jnp.ones((*x.shape[:-1], 1), jnp.float32), x.shape[-1]
        return cls(x, 0 * one, one, jnp.ones(d, jnp.float32), jnp.zeros(d, jnp.float32), jnp.zeros((), jnp.float32))

    def value(self) -> Float[Array, "*b d"]:
        """Applies the normalisation; returns float32, of which the gradient is rounded to x's
        dtype."""
        return _normalise(self)


@jax.custom_vjp
def _normalise(normalised: DeferredLayerNorm) -> Array:
    x, mean, factor, scale, bias, _ = normalised
    scale, bias = (array.reshape((1,) * (x.ndim - 1) + (-1,)) for array in (scale, bias))
    return (x.astype(jnp.float32) - mean) * (factor * scale) + bias


def _normalise_forward(normalised: DeferredLayerNorm) -> tuple[Array, DeferredLayerNorm]:
    return _normalise(normalised), normalised


def _normalise_backward(normalised: DeferredLayerNorm, d_y: Array) -> tuple[DeferredLayerNorm]:
    x, mean, factor, scale, _, inverse_dim = normalised
    every_row = tuple(range(x.ndim - 1))

    def unit_and_gradient(d_y: Array) -> tuple[Array, Array]:
        unit = (x.astype(jnp.float32) - mean) * factor
        return unit, d_y.astype(jnp.float32) * scale.reshape((1,) * len(every_row) + (-1,))

    # The value is read in x's dtype, so its gradient is no finer. The barrier keeps TPUs from
    # writing it in float32: the preceding matmul accumulates the sums, and the rest is one pass.
    d_y = d_y.astype(x.dtype)
    unit, d_unit = unit_and_gradient(d_y)
    sums = d_unit.sum(-1, keepdims=True), (d_unit * unit).sum(-1, keepdims=True)
    d_y, (total, along_unit) = jax.lax.optimization_barrier((d_y, sums))
    unit, d_unit = unit_and_gradient(d_y)
    d_x = factor * (d_unit - inverse_dim * (total + unit * along_unit))
    nothing = jnp.zeros_like(mean)
    d_y = d_y.astype(jnp.float32)
    d_scale, d_bias = (d_y * unit).sum(every_row), d_y.sum(every_row)
    return (DeferredLayerNorm(d_x.astype(x.dtype), nothing, nothing, d_scale, d_bias, jnp.zeros_like(inverse_dim)),)


_normalise.defvjp(_normalise_forward, _normalise_backward)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis.

    Its statistics are float32, from one pass over x: E[x^2] - E[x]^2, clamped at 0.
    """

    def __init__(self, features: int, *, epsilon: float, param_dtype: DTypeLike):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalises x; returns float32."""
        return self.deferred(x).value()

    def deferred(self, x: Float[Array, "*b d"]) -> DeferredLayerNorm:
        """Computes the statistics, and leaves the normalisation to the reader."""
        # The gradient of the value includes that of the statistics.
        y = jax.lax.stop_gradient(x.astype(jnp.float32))
        mean = y.mean(-1, keepdims=True)
        variance = jnp.maximum(jnp.square(y).mean(-1, keepdims=True) - jnp.square(mean), 0)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return DeferredLayerNorm(x, mean, jax.lax.rsqrt(variance + self.epsilon), scale, bias, jnp.float32(1 / x.shape[-1]))

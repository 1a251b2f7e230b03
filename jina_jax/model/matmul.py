"""Matrix products in the compute dtype with float32 accumulation, and gradients that keep it."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from .device import platform


def einsum(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision:
    """Matmul precision for a dtype; float32 is multiplied in float32.

    JAX's default for it is a bfloat16 pass on TPU and TF32 on recent GPUs.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def matmul(x: Array, kernel: Array) -> Array:
    """Multiplies x [..., i] by kernel [i, ...] in x's dtype; accumulates and returns float32.

    The matmuls of the backward pass are in x's dtype too: left to JAX, they would have a float32
    operand, which GPUs and CPUs multiply at a fraction of the speed. The kernel's gradient is
    accumulated in float32 and has the kernel's dtype.
    """
    return _matmul(x, kernel, 0)


def matmul_transposed(x: Array, table: Array) -> Array:
    """Multiplies x [..., i] by the transpose of table [o, i], like `matmul`.

    Neither the table nor its gradient is transposed.
    """
    return _matmul(x, table, 1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: Array, kernel: Array, axis: int) -> Array:
    return _dot(x, kernel.astype(x.dtype), (x.ndim - 1,), (axis,))


def _matmul_forward(x: Array, kernel: Array, axis: int) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(x, kernel, axis), (x, kernel)


def _matmul_backward(axis: int, operands: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, kernel = operands
    d_y, batch, outputs = d_y.astype(x.dtype), tuple(range(x.ndim - 1)), tuple(range(x.ndim - 1, d_y.ndim))
    operand = kernel.astype(x.dtype)
    if axis == 0:
        # TPUs are slow at a transposed kernel that still has to be sliced from the stack of layers.
        operand = jax.lax.optimization_barrier(operand)
    d_x = _dot(d_y, operand, outputs, tuple(i for i in range(kernel.ndim) if i != axis))
    d_kernel = _dot(x, d_y, batch, batch) if axis == 0 else _dot(d_y, x, batch, batch)
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


FEW_TOKENS = 4096
"""Tokens of a call up to which two matmuls cost less than the copy of a kernel (TPU v5e, by the
compiler's estimate: 1.15 to 1.29 of the kernel alone, the joined form 2.1 to 1.5)."""


@jax.custom_vjp
def matmul_with_lora(x: Array, z: Array, kernel: Array, rows: Array) -> Array:
    """Computes x @ kernel + z @ rows: for many tokens as one matmul over joined arrays, for few of
    them, and on CPU, as two, which copy no kernel.

    With a gradient it is one matmul. The gradients of kernel and rows are separate: where the
    kernel is frozen, nothing uses its gradient, a third of the work, and it is left out. The
    gradient of their concatenation would have to be computed in full.
    """
    if platform() == "cpu" or math.prod(x.shape[:-1]) <= FEW_TOKENS:
        last = (x.ndim - 1,)
        return _dot(x, kernel.astype(x.dtype), last, (0,)) + _dot(z, rows.astype(x.dtype), last, (0,))
    return _dot(*_joined(x, z, kernel, rows), (x.ndim - 1,), (0,))


def _joined(x: Array, z: Array, kernel: Array, rows: Array) -> tuple[Array, Array]:
    return jnp.concatenate([x, z], -1), jnp.concatenate([kernel, rows]).astype(x.dtype)


def _matmul_with_lora_forward(*operands: Array) -> tuple[Array, tuple[Array, ...]]:
    x, z, kernel, rows = operands
    return _dot(*_joined(x, z, kernel, rows), (x.ndim - 1,), (0,)), operands


def _matmul_with_lora_backward(operands: tuple[Array, ...], d_y: Array) -> tuple[Array, ...]:
    x, z, kernel, rows = operands
    xz, both = _joined(x, z, kernel, rows)
    d_xz, _ = _matmul_backward(0, (xz, both), d_y)
    (_, d_kernel), (_, d_rows) = (_matmul_backward(0, pair, d_y) for pair in ((x, kernel), (z, rows)))
    return d_xz[..., : x.shape[-1]], d_xz[..., x.shape[-1] :], d_kernel, d_rows


matmul_with_lora.defvjp(_matmul_with_lora_forward, _matmul_with_lora_backward)


@jax.custom_vjp
def matmul_folded(x: Array, folded: Array, a: Array, b: Array) -> Array:
    """Computes x @ folded, where `folded` is a frozen kernel plus a b; accumulates in float32.

    The gradient goes to x, a and b, by matmuls in x's dtype, and none has the kernel's size.
    """
    return _dot(x, folded.astype(x.dtype), (x.ndim - 1,), (0,))


def _matmul_folded_forward(x: Array, folded: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    return matmul_folded(x, folded, a, b), (x, folded, a, b)


def _matmul_folded_backward(operands: tuple[Array, ...], d_y: Array) -> tuple[Array, None, Array, Array]:
    x, folded, a, b = operands
    last, batch = (x.ndim - 1,), tuple(range(x.ndim - 1))
    outputs, kernel_outputs = tuple(range(x.ndim - 1, d_y.ndim)), tuple(range(1, folded.ndim))
    d_y = d_y.astype(x.dtype)
    d_x = _dot(d_y, folded.astype(x.dtype), outputs, kernel_outputs)
    z = _dot(x, a.astype(x.dtype), last, (0,)).astype(x.dtype)
    d_z = _dot(d_y, b.astype(x.dtype), outputs, kernel_outputs).astype(x.dtype)
    return d_x.astype(x.dtype), None, _dot(x, d_z, batch, batch).astype(a.dtype), _dot(z, d_y, batch, batch).astype(b.dtype)


matmul_folded.defvjp(_matmul_folded_forward, _matmul_folded_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_bias(y: Array, bias: Array, dtype: DTypeLike) -> Array:
    """Adds bias [*o] to y [b, t, *o]; returns `dtype`.

    For a y whose gradient comes from a kernel, and not from a matmul that could sum it on the way.
    The bias's gradient is a matmul with ones, accumulated in float32: on a TPU the matrix unit is
    the fastest at this sum.
    """
    return (y + bias[None, None]).astype(dtype)


def _add_bias_forward(y: Array, bias: Array, dtype: DTypeLike) -> tuple[Array, None]:
    return add_bias(y, bias, dtype), None


def _add_bias_backward(dtype: DTypeLike, _: None, d_y: Array) -> tuple[Array, Array]:
    # A tile of equal rows: the compiler would turn a matmul with one row back into a sum.
    ones = jnp.ones((8, *d_y.shape[:2]), d_y.dtype)
    return d_y.astype(jnp.float32), _dot(ones, d_y, (1, 2), (0, 1))[0]


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def _dot(x: Array, y: Array, x_axes: tuple[int, ...], y_axes: tuple[int, ...]) -> Array:
    return jax.lax.dot_general(
        x, y, ((x_axes, y_axes), ((), ())), precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32
    )

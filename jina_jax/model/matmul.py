"""Matrix products in the compute dtype with float32 accumulation, and the gradients that keep them so."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def einsum(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision:
    """float32 means float32: the default is a bfloat16 pass on TPU and TF32 on recent GPUs."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def matmul(x: Array, kernel: Array) -> Array:
    """x [..., i] times kernel [i, ...] in x's dtype, with float32 accumulation and a float32 result.

    The backward products are of x's dtype too: left to JAX, they would have a float32 operand, which GPUs and CPUs multiply at
    a fraction of the speed. The kernel's gradient is accumulated in float32 and has the kernel's own dtype.
    """
    return _matmul(x, kernel, 0)


def matmul_transposed(x: Array, table: Array) -> Array:
    """x [..., i] times the transpose of table [o, i], as `matmul`; neither the table nor its gradient is transposed."""
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
    if axis == 0:  # TPUs are slow at a transposed kernel that is still to be cut out of the stack of all layers
        operand = jax.lax.optimization_barrier(operand)
    d_x = _dot(d_y, operand, outputs, tuple(i for i in range(kernel.ndim) if i != axis))
    d_kernel = _dot(x, d_y, batch, batch) if axis == 0 else _dot(d_y, x, batch, batch)
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def matmul_with_lora(x: Array, z: Array, kernel: Array, rows: Array) -> Array:
    """x times kernel plus z times rows, as one product. Its gradient has the two apart: where the kernel is frozen, its part, a
    third of the work, is asked for by nobody and left out. Of their concatenation all would have to be made."""
    return _dot(*_joined(x, z, kernel, rows), (x.ndim - 1,), (0,))


def _joined(x: Array, z: Array, kernel: Array, rows: Array) -> tuple[Array, Array]:
    return jnp.concatenate([x, z], -1), jnp.concatenate([kernel, rows]).astype(x.dtype)


def _matmul_with_lora_forward(*operands: Array) -> tuple[Array, tuple[Array, ...]]:
    return matmul_with_lora(*operands), operands


def _matmul_with_lora_backward(operands: tuple[Array, ...], d_y: Array) -> tuple[Array, ...]:
    x, z, kernel, rows = operands
    xz, both = _joined(x, z, kernel, rows)
    d_xz, _ = _matmul_backward(0, (xz, both), d_y)
    (_, d_kernel), (_, d_rows) = (_matmul_backward(0, pair, d_y) for pair in ((x, kernel), (z, rows)))
    return d_xz[..., : x.shape[-1]], d_xz[..., x.shape[-1] :], d_kernel, d_rows


matmul_with_lora.defvjp(_matmul_with_lora_forward, _matmul_with_lora_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_bias(y: Array, bias: Array, dtype: DTypeLike) -> Array:
    """y [b, t, *o] + bias [*o] in `dtype`, where the gradient of y comes from a kernel and not from a product that could add it
    up. The bias's gradient is a product with ones, accumulated in float32: the matrix unit is the fastest to do it on a TPU."""
    return (y + bias[None, None]).astype(dtype)


def _add_bias_forward(y: Array, bias: Array, dtype: DTypeLike) -> tuple[Array, None]:
    return add_bias(y, bias, dtype), None


def _add_bias_backward(dtype: DTypeLike, _: None, d_y: Array) -> tuple[Array, Array]:
    ones = jnp.ones((8, *d_y.shape[:2]), d_y.dtype)  # a tile of equal rows: of one row, the compiler makes a sum again
    return d_y.astype(jnp.float32), _dot(ones, d_y, (1, 2), (0, 1))[0]


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def _dot(x: Array, y: Array, x_axes: tuple[int, ...], y_axes: tuple[int, ...]) -> Array:
    return jax.lax.dot_general(
        x, y, ((x_axes, y_axes), ((), ())), precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32
    )

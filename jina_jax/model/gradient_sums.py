"""Parameters whose gradient is added up in place while a loop goes over chunks of a batch.

Left to itself, JAX makes every chunk a gradient of its own of all parameters, and then adds it to the sum: all numbers of the
model are written once more, and read twice more, for each chunk. Here a parameter comes with its *sum*: an array of its shape
that passes through the loops unread, and whose gradient is the sum so far. Each function gives what is asked of the parameter,
and the sum to go on with; in the gradient it adds what it got to where it belongs, as the product that made it writes it.

    y, total = part(x[i], total, i)     # as y = x[i], with the gradient of x arriving at `total`

The parameter has no gradient of its own: let the sum begin as the parameter, and differentiate by that.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


@jax.custom_vjp
def whole(x: Float[Array, "..."], total: Float[Array, "..."]) -> tuple[Array, Array]:
    """x itself."""
    return x, total


def _whole_forward(x: Array, total: Array) -> tuple[tuple[Array, Array], None]:
    return (x, total), None


def _whole_backward(_: None, gradients: tuple[Array, Array]) -> tuple[None, Array]:
    own, total = gradients
    return None, total + own


whole.defvjp(_whole_forward, _whole_backward)


@jax.custom_vjp
def part(x_i: Float[Array, "..."], total: Float[Array, "n ..."], i: Int[Array, ""]) -> tuple[Array, Array]:
    """x[i], which the caller has: what a scan over x hands out."""
    return x_i, total


def _part_forward(x_i: Array, total: Array, i: Array) -> tuple[tuple[Array, Array], Array]:
    return (x_i, total), i


def _part_backward(i: Array, gradients: tuple[Array, Array]) -> tuple[None, Array, None]:
    own, total = gradients
    return None, jax.lax.dynamic_update_index_in_dim(total, total[i] + own, i, axis=0), None


part.defvjp(_part_forward, _part_backward)


@jax.custom_vjp
def rows(x: Float[Array, "n d"], total: Float[Array, "n d"], indices: Int[Array, "..."]) -> tuple[Array, Array]:
    """x[indices] in the dtype of the sum; an index may come more than once."""
    return jnp.take(x, indices, axis=0).astype(total.dtype), total


def _rows_forward(x: Array, total: Array, indices: Array) -> tuple[tuple[Array, Array], Array]:
    return rows(x, total, indices), indices


def _rows_backward(indices: Array, gradients: tuple[Array, Array]) -> tuple[None, Array, None]:
    own, total = gradients
    return None, total.at[indices].add(own), None


rows.defvjp(_rows_forward, _rows_backward)

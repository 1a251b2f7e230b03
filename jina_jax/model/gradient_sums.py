"""Gradient accumulation in place: parameters whose gradient is added up while a loop goes over chunks of a batch.

Left to itself, JAX makes every chunk a gradient of its own of all parameters, and then adds it to the sum: all numbers of the
model are written once more, and read twice more, for each chunk. Here a parameter comes with its *sum*: an array of its shape
that passes through the loops unread, and whose gradient is the sum so far. Each function gives what is asked of the parameter,
and the sum to go on with; in the gradient it adds what it got to where it belongs, as the product that made it writes it.

    y, total = track_slice(x[i], total, i)     # as y = x[i], with the gradient of x arriving at `total`

The parameter has no gradient of its own: let the sum begin as the parameter, and differentiate by that.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


@jax.custom_vjp
def track(x: Float[Array, "..."], total: Float[Array, "..."]) -> tuple[Array, Array]:
    """x itself."""
    return x, total


def _track_forward(x: Array, total: Array) -> tuple[tuple[Array, Array], None]:
    return (x, total), None


def _track_backward(_: None, gradients: tuple[Array, Array]) -> tuple[None, Array]:
    own, total = gradients
    return None, total + own


track.defvjp(_track_forward, _track_backward)


@jax.custom_vjp
def track_slice(x_i: Float[Array, "..."], total: Float[Array, "n ..."], i: Int[Array, ""]) -> tuple[Array, Array]:
    """x[i], which the caller has: what a scan over x hands out."""
    return x_i, total


def _track_slice_forward(x_i: Array, total: Array, i: Array) -> tuple[tuple[Array, Array], Array]:
    return (x_i, total), i


def _track_slice_backward(i: Array, gradients: tuple[Array, Array]) -> tuple[None, Array, None]:
    own, total = gradients
    return None, jax.lax.dynamic_update_index_in_dim(total, total[i] + own, i, axis=0), None


track_slice.defvjp(_track_slice_forward, _track_slice_backward)


@jax.custom_vjp
def track_gather(x: Float[Array, "n d"], total: Float[Array, "n d"], indices: Int[Array, "..."]) -> tuple[Array, Array]:
    """x[indices] in the dtype of the sum; an index may come more than once."""
    return jnp.take(x, indices, axis=0).astype(total.dtype), total


def _track_gather_forward(x: Array, total: Array, indices: Array) -> tuple[tuple[Array, Array], Array]:
    return track_gather(x, total, indices), indices


def _track_gather_backward(indices: Array, gradients: tuple[Array, Array]) -> tuple[None, Array, None]:
    own, total = gradients
    return None, total.at[indices].add(own), None


track_gather.defvjp(_track_gather_forward, _track_gather_backward)

"""Gradient accumulation in place, in a loop over the chunks of a batch.

By default JAX computes a separate gradient of all parameters for every chunk and then adds it to
the sum: for each chunk, all elements of the model are written once more and read twice more. Here
a parameter comes with its *sum*: an array of its shape that passes through the loops unread, and
whose gradient is the sum so far. Each function returns the requested elements of the parameter, and
the sum to pass on. Its backward pass adds the incoming gradient to the sum at the right place, as
the matmul that computes the gradient writes it.

    y, total = track_slice(x[i], total, i)  # y = x[i]; the gradient of x arrives at `total`

The parameter itself gets no gradient: pass the parameter as the first sum, and differentiate with
respect to that sum.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


@jax.custom_vjp
def track(x: Float[Array, "..."], total: Float[Array, "..."]) -> tuple[Array, Array]:
    """Returns x and its sum; the gradient of x is added to the sum."""
    return x, total


def _track_forward(x: Array, total: Array) -> tuple[tuple[Array, Array], None]:
    return (x, total), None


def _track_backward(_: None, gradients: tuple[Array, Array]) -> tuple[None, Array]:
    own, total = gradients
    return None, total + own


track.defvjp(_track_forward, _track_backward)


@jax.custom_vjp
def track_slice(x_i: Float[Array, "..."], total: Float[Array, "n ..."], i: Int[Array, ""]) -> tuple[Array, Array]:
    """Returns x[i], which the caller passes as `x_i` (a scan over x yields it), and the sum."""
    return x_i, total


def _track_slice_forward(x_i: Array, total: Array, i: Array) -> tuple[tuple[Array, Array], Array]:
    return (x_i, total), i


def _track_slice_backward(i: Array, gradients: tuple[Array, Array]) -> tuple[None, Array, None]:
    own, total = gradients
    return None, jax.lax.dynamic_update_index_in_dim(total, total[i] + own, i, axis=0), None


track_slice.defvjp(_track_slice_forward, _track_slice_backward)


@jax.custom_vjp
def track_gather(x: Float[Array, "n d"], total: Float[Array, "n d"], indices: Int[Array, "..."]) -> tuple[Array, Array]:
    """Returns x[indices] in the dtype of the sum, and the sum; an index may occur repeatedly."""
    return jnp.take(x, indices, axis=0).astype(total.dtype), total


def _track_gather_forward(x: Array, total: Array, indices: Array) -> tuple[tuple[Array, Array], Array]:
    return track_gather(x, total, indices), indices


def _track_gather_backward(indices: Array, gradients: tuple[Array, Array]) -> tuple[None, Array, None]:
    own, total = gradients
    return None, total.at[indices].add(own), None


track_gather.defvjp(_track_gather_forward, _track_gather_backward)

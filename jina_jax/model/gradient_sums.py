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

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from ..config import Remat
from .encoder import Encoder, Gather
from .layers import DeferredLayerNorm


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


class GradientSums(NamedTuple):
    """Sums of the large parameters of an encoder: its stacked layers and its embedding table."""

    layers: nnx.State
    table: Float[Array, "v d"] | None

    @classmethod
    def start(cls, encoder: Encoder, trained: type[nnx.Variable] = nnx.Variable) -> "GradientSums":
        """Returns the sums before the first chunk.

        Args:
            encoder: model to differentiate.
            trained: type of the parameters that have sums. Others have no gradient: a sum of them
                would pass through the loops for nothing, and TPU programs copy it in each layer.
        """
        table = encoder.tokens.table
        return cls(nnx.state(encoder.stacked_layers, trained), table[...] if isinstance(table, trained) else None)


def encode_accumulating(
    encoder: Encoder,
    sums: GradientSums,
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    adapter_ids: Int[Array, "b g"] | Int[Array, ""] | None = None,
    *,
    gather: Gather | None = None,
    remat: Remat = "none",
) -> tuple[Float[Array, "b t d"], GradientSums]:
    """Encodes one chunk of a batch; the gradients of the large parameters are added up in `sums`.

    Args:
        sums: of the chunk before; the first one's are `GradientSums.start(encoder, ...)`.

    The others are those of `Encoder.__call__`.

    Returns:
        Token states, and the sums for the next chunk.
    """
    apply = encoder.layer_function(segment_ids, positions, adapter_ids, gather, remat)
    table = encoder.tokens.table[...]
    if gather:
        table = table.astype(encoder.dtype)  # as it came from the other devices; XLA would write it out in float32
    rows, table_sum = (jnp.take(table, tokens, axis=0), None) if sums.table is None else track_gather(table, sums.table, tokens)
    summed = set(nnx.to_flat_state(sums.layers).paths)
    graphdef, tracked, others = nnx.split(encoder.stacked_layers, lambda path, _: path in summed, ...)

    def step(
        carry: tuple[DeferredLayerNorm, nnx.State], inputs: tuple[nnx.State, nnx.State, Array]
    ) -> tuple[tuple[DeferredLayerNorm, nnx.State], None]:
        (x, totals), (tracked, others, i) = carry, inputs
        leaves, structure = jax.tree.flatten(tracked)
        pairs = [track_slice(x_i, total, i) for x_i, total in zip(leaves, jax.tree.leaves(totals), strict=True)]
        tracked, totals = (jax.tree.unflatten(structure, column) for column in zip(*pairs, strict=True))
        return (apply(nnx.merge(graphdef, tracked, others), x), totals), None

    def apply_layers(first: DeferredLayerNorm) -> tuple[DeferredLayerNorm, nnx.State]:
        numbered = *jax.lax.stop_gradient((tracked, others)), jnp.arange(encoder.config.num_layers)
        carry, _ = jax.lax.scan(step, (first, sums.layers), numbered, unroll=encoder.config.unroll or 1)
        return carry

    states, layers = encoder.forward(rows.astype(jnp.float32), tokens, segment_ids, positions, adapter_ids, apply_layers)
    return states, GradientSums(layers, table_sum)

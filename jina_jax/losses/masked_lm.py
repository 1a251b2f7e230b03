"""MLM loss: cross-entropy over the vocabulary, with a gradient computed in the forward pass."""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ..model.matmul import matmul, matmul_transposed
from .batch_rows import AxisName, check_chunk, check_positive, map_chunks, split_rows


@runtime_checkable
class MaskedLMHead(Protocol):
    """MLM head between the encoder's states and the token table: a pytree with these two."""

    @property
    def bias(self) -> Any:
        """Bias of each vocabulary entry, an array or a variable [v]."""

    def transform(self, states: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns the states that are multiplied with the token table."""
        ...


@partial(jax.jit, static_argnames=("max_masked", "chunk", "axis_name"))
def masked_lm(
    states: Float[Array, "b t d"],
    labels: Int[Array, "b t"],
    embedding: Float[Array, "v d"],
    head: MaskedLMHead,
    *,
    max_masked: int,
    chunk: int | None = None,
    axis_name: AxisName = None,
    total: Int[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy of the masked tokens (section 4.1).

    Only masked positions are projected on the vocabulary. Where there are none, the loss and its
    gradient are zero.

    Args:
        states: token states of the encoder.
        labels: the original token of each masked position, -1 at all others.
        embedding: the token table.
        head: transform of the states before their product with the table, and bias of the logits.
        max_masked: number of positions that this shard computes, the first ones in the order of
            `labels`. Those beyond are ignored and do not count in the mean either.
        chunk: positions whose logits exist at a time. None = all.
        axis_name: the mean is over the masked tokens of all shards.
        total: number of masked tokens in the mean, where one call sees only some of them: the
            results of all calls add up to the mean.

    Returns:
        The loss, a float32 scalar. With `axis_name` it is the per-shard term: the terms of all
        shards add up to the global loss.

    Raises:
        ValueError: array shapes do not match, or a number is out of range.

    A head that changes nothing, and three words, two of them at right angles to the state:

    >>> from typing import NamedTuple
    >>> class Head(NamedTuple):
    ...     bias: Array
    ...     def transform(self, states):
    ...         return states
    >>> states, labels = jnp.eye(3)[None], jnp.array([[0, -1, -1]])
    >>> print(f"{masked_lm(states, labels, jnp.eye(3), Head(jnp.zeros(3)), max_masked=1):.4f}")
    0.5514
    """
    if labels.shape != states.shape[:2]:
        raise ValueError(f"labels are {labels.shape}, should be {states.shape[:2]}")
    if embedding.ndim != 2 or embedding.shape[1] != states.shape[2]:
        raise ValueError(f"embedding is {embedding.shape}, should be {('v', states.shape[2])}")
    check_positive(max_masked=max_masked)
    check_chunk(chunk)
    positions = jnp.nonzero(labels.reshape(-1) >= 0, size=max_masked, fill_value=labels.size)[0]
    states = jnp.take(states.reshape(-1, states.shape[2]), positions, axis=0, mode="fill", fill_value=0)
    labels = jnp.take(labels.reshape(-1), positions, mode="fill", fill_value=-1)

    count = (labels >= 0).sum()
    if total is not None:
        count = total
    elif axis_name is not None:
        count = jax.lax.psum(count, axis_name)
    # The weights in the mean are applied from the start, so that the gradients computed in the
    # forward pass are the final ones.
    shares = (labels >= 0) / jnp.maximum(count, 1).astype(jnp.float32)
    states, bias = head.transform(states[None])[0], head.bias[...].astype(jnp.float32)
    return _cross_entropy(states, jnp.maximum(labels, 0), shares, embedding, bias, chunk)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _cross_entropy(
    x: Float[Array, "n d"],
    targets: Int[Array, "n"],
    weight: Float[Array, "n"],
    table: Float[Array, "v d"],
    bias: Float[Array, "v"],
    chunk: int | None,
) -> Float[Array, ""]:
    """Sum over rows of weight * -log softmax(x . table + bias)[target]; no gradient of `weight`."""

    def log_sums(x: Array, weight: Array) -> Array:
        return weight * jax.nn.logsumexp(matmul_transposed(x, table) + bias[None], axis=1)

    own_logits = (x.astype(jnp.float32) * _table_rows(table, targets, x.dtype)).sum(-1) + jnp.take(bias, targets)
    return map_chunks(log_sums, (x, weight), chunk).sum() - (weight * own_logits).sum()


def _cross_entropy_forward(x: Array, targets: Array, weight: Array, table: Array, bias: Array, chunk: int | None):
    """Computes the loss, and its gradient while the logits of a chunk exist.

    A backward pass would have to recompute their matmul and exponentials. The factor `share` of a
    row multiplies its [d] elements and not its [v] exponentials, which are thus written only once.
    """

    def chunk_gradients(sums: tuple[Array, Array], rows: tuple[Array, Array]):
        (d_table, d_bias), (x, weight) = sums, rows
        logits = matmul_transposed(x, operand) + bias[None]
        highest = logits.max(-1, keepdims=True)
        powers = jnp.exp(logits - highest)
        total = powers.sum(-1, keepdims=True)
        share = weight[:, None] / total
        # Without the barrier every matmul recomputes them.
        powers = jax.lax.optimization_barrier(powers.astype(x.dtype))
        d_table += matmul(powers.T, (share * x).astype(x.dtype))
        # A tile of equal rows, as in `matmul.add_bias`.
        d_bias += matmul(jnp.broadcast_to(share.T, (8, len(x))).astype(x.dtype), powers)[0]
        value = weight * (highest + jnp.log(total))[:, 0]
        return (d_table, d_bias), (value, share * matmul(powers, operand))

    own, weighted = _table_rows(table, targets, x.dtype), weight[:, None] * x.astype(jnp.float32)
    d_table = jnp.zeros(table.shape, jnp.float32).at[targets].add(-weighted)
    d_bias = jnp.zeros(bias.shape, jnp.float32).at[targets].add(-weight)
    operand = table.astype(x.dtype)  # once, not in each chunk
    (d_table, d_bias), (values, d_x) = jax.lax.scan(chunk_gradients, (d_table, d_bias), split_rows((x, weight), chunk))
    value = values.sum() - (weighted * own).sum() - (weight * jnp.take(bias, targets)).sum()
    d_x = d_x.reshape(-1, x.shape[1])[: len(x)] - weight[:, None] * own
    return value, (d_x.astype(x.dtype), d_table.astype(table.dtype), d_bias)


def _cross_entropy_backward(chunk: int | None, gradients: tuple[Array, Array, Array], d_total: Array):
    d_x, d_table, d_bias = ((d_total * gradient).astype(gradient.dtype) for gradient in gradients)
    return d_x, None, None, d_table, d_bias


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _table_rows(table: Float[Array, "v d"], indices: Int[Array, "n"], dtype: DTypeLike) -> Float[Array, "n d"]:
    """Looks up rows of a table; returns float32, rounded as a matmul in `dtype` rounds them."""
    return jnp.take(table.astype(dtype), indices, axis=0).astype(jnp.float32)

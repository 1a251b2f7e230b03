"""Blockwise (flash) attention in XLA: an online softmax over blocks of keys.

Forward and backward take memory linear in t.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from .device import cpu_multiplies_bfloat16, platform
from .kernels.block_mask import ATTENTION_RESIDUALS, MASK_VALUE, block_ranges, bounds
from .matmul import einsum
from .rotary import RotaryTables, rotated_heads

KEYS_PER_BLOCK = 512
"""Approximate number of keys in a block."""

MAX_QUERIES_PER_BLOCK = 2048
"""Approximate number of queries in the largest block.

More queries mean fewer passes over the keys; the scores of such a block and a block of keys stay in
a CPU's cache.
"""


def blockwise_attention(
    qkv: Float[Array, "3 b t d"], segment_ids: Int[Array, "b t"], tables: RotaryTables | None, *, num_heads: int
) -> Float[Array, "b t d"]:
    """`plain_attention` in blocks of queries and keys, with an online softmax.

    Forward and backward take memory linear in t. Pairs of blocks without a common text are skipped.
    """
    t = segment_ids.shape[1]
    queries, keys = _block_sizes(t)
    padded = -t % queries
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded), (0, 0), (0, 0))).swapaxes(1, 2) for x in rotated_heads(qkv, tables, num_heads))
    # The added slots are a separate segment, so that the row's padding, too, comes out as in
    # `plain_attention`.
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padded)), constant_values=-1)
    form = _per_head if platform() == "cpu" else _batched
    out = form(q, k, v, segment_ids, *block_ranges(segment_ids, queries, keys), keys)
    return out.swapaxes(1, 2)[:, :t].astype(qkv.dtype).reshape(qkv.shape[1:])


def _block_sizes(t: int) -> tuple[int, int]:
    """Numbers of queries and of keys in a block.

    The queries are about a quarter of the row, because most of a long row is its longest text.
    """
    keys_of_queries = min(max(1, round(t / 4 / KEYS_PER_BLOCK)), MAX_QUERIES_PER_BLOCK // KEYS_PER_BLOCK)
    queries = -(-t // max(1, round(t / KEYS_PER_BLOCK / keys_of_queries)))
    queries += -queries % (8 * keys_of_queries)
    return queries, queries // keys_of_queries


def _per_head(q: Array, k: Array, v: Array, segment_ids: Array, first: Array, stop: Array, keys: int) -> Array:
    """Computes row by row and head by head, for CPUs.

    The data that the cores work on stays in their caches, and a row visits only the blocks of its
    texts. A CPU without instructions for bfloat16 multiplies float32 twice as fast.
    """
    if q.dtype == jnp.bfloat16 and not cpu_multiplies_bfloat16():
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))

    def attend_row(row: tuple[Array, ...]) -> Array:
        *heads, segment_ids, first, stop = row
        return jax.lax.map(lambda head: _blockwise(*head, segment_ids, first, stop, keys), tuple(heads))

    return jax.lax.map(attend_row, (q, k, v, segment_ids, first, stop))


def _batched(q: Array, k: Array, v: Array, segment_ids: Array, first: Array, stop: Array, keys: int) -> Array:
    """Computes all rows and heads in step, so that a block visits all that any row needs."""
    attend = partial(_blockwise, first=first.min(0), stop=stop.max(0), keys=keys)
    return jax.vmap(jax.vmap(attend, (0, 0, 0, None)))(q, k, v, segment_ids)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _blockwise(q: Array, k: Array, v: Array, segment_ids: Array, first: Array, stop: Array, keys: int) -> Array:
    """Attention of one head of one row, [t, h].

    `first` and `stop` bound the blocks of `keys` tokens that each block of queries visits.
    """
    return _blockwise_forward(q, k, v, segment_ids, first, stop, keys)[0]


def _blockwise_forward(q: Array, k: Array, v: Array, segment_ids: Array, first: Array, stop: Array, keys: int):
    """Online softmax (Milakov & Gimelshein 2018): every block of queries loops over key blocks."""
    k_blocks, v_blocks, key_segments = (_blocks(x, len(x) // keys) for x in (k, v, segment_ids))

    def attend_queries(block):
        q, query_segments, first, stop = block

        def visit(j, carry):
            row_max, row_sum, out = carry  # [t], [t], [t, h]
            scores = _scores(q, k_blocks[j], query_segments, key_segments[j])
            new = jnp.maximum(row_max, scores.max(-1))
            weights = jnp.exp(scores - new[:, None])
            decay = jnp.exp(row_max - new)
            row_sum = row_sum * decay + weights.sum(-1)
            out = out * decay[:, None] + einsum("ts,sh->th", weights.astype(v.dtype), v_blocks[j])
            return new, row_sum, out

        start = jnp.full(len(q), MASK_VALUE), jnp.zeros(len(q)), jnp.zeros(q.shape)
        row_max, row_sum, out = jax.lax.fori_loop(first, stop, visit, start)
        return (out / row_sum[:, None]).astype(q.dtype), row_max, row_sum

    out, *statistics = jax.lax.map(attend_queries, (_blocks(q, len(first)), _blocks(segment_ids, len(first)), first, stop))
    out, *statistics = (checkpoint_name(x, ATTENTION_RESIDUALS) for x in (out.reshape(q.shape), *statistics))
    return out, (q, k, v, segment_ids, first, stop, out, statistics)


def _blockwise_backward(keys: int, residuals, d_out: Array):
    """Recomputes the weights of block pairs from the saved maximum and sum (Dao et al. 2022).

    The weights are [s, t] and the gradient of q is [h, t], because XLA's matmuls on CPU are slow
    where the first operand has to be transposed.
    """
    q, k, v, segment_ids, first, stop, out, (row_max, row_sum) = residuals
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    q_blocks, d_out_blocks, query_segments, delta = (_blocks(x, len(first)) for x in (q, d_out, segment_ids, delta))
    k_blocks, v_blocks, key_segments = (_blocks(x, len(x) // keys) for x in (k, v, segment_ids))
    key_block = jnp.arange(len(key_segments))[:, None]
    visited = (first[None] <= key_block) & (key_block < stop[None])

    def key_gradients(d_q, block):
        k, v, key_segments, first, stop = block

        def visit(i, carry):
            d_q, d_k, d_v = carry
            weights = jnp.exp(_scores(k, q_blocks[i], key_segments, query_segments[i]) - row_max[i][None]) / row_sum[i][None]
            d_v += einsum("st,th->sh", weights.astype(v.dtype), d_out_blocks[i])
            d_weights = einsum("sh,th->st", v, d_out_blocks[i])
            d_scores = (weights * (d_weights - delta[i][None])).astype(q.dtype)
            d_k += einsum("st,th->sh", d_scores, q_blocks[i])
            d_q = d_q.at[i].add(einsum("sh,st->ht", k, d_scores))
            return d_q, d_k, d_v

        zero = jnp.zeros(k.shape, jnp.float32)
        d_q, d_k, d_v = jax.lax.fori_loop(first, stop, visit, (d_q, zero, zero))
        return d_q, (d_k, d_v)

    d_q = jnp.zeros_like(q_blocks.swapaxes(1, 2), jnp.float32)
    d_q, (d_k, d_v) = jax.lax.scan(key_gradients, d_q, (k_blocks, v_blocks, key_segments, *bounds(visited)))
    d_q = d_q.swapaxes(1, 2)
    return *(d.reshape(q.shape).astype(q.dtype) for d in (d_q, d_k, d_v)), None, None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _scores(q: Array, k: Array, query_segments: Array, key_segments: Array) -> Array:
    """Scores [t, s] of a block of queries and one of keys, or [s, t] with the two swapped."""
    return jnp.where(query_segments[:, None] == key_segments[None], einsum("th,sh->ts", q, k), MASK_VALUE)


def _blocks(x: Array, count: int) -> Array:
    """Splits [t, ...] into [count, t / count, ...]."""
    return x.reshape(count, -1, *x.shape[1:])

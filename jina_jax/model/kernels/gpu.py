"""Flash attention within the texts of packed rows, for GPUs, through Triton.

Forward and backward of rows of any length. As in Dao (2023), a program of the grid takes a block of
queries of one row and head, loops over the blocks of keys, and keeps the running maximum of the
scores, the sum of the weights and the weighted sum of the values. The backward pass recomputes the
weights from each query's maximum and sum, once for the gradient of the queries and once for that of
keys and values. The log of both in one number would be wrong for large scores.

The texts of a row lie one behind the other, so most blocks of keys have no text in common with a
block of queries. `block_ranges` says which ones may, and a program visits those alone: the work
grows with the lengths of the texts, not of the row.

Shape letters are those of `model/encoder.py`, and s for keys.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Float, Int

from ..matmul import matmul_precision
from .block_mask import ATTENTION_RESIDUALS, MASK_VALUE, block_ranges
from .tpu import LOG2_E

QUERIES, KEYS = 128, 64
"""Block sizes of the forward pass; the backward pass needs more registers and has KEYS by KEYS."""

SHORTEST = 16
"""Length of the shortest padded row: a Triton matmul needs 16 elements a side."""


def supports(qkv: Array, num_heads: int) -> bool:
    """True for a half-precision projection [3, b, t, d] with heads of 16, 32, 64 or 128 elements.

    In float32 the kernel is right as well, but its blocks do not fit into the registers.
    """
    return qkv.shape[3] // num_heads in (16, 32, 64, 128) and qkv.dtype in (jnp.bfloat16, jnp.float16)


def gpu_flash_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t n h"],
    v: Float[Array, "b t n h"],
    segment_ids: Int[Array, "b t"],
    *,
    interpret: bool = False,
) -> Float[Array, "b t n h"]:
    """Computes softmax(q k) v among tokens of equal segment.

    Args:
        q, k, v: heads; q and k rotated, and q scaled.
        segment_ids: 0 or above, in any order. Fastest where they ascend, with padding (0) at the
            end.
        interpret: runs on any backend, slowly, for tests.
    """
    t = segment_ids.shape[1]
    padded_length = pl.cdiv(t, QUERIES) * QUERIES if t > QUERIES else max(SHORTEST, pl.next_power_of_2(t))
    padding = ((0, 0), (0, padded_length - t))
    q, k, v = (jnp.pad(x, (*padding, (0, 0), (0, 0))) for x in (q, k, v))
    # The added slots are a separate segment, so that the row's padding, too, comes out as in
    # `plain_attention`.
    out: Array = _attend(q, k, v, jnp.pad(segment_ids, padding, constant_values=-1), interpret)
    return out[:, :t]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, segment_ids: Array, interpret: bool) -> Array:
    return _attend_forward(q, k, v, segment_ids, interpret)[0]


def _attend_forward(q: Array, k: Array, v: Array, segment_ids: Array, interpret: bool):
    size, others = min(QUERIES, q.shape[1]), min(KEYS, q.shape[1])
    of_queries = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    results = _run(_forward, size, others, segment_ids, (q,), (k, v), (q, of_queries, of_queries), interpret)
    out, row_max, row_sum = (checkpoint_name(x, ATTENTION_RESIDUALS) for x in results)
    return out, (q, k, v, segment_ids, out, row_max, row_sum)


def _attend_backward(interpret: bool, residuals: tuple, d_out: Array):
    q, k, v, segment_ids, out, row_max, row_sum = residuals
    size = min(KEYS, q.shape[1])
    # [b, n, t]
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    of_queries = q, d_out, row_max, 1 / row_sum, delta
    (d_q,) = _run(_backward_queries, size, size, segment_ids, of_queries, (k, v), (q,), interpret)
    d_k, d_v = _run(_backward_keys, size, size, segment_ids, (k, v), of_queries, (k, v), interpret)
    return d_q, d_k, d_v, np.zeros(segment_ids.shape, jax.dtypes.float0)


_attend.defvjp(_attend_forward, _attend_backward)


def _run(
    kernel,
    size: int,
    others: int,
    segment_ids: Array,
    own: tuple[Array, ...],
    visited: tuple[Array, ...],
    outputs: tuple,
    interpret: bool,
) -> tuple[Array, ...]:
    """Runs the kernel for each block of `size` tokens of a row and head.

    The kernel gets that block of the arrays `own`, and all of the arrays `visited`.
    """
    b, t = segment_ids.shape
    n = own[0].shape[2]

    def block(x) -> pl.BlockSpec:
        if x.ndim == 4:
            return pl.BlockSpec((None, size, None, x.shape[3]), lambda row, head, i: (row, i, head, 0))
        return pl.BlockSpec((None, None, size), lambda row, head, i: (row, head, i))

    def everything(x) -> pl.BlockSpec:
        if x.ndim == 4:
            return pl.BlockSpec((None, t, None, x.shape[3]), lambda row, head, i: (row, 0, head, 0))
        return pl.BlockSpec((None, None, t), lambda row, head, i: (row, head, 0))

    segments_spec = pl.BlockSpec((None, t), lambda row, head, i: (row, 0))
    ranges_spec = pl.BlockSpec((None, t // size), lambda row, head, i: (row, 0))
    call = pl.pallas_call(
        partial(kernel, size, others),
        name=f"attention{kernel.__name__}",
        grid=(b, n, t // size),
        in_specs=[ranges_spec, ranges_spec, segments_spec, *map(block, own), *map(everything, visited)],
        out_specs=[block(x) for x in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )
    return tuple(call(*block_ranges(segment_ids, size, others), segment_ids, *own, *visited))


# ---- the kernels


def _forward(
    size: int,
    others: int,
    first_ref,
    stop_ref,
    segments_ref,
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    row_max_ref,
    row_sum_ref,
) -> None:
    i = pl.program_id(2)
    q, query_segments = q_ref[...], segments_ref[pl.ds(i * size, size)]

    def visit(j, carry):
        row_max, row_sum, out = carry  # [t], [t], [t, h]
        block = pl.ds(j * others, others)
        scores = _scores(q, k_ref[block, :], query_segments, segments_ref[block])
        new = jnp.maximum(row_max, scores.max(-1))
        weights = jnp.exp2(scores - new[:, None])
        decay = jnp.exp2(row_max - new)
        v = v_ref[block, :]
        return new, row_sum * decay + weights.sum(-1), out * decay[:, None] + _dot(weights.astype(v.dtype), v)

    start = jnp.full(size, MASK_VALUE), jnp.zeros(size), jnp.zeros(q.shape, jnp.float32)
    row_max, row_sum, out = jax.lax.fori_loop(first_ref[i], stop_ref[i], visit, start)
    out_ref[...] = (out / row_sum[:, None]).astype(out_ref.dtype)
    row_max_ref[...], row_sum_ref[...] = row_max, row_sum


def _backward_queries(
    size: int,
    others: int,
    first_ref,
    stop_ref,
    segments_ref,
    q_ref,
    d_out_ref,
    row_max_ref,
    share_ref,
    delta_ref,
    k_ref,
    v_ref,
    d_q_ref,
) -> None:
    i = pl.program_id(2)
    q, d_out, row_max, delta = q_ref[...], d_out_ref[...], row_max_ref[...], delta_ref[...]
    query_segments = segments_ref[pl.ds(i * size, size)]

    def visit(j, d_q):
        block = pl.ds(j * others, others)
        k = k_ref[block, :]
        # Not yet multiplied by `share_ref`: that follows after the loop.
        weights = jnp.exp2(_scores(q, k, query_segments, segments_ref[block]) - row_max[:, None])
        d_scores = weights * (_dot(d_out, v_ref[block, :], trans_b=True) - delta[:, None])
        return d_q + _dot(d_scores.astype(k.dtype), k)

    d_q = jax.lax.fori_loop(first_ref[i], stop_ref[i], visit, jnp.zeros(q.shape, jnp.float32))
    d_q_ref[...] = (d_q * share_ref[...][:, None]).astype(d_q_ref.dtype)


def _backward_keys(
    size: int,
    others: int,
    first_ref,
    stop_ref,
    segments_ref,
    k_ref,
    v_ref,
    q_ref,
    d_out_ref,
    row_max_ref,
    share_ref,
    delta_ref,
    d_k_ref,
    d_v_ref,
) -> None:
    """Computes the gradients of keys and values.

    Scores, weights and their gradients are [s, t] here, keys first.
    """
    i = pl.program_id(2)
    k, v = k_ref[...], v_ref[...]
    query_segments = segments_ref[pl.ds(i * size, size)]

    def visit(j, carry):
        d_k, d_v = carry
        block = pl.ds(j * others, others)
        q, d_out = q_ref[block, :], d_out_ref[block, :]
        weights = (
            jnp.exp2(_scores(k, q, query_segments, segments_ref[block]) - row_max_ref[block][None]) * share_ref[block][None]
        )
        d_scores = weights * (_dot(v, d_out, trans_b=True) - delta_ref[block][None])
        return d_k + _dot(d_scores.astype(q.dtype), q), d_v + _dot(weights.astype(d_out.dtype), d_out)

    zero = jnp.zeros(k.shape, jnp.float32)
    d_k, d_v = jax.lax.fori_loop(first_ref[i], stop_ref[i], visit, (zero, zero))
    d_k_ref[...], d_v_ref[...] = d_k.astype(d_k_ref.dtype), d_v.astype(d_v_ref.dtype)


def _scores(x: Array, y: Array, x_segments: Array, y_segments: Array) -> Array:
    """Scores x y of tokens of equal segment, to base 2: 2^x is what the hardware computes."""
    scores = _dot(x, y, trans_b=True) * LOG2_E
    return jnp.where(x_segments[:, None] == y_segments[None, :], scores, MASK_VALUE)


def _dot(x: Array, y: Array, trans_b: bool = False) -> Array:
    """Matrix product with a float32 result."""
    return triton.dot(x, y, trans_b=trans_b, precision=matmul_precision(x.dtype))

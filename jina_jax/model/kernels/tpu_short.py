"""Attention within the texts of packed rows, for TPU: forward and backward of rows of up to 1,024
tokens.

A program of the grid takes two heads of a row, as `tpu.py` describes, with all their scores at
once.

  * The sum of the softmax weights comes from rows of ones below v. The forward pass leaves the
    backward pass each query's maximum and 1 / sum. The log of both in one number would be a
    subtraction less and wrong for large logits.
  * The scores of both heads are stated before the exponentials of the first, so that the compiler
    overlaps the two.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from .block_mask import ATTENTION_RESIDUALS
from .tpu import (
    HEAD_DIM,
    LANES,
    LOG2_E,
    OVER_QUERIES,
    SCALE,
    Shared,
    call_for_head_pairs,
    dot,
    head_rows,
    key_side,
    other_head_zeroed,
    padded_to_blocks,
    query_side,
    rotate,
    segment_code,
    shared_by_heads,
    supports_head_pairs,
)

LONGEST_ROW = 1024
"""All scores of a row and head are in the chip's memory at once."""


def supports(qkv: Array, num_heads: int) -> bool:
    """True for heads of 64 in pairs, rows of up to 1,024 tokens, bfloat16 or float32."""
    return supports_head_pairs(qkv, num_heads) and qkv.shape[2] <= LONGEST_ROW


def tpu_fused_attention(
    qkv: Float[Array, "3 b t d"],
    segment_ids: Int[Array, "b t"],
    tables: tuple[Float[Array, "b t h_half"], Float[Array, "b t h_half"]] | None,
    *,
    num_heads: int,
    interpret: bool = False,
) -> Float[Array, "b t d"]:
    """`attention.plain_attention` on a TPU, for the projections that `supports` accepts.

    The tables are constants: they get no gradient.

    Args:
        qkv: the fused projection before rotation.
        segment_ids: any int32; tokens of equal segment see each other.
        tables: cosines and sines of the rotary angles, in float32, or None for no rotation.
        num_heads: d = n * 64, n even.
        interpret: run on any backend, slowly, for tests.

    Raises:
        ValueError: another head size, an odd number of heads, longer rows or another dtype.
    """
    if not supports(qkv, num_heads):
        raise ValueError(
            f"a projection {qkv.dtype}{list(qkv.shape)} of {num_heads} heads; this kernel takes an even number of heads of "
            f"{HEAD_DIM}, rows of up to {LONGEST_ROW} tokens, bfloat16 or float32"
        )
    t = segment_ids.shape[1]
    padded = jax.tree.map(partial(padded_to_blocks, size=LANES), (qkv, shared_by_heads(segment_ids, tables)))
    out: Array = _attend(*padded, t, interpret)
    return out[:, :t]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(qkv: Array, shared: Shared, tokens: int, interpret: bool) -> Array:
    return _run(_row_attention, (qkv,), shared, (_out(qkv),), tokens, interpret)[0]


def _attend_forward(qkv: Array, shared: Shared, tokens: int, interpret: bool):
    _, b, t, d = qkv.shape
    outputs = _out(qkv), jax.ShapeDtypeStruct((b, d // LANES, 4, t), jnp.float32)
    out, statistics = _run(_row_attention, (qkv,), shared, outputs, tokens, interpret)
    out, statistics = (checkpoint_name(x, ATTENTION_RESIDUALS) for x in (out, statistics))
    return out, (qkv, shared, out, statistics)


def _attend_backward(tokens: int, interpret: bool, residuals: tuple, d_out: Array):
    qkv, shared, out, statistics = residuals
    outputs = (jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),)
    (d_qkv,) = _run(_row_attention_backward, (qkv, out, d_out, statistics), shared, outputs, tokens, interpret)
    return d_qkv, None


_attend.defvjp(_attend_forward, _attend_backward)


def _out(qkv: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(qkv.shape[1:], qkv.dtype)


def _run(kernel, inputs: tuple, shared: Shared, outputs: tuple, tokens: int, interpret: bool) -> tuple[Array, ...]:
    semantics = ("parallel", "arbitrary")
    return call_for_head_pairs(partial(kernel, tokens), inputs, shared, outputs, semantics=semantics, interpret=interpret)


# ---- the kernels


def _row_attention(tokens: int, shared, *refs) -> None:
    """softmax(q k / 8) v of two heads. For a gradient, the last of `refs` takes the statistics of
    each head's softmax."""
    qkv_ref, out_ref, *statistics_ref = refs
    code, rotary = _code_and_rotary(shared, tokens, qkv_ref.dtype)
    q, k, v = (qkv_ref[i, 0].T for i in range(3))  # [2h, t]
    scores = []
    for head in (0, 1):
        own_q, own_k = rotate(head_rows(q, head), rotary, SCALE * LOG2_E), rotate(head_rows(k, head), rotary)
        scores.append(dot(key_side(own_k, code), query_side(own_q, code)))
    ones = jnp.ones((16, v.shape[1]), v.dtype)  # as many as fill a tile
    out = []
    for head in (0, 1):
        row_max = scores[head].max(0, keepdims=True)  # [1, t]
        weights = jnp.exp2(scores[head] - row_max).astype(v.dtype)
        sums = dot(jnp.concatenate([head_rows(v, head), ones]), weights)  # [h + 16, t]
        row_sum = sums[HEAD_DIM : HEAD_DIM + 1]
        out.append(sums[:HEAD_DIM] / row_sum)
        if statistics_ref:
            statistics_ref[0][0, 0, 2 * head : 2 * head + 2] = jnp.concatenate([row_max, 1 / row_sum])
    out_ref[0] = jnp.concatenate(out).astype(out_ref.dtype).T


def _row_attention_backward(tokens: int, shared, *refs) -> None:
    """The gradient of qkv of two heads. The weights are recomputed from the scores and the
    statistics of the softmax."""
    qkv_ref, out_ref, d_out_ref, statistics_ref, d_qkv_ref = refs
    code, rotary = _code_and_rotary(shared, tokens, qkv_ref.dtype)
    q, k, v = qkv_ref[0, 0].T, qkv_ref[1, 0].T, qkv_ref[2, 0]  # q, k [2h, t]; v [s, 2h]
    d_out = d_out_ref[0].T
    products = d_out.astype(jnp.float32) * out_ref[0].T.astype(jnp.float32)
    d_q, d_k, d_v = [], [], []
    for head in (0, 1):
        own_q, own_k = rotate(head_rows(q, head), rotary, SCALE * LOG2_E), rotate(head_rows(k, head), rotary)
        # [1, t]
        row_max, share = (statistics_ref[0, 0, i : i + 1] for i in (2 * head, 2 * head + 1))
        # [s, t]
        weights = jnp.exp2(dot(key_side(own_k, code), query_side(own_q, code)) - row_max) * share
        d_weights = dot(other_head_zeroed(head, v), d_out)
        d_scores = weights * (d_weights - head_rows(products, head).sum(0, keepdims=True))
        weights, d_scores = weights.astype(v.dtype), d_scores.astype(v.dtype)
        d_v.append(dot(head_rows(d_out, head), weights, OVER_QUERIES))  # [h, s]
        # Scores were to base 2: the gradient of q has lost its log2 e already, that of k contains
        # it in q.
        d_k.append(rotate(dot(own_q, d_scores, OVER_QUERIES), rotary, 1 / LOG2_E, back=True))
        d_q.append(rotate(dot(own_k, d_scores), rotary, SCALE, back=True))  # [h, t]
    for i, gradient in enumerate((d_q, d_k, d_v)):
        d_qkv_ref[i, 0] = jnp.concatenate(gradient).astype(d_qkv_ref.dtype).T


def _code_and_rotary(shared, tokens: int, dtype: DTypeLike) -> tuple[Array, list[Array]]:
    """The code of the segments [h, t], and cosines and sines [h/2, t] or nothing."""
    segments_ref, rotary_refs = shared
    return segment_code(segments_ref[0], tokens, dtype), [ref[0] for ref in rotary_refs]

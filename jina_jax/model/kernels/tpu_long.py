"""Flash attention within the texts of long packed rows, for TPU: rows of 1,025 to 16,384 tokens,
forward and backward.

A program of the grid takes two heads of a row, as `tpu.py` describes, and goes through their scores
in blocks.

  * All of the two heads is in the chip's memory. Keys are rotated and transposed once, not for
    every block of queries; for the gradient it is queries.
  * The softmax is online (Milakov & Gimelshein 2018). Foreign blocks before the first key of the
    same text leave something finite, which that key multiplies by 2^-(2^100) = 0: the mask stays
    exact.
  * Scores are computed a block ahead, so that the matrix unit works on the next block while the
    exponentials of this one are taken. An iteration of the loop is two blocks, which gives the
    compiler more to overlap.
  * The forward pass leaves the backward pass each query's maximum and 1 / sum, as in
    `tpu_short.py`. The gradient is one pass (Dao et al. 2022): blocks of keys outside, of queries
    inside, the gradient of all queries summed in float32.
  * A block meets others from the first to the last that may hold one of its segments, by the lowest
    and highest of each.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from .block_mask import ATTENTION_RESIDUALS
from .tpu import (
    HEAD_DIM,
    LANES,
    LOG2_E,
    OVER_QUERIES,
    SCALE,
    VMEM_LIMIT,
    Shared,
    blocks_by_shape,
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

LONGEST_ROW = {"bfloat16": 16_384, "float32": 8192}
"""Tokens, by what fits into the chip's memory."""

BLOCKS = (512, 640, 384)
"""Tokens of a block, of queries and of keys: the first of those that leave the fewest slots
empty."""

ROOM = 12 * 2**20
"""Bytes of on-chip memory for what the compiler keeps between instructions, such as scores."""

LOWEST = -(2.0**126)
"""Below the maximum of any block: where all keys are foreign, that is at least -32 * 2^100."""

ONES = 16
"""Rows of ones below v, as many as fill a tile: their product with the weights is the sum of the
softmax."""


def supports(qkv: Array, num_heads: int) -> bool:
    """True for heads of 64 in pairs, rows of up to 16,384 tokens, or 8,192 in float32."""
    return supports_head_pairs(qkv, num_heads) and qkv.shape[2] <= LONGEST_ROW[qkv.dtype.name]


def tpu_flash_attention(
    qkv: Float[Array, "3 b t d"],
    segment_ids: Int[Array, "b t"],
    tables: tuple[Float[Array, "b t h_half"], Float[Array, "b t h_half"]] | None,
    *,
    num_heads: int,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "b t d"]:
    """`attention.plain_attention` on a TPU, for the projections that `supports` accepts.

    The tables are constants: they get no gradient.

    Args:
        qkv: the fused projection before rotation.
        segment_ids: any int32; tokens of equal segment see each other.
        tables: cosines and sines of the rotary angles, in float32, or None for no rotation.
        num_heads: d = n * 64, n even.
        block: tokens of a block, a multiple of 128; None = the best of `BLOCKS`.
        interpret: run on any backend, slowly, for tests.

    Raises:
        ValueError: another head size, an odd number of heads, longer rows or another dtype.
    """
    if not supports(qkv, num_heads):
        raise ValueError(
            f"a projection {qkv.dtype}{list(qkv.shape)} of {num_heads} heads; this kernel takes an even number of heads of "
            f"{HEAD_DIM}, rows of up to 16,384 tokens in bfloat16 or 8,192 in float32"
        )
    t = segment_ids.shape[1]
    size = block or min(BLOCKS, key=lambda size: -t % size)
    padded = jax.tree.map(partial(padded_to_blocks, size=size), (qkv, shared_by_heads(segment_ids, tables)))
    out: Array = _attend(*padded, t, size, interpret)
    return out[:, :t]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _attend(qkv: Array, shared: Shared, tokens: int, size: int, interpret: bool) -> Array:
    return _attend_forward(qkv, shared, tokens, size, interpret)[0]


def _attend_forward(qkv: Array, shared: Shared, tokens: int, size: int, interpret: bool):
    _, b, t, d = qkv.shape
    like_qkv, float32 = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (qkv.dtype, jnp.float32))
    scratch = (
        like_qkv((t // size, 2, size, LANES)),  # keys with their segments
        like_qkv((t // size, LANES, size)),  # values
        like_qkv((2, LANES, size)),  # a block's queries with their segments
        float32((2, size, size)),  # their scores with a block of keys
        float32((2, 1, size)),  # the highest of these
        float32((2, 1, size)),  # the highest so far
        # the weighted values so far, and below them the sum of the weights
        float32((2, HEAD_DIM + 8, size)),
    )
    outputs = like_qkv((b, t, d)), float32((b, d // LANES, 4, t))
    out, statistics = _run(_long_row_attention, (qkv,), shared, outputs, scratch, size, tokens, interpret)
    out, statistics = (checkpoint_name(x, ATTENTION_RESIDUALS) for x in (out, statistics))
    return out, (qkv, shared, out, statistics)


def _attend_backward(tokens: int, size: int, interpret: bool, residuals: tuple, d_out: Array):
    qkv, shared, out, statistics = residuals
    t = qkv.shape[2]
    like_qkv, float32 = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (qkv.dtype, jnp.float32))
    scratch = (
        like_qkv((t // size, 2, LANES, size)),  # queries with their segments
        like_qkv((t // size, LANES, size)),  # d_out
        float32((t // size, 6, size)),  # of each head: maximum, 1 / sum, out * d_out
        float32((t // size, LANES, size)),  # d_q
        like_qkv((2, size, LANES)),  # a block's keys with their segments
        like_qkv((LANES, size)),  # and without
        like_qkv((2, size, LANES)),  # its values
        float32((LANES, size)),  # its d_k
        float32((LANES, size)),  # its d_v
    )
    inputs, outputs = (qkv, out, d_out, statistics), (like_qkv(qkv.shape),)
    (d_qkv,) = _run(_long_row_attention_backward, inputs, shared, outputs, scratch, size, tokens, interpret)
    return d_qkv, None


_attend.defvjp(_attend_forward, _attend_backward)


def _run(
    kernel, inputs: tuple, shared: Shared, outputs: tuple, scratch: tuple, size: int, tokens: int, interpret: bool
) -> tuple[Array, ...]:
    blocks = blocks_by_shape(inputs, shared)
    # What comes next is loaded meanwhile if both have room. The longest rows wait for it, for
    # little of their time.
    loaded = sum(math.prod(blocks[x.shape].shape) * x.dtype.itemsize for x in jax.tree.leaves((inputs, shared, outputs)))
    kept = sum(math.prod(x.shape) * x.dtype.itemsize for x in scratch)
    return call_for_head_pairs(
        partial(kernel, tokens),
        inputs,
        shared,
        outputs,
        # A chip of two cores, such as v5p, shares out rows, and of a single row the heads.
        semantics=("parallel", "parallel"),
        interpret=interpret,
        spans=_spans(shared[0], size),
        scratch=scratch,
        buffers=pl.Buffered(2 if 2 * loaded + kept + ROOM <= VMEM_LIMIT else 1),
    )


def _spans(segment_ids: Array, size: int) -> Array:
    """The first and the last block that each block meets [b, 2, blocks], of segments [b, 1, t]."""
    blocks = segment_ids.reshape(segment_ids.shape[0], -1, size)
    lowest, highest = blocks.min(-1), blocks.max(-1)
    meet = (lowest[:, :, None] <= highest[:, None]) & (lowest[:, None] <= highest[:, :, None])
    first, behind = meet.argmax(-1), meet[..., ::-1].argmax(-1)
    return jnp.stack([first, meet.shape[-1] - 1 - behind], 1).astype(jnp.int32)


# ---- the kernels


def _long_row_attention(tokens: int, spans_ref, shared, qkv_ref, out_ref, statistics_ref, *scratch) -> None:
    """softmax(q k / 8) v of two heads, and the statistics of each head's softmax."""
    keys_ref, values_ref, queries_ref, scores_ref, peak_ref, highest_ref, sums_ref = scratch
    blocks, _, size, _ = keys_ref.shape
    dtype = qkv_ref.dtype
    ones = jnp.ones((ONES, size), dtype)
    rest = 2 - blocks % 2  # blocks behind those that are taken two at a time

    @pl.loop(0, blocks)
    def load_keys(j):
        code, rotary = _block_code_and_rotary(shared, tokens, j, size, dtype)
        k = qkv_ref[1, 0, _slots(j, size)].T
        for head in (0, 1):
            keys_ref[j, head] = key_side(rotate(head_rows(k, head), rotary), code)
        values_ref[j] = qkv_ref[2, 0, _slots(j, size)].T

    def load_queries(i):
        code, rotary = _block_code_and_rotary(shared, tokens, i, size, dtype)
        q = qkv_ref[0, 0, _slots(i, size)].T
        for head in (0, 1):
            queries_ref[head] = query_side(rotate(head_rows(q, head), rotary, SCALE * LOG2_E), code)

    def first_pair(i):
        return spans_ref[0, 0, i] // 2

    def score(head, j):
        scores = dot(keys_ref[j, head], queries_ref[head])
        scores_ref[head] = scores
        peak_ref[head] = scores.max(0, keepdims=True)

    def add(j, ahead):
        """The scores at hand, those of block j, into the sums. Then those of block `ahead` are at
        hand."""
        for head in (0, 1):
            before = highest_ref[head]
            row_max = jnp.maximum(before, peak_ref[head])
            weights = jnp.exp2(scores_ref[head] - row_max).astype(dtype)
            score(head, ahead)
            sums = dot(jnp.concatenate([head_rows(values_ref[j], head), ones]), weights)
            sums_ref[head] = sums_ref[head] * jnp.exp2(before - row_max) + sums[: HEAD_DIM + 8]
            highest_ref[head] = row_max

    load_queries(jnp.int32(0))
    for head in (0, 1):
        score(head, 2 * first_pair(0))

    @pl.loop(0, blocks)
    def attend(i):
        highest_ref[...] = jnp.full_like(highest_ref, LOWEST)
        sums_ref[...] = jnp.zeros_like(sums_ref)
        first, end = first_pair(i), (spans_ref[0, 1, i] + 2 - rest) // 2

        @pl.loop(0, (blocks - 1) // 2)
        def add_two(pair):
            @pl.when((first <= pair) & (pair < end))
            def _():
                add(2 * pair, 2 * pair + 1)
                add(2 * pair + 1, 2 * pair + 2)

        if rest == 2:
            add(2 * end, 2 * end + 1)
        following = jnp.minimum(i + 1, blocks - 1)
        load_queries(following)
        add(2 * end + rest - 1, 2 * first_pair(following))

        share = [1 / sums_ref[head, HEAD_DIM : HEAD_DIM + 1] for head in (0, 1)]
        out = jnp.concatenate([sums_ref[head, :HEAD_DIM] * share[head] for head in (0, 1)])
        out_ref[0, _slots(i, size)] = out.astype(dtype).T
        statistics_ref[0, 0, :, _slots(i, size)] = jnp.concatenate([highest_ref[0], share[0], highest_ref[1], share[1]])


def _long_row_attention_backward(
    tokens: int, spans_ref, shared, qkv_ref, out_ref, d_out_ref, statistics_ref, d_qkv_ref, *scratch
) -> None:
    """The gradient of qkv of two heads. The weights are recomputed from the scores and the
    statistics of the softmax."""
    queries_ref, d_outs_ref, known_ref, d_q_ref, keys_ref, own_keys_ref, values_ref, d_k_ref, d_v_ref = scratch
    blocks, _, _, size = queries_ref.shape
    dtype = qkv_ref.dtype
    rows = [slice(head * HEAD_DIM, (head + 1) * HEAD_DIM) for head in (0, 1)]

    @pl.loop(0, blocks)
    def load_queries(i):
        code, rotary = _block_code_and_rotary(shared, tokens, i, size, dtype)
        q, d_out = qkv_ref[0, 0, _slots(i, size)].T, d_out_ref[0, _slots(i, size)].T
        products = d_out.astype(jnp.float32) * out_ref[0, _slots(i, size)].T.astype(jnp.float32)
        for head in (0, 1):
            queries_ref[i, head] = query_side(rotate(head_rows(q, head), rotary, SCALE * LOG2_E), code)
            known_ref[i, 3 * head : 3 * head + 2] = statistics_ref[0, 0, 2 * head : 2 * head + 2, _slots(i, size)]
            known_ref[i, 3 * head + 2 : 3 * head + 3] = head_rows(products, head).sum(0, keepdims=True)
        d_outs_ref[i] = d_out
        d_q_ref[i] = jnp.zeros((LANES, size), jnp.float32)

    def load_keys(j):
        code, rotary = _block_code_and_rotary(shared, tokens, j, size, dtype)
        k, v = qkv_ref[1, 0, _slots(j, size)].T, qkv_ref[2, 0, _slots(j, size)]
        for head in (0, 1):
            own_keys_ref[rows[head]] = rotate(head_rows(k, head), rotary)
            keys_ref[head] = key_side(own_keys_ref[rows[head]], code)
            values_ref[head] = other_head_zeroed(head, v)

    def add(i):
        """The gradients from a block of queries."""
        for head in (0, 1):
            # [1, t]
            row_max, share, products = (known_ref[i, n : n + 1] for n in range(3 * head, 3 * head + 3))
            # [s, t]
            weights = jnp.exp2(dot(keys_ref[head], queries_ref[i, head]) - row_max) * share
            d_scores = weights * (dot(values_ref[head], d_outs_ref[i]) - products)
            weights, d_scores = weights.astype(dtype), d_scores.astype(dtype)
            d_v_ref[rows[head]] += dot(d_outs_ref[i, rows[head]], weights, OVER_QUERIES)
            d_k_ref[rows[head]] += dot(queries_ref[i, head, :HEAD_DIM], d_scores, OVER_QUERIES)
            d_q_ref[i, rows[head]] += dot(own_keys_ref[rows[head]], d_scores)

    # Scores were to base 2: the gradient of q has lost its log2 e already, that of k has it in q.
    def write(part, j, gradient, scale):
        _, rotary = _block_code_and_rotary(shared, tokens, j, size, dtype)
        turned = [rotate(head_rows(gradient, head), rotary, scale, back=True) for head in (0, 1)]
        d_qkv_ref[part, 0, _slots(j, size)] = jnp.concatenate(turned).astype(dtype).T

    @pl.loop(0, blocks)
    def gather(j):
        load_keys(j)
        d_k_ref[...], d_v_ref[...] = jnp.zeros_like(d_k_ref), jnp.zeros_like(d_v_ref)
        first, last = spans_ref[0, 0, j], spans_ref[0, 1, j]

        @pl.loop(0, blocks)
        def _(i):
            pl.when((first <= i) & (i <= last))(lambda: add(i))

        write(1, j, d_k_ref[...], 1 / LOG2_E)
        d_qkv_ref[2, 0, _slots(j, size)] = d_v_ref[...].astype(dtype).T

    @pl.loop(0, blocks)
    def finish(i):
        write(0, i, d_q_ref[i], SCALE)


def _slots(block: Array, size: int):
    """The tokens of a block."""
    return pl.ds(pl.multiple_of(block * size, size), size)


def _block_code_and_rotary(shared, tokens: int, block: Array, size: int, dtype: DTypeLike) -> tuple[Array, list[Array]]:
    """The code of the segments [h, t] of a block, and cosines and sines [h/2, t] or nothing."""
    segments_ref, rotary_refs = shared
    slots = _slots(block, size)
    filled = size if tokens == segments_ref.shape[2] else jnp.int32(tokens) - block * size
    return segment_code(segments_ref[0, :, slots], filled, dtype), [ref[0, :, slots] for ref in rotary_refs]

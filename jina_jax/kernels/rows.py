"""Attention within the texts of packed rows, for TPU: forward and backward of rows of up to 1,024 tokens.

A TPU works on tiles of 128 lanes, a head has 64 numbers. So a program of the grid takes two heads of a row, straight from the
fused projection [3, b, t, d] and into [b, t, d], and no array is ever transposed or padded outside. Inside, with the letters of
`model.py` and s for keys:

  * Everything is on its side: q, k and v are [h, t], scores [s, t]. A token is a lane. The halves that rotary positions turn
    are rows apart, and what belongs to a query (its maximum, its sum) is one row; in lanes both would have to be moved about.
  * The products are written so that scores are the side that stays in the matrix unit and the 64 numbers of a head are what
    streams through it: [h, s] @ [s, t] moves 64 rows where [t, s] @ [s, h] moves t.
  * The mask is part of the product of queries and keys. That product contracts 128 numbers at no more cost than the 64 of a
    head. The other 64 hold the 32 bits of the segment, two numbers a bit: `_segment_code`. They add 0, exactly, to the score of
    two tokens of one segment, and at most -2^100 to any other: whatever the ids, their order and number, and the logits.
  * Logits are to base 2 (log2 e is folded into the scale of q), since 2^x is what the hardware computes.
  * The sum of the softmax weights comes from rows of ones below v. The forward pass leaves the backward pass each query's
    maximum and 1 / sum. The log of both in one number would be a subtraction less and wrong for large logits.
  * The scores of both heads are stated before the exponentials of the first, so that the compiler overlaps the two.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ..lora import precision

LONGEST_ROW = 1024
"""All scores of a row and head are in the chip's memory at once."""

HEAD_DIM, LANES = 64, 128

ATTENDED = "attended"
"""Name of what the backward pass needs of the forward pass, for `jax.checkpoint`'s policies."""

STEP = 2.0**50
"""Size of the numbers of `_segment_code`: their product, 2^100, outweighs every score. Powers of two are exact in any dtype."""

SCALE = HEAD_DIM**-0.5
LOG2_E = float(np.log2(np.e))

VMEM_LIMIT = 60 * 2**20
"""Bytes of on-chip memory the compiler may use: what the longest rows need in float32. Chips have 64 MiB at least."""


def serves(qkv: Array, num_heads: int) -> bool:
    """Whether `attend_rows` takes such a projection: heads of 64 in pairs, rows of up to 1,024 tokens, bfloat16 or float32."""
    _, _, t, d = qkv.shape
    return d == num_heads * HEAD_DIM and d % LANES == 0 and t <= LONGEST_ROW and qkv.dtype in (jnp.bfloat16, jnp.float32)


def attend_rows(
    qkv: Float[Array, "3 b t d"],
    segments: Int[Array, "b t"],
    tables: tuple[Float[Array, "b t h_half"], Float[Array, "b t h_half"]] | None,
    *,
    num_heads: int,
    interpret: bool = False,
) -> Float[Array, "b t d"]:
    """`attention.plain_attention` on a TPU, for projections that it `serves`. The tables are constants: they get no gradient.

    Args:
        qkv: the fused projection before rotation.
        segments: any int32; tokens of equal segment see each other.
        tables: cosines and sines of the rotary angles, in float32, or None for no rotation.
        num_heads: d = n * 64, n even.
        interpret: run on any backend, slowly, for tests.

    Raises:
        ValueError: another head size, an odd number of heads, longer rows or another dtype.
    """
    if not serves(qkv, num_heads):
        raise ValueError(
            f"a projection {qkv.dtype}{list(qkv.shape)} of {num_heads} heads; this kernel takes an even number of heads of "
            f"{HEAD_DIM}, rows of up to {LONGEST_ROW} tokens, bfloat16 or float32"
        )
    t = segments.shape[1]
    rotary = () if tables is None else tuple(jnp.swapaxes(x, 1, 2) for x in tables)
    whole = jax.tree.map(_in_whole_tiles, (qkv, (segments.astype(jnp.int32)[:, None], rotary)))
    out: Array = _attend(*whole, t, interpret)
    return out[:, :t]


Shared = tuple[Array, tuple[Array, ...]]
"""What all heads of a row share: segments [b, 1, t], and cosines and sines [b, h/2, t] or nothing."""


def _in_whole_tiles(x: Array) -> Array:
    axis = 2  # of tokens, in all arrays
    missing = -x.shape[axis] % LANES
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(qkv: Array, shared: Shared, tokens: int, interpret: bool) -> Array:
    return _run(_row_attention, (qkv,), shared, (_out(qkv),), tokens, interpret)[0]


def _attend_forward(qkv: Array, shared: Shared, tokens: int, interpret: bool):
    _, b, t, d = qkv.shape
    outputs = _out(qkv), jax.ShapeDtypeStruct((b, d // LANES, 4, t), jnp.float32)
    out, statistics = _run(_row_attention, (qkv,), shared, outputs, tokens, interpret)
    out, statistics = (checkpoint_name(x, ATTENDED) for x in (out, statistics))
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
    """The kernel for each row and pair of heads. `shared` is loaded once for a row."""
    _, b, t, d = inputs[0].shape
    blocks = {
        (3, b, t, d): pl.BlockSpec((3, 1, t, LANES), lambda row, pair: (0, row, 0, pair)),  # qkv
        (b, t, d): pl.BlockSpec((1, t, LANES), lambda row, pair: (row, 0, pair)),  # out
        (b, d // LANES, 4, t): pl.BlockSpec((1, 1, 4, t), lambda row, pair: (row, pair, 0, 0)),  # statistics
    }
    of_row = jax.tree.map(lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda row, pair: (row, 0, 0)), shared)
    call = pl.pallas_call(
        partial(kernel, tokens),
        name=kernel.__name__.strip("_"),
        grid=(b, d // LANES),
        in_specs=[of_row, *(blocks[x.shape] for x in inputs)],
        out_specs=[blocks[x.shape] for x in outputs],
        out_shape=list(outputs),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
    )
    return tuple(call(shared, *inputs))


# ---- the kernels


def _row_attention(tokens: int, shared, *refs) -> None:
    """softmax(q k / 8) v of two heads. For a gradient, the last of `refs` takes the statistics of each head's softmax."""
    qkv_ref, out_ref, *statistics_ref = refs
    code, rotary = _of_row(shared, tokens, qkv_ref.dtype)
    q, k, v = (qkv_ref[i, 0].T for i in range(3))  # [2h, t]
    scores = []
    for head in (0, 1):
        own_q, own_k = _rotate(_half(q, head), rotary, SCALE * LOG2_E), _rotate(_half(k, head), rotary)
        scores.append(_scores(own_q, own_k, code))
    ones = jnp.ones((16, v.shape[1]), v.dtype)  # as many as fill a tile
    out = []
    for head in (0, 1):
        highest = scores[head].max(0, keepdims=True)  # [1, t]
        weights = jnp.exp2(scores[head] - highest).astype(v.dtype)
        sums = _dot(jnp.concatenate([_half(v, head), ones]), weights)  # [h + 16, t]
        total = sums[HEAD_DIM : HEAD_DIM + 1]
        out.append(sums[:HEAD_DIM] / total)
        if statistics_ref:
            statistics_ref[0][0, 0, 2 * head : 2 * head + 2] = jnp.concatenate([highest, 1 / total])
    out_ref[0] = jnp.concatenate(out).astype(out_ref.dtype).T


def _row_attention_backward(tokens: int, shared, *refs) -> None:
    """The gradient of qkv of two heads. The weights are computed again from the scores and the statistics of the softmax."""
    qkv_ref, out_ref, d_out_ref, statistics_ref, d_qkv_ref = refs
    code, rotary = _of_row(shared, tokens, qkv_ref.dtype)
    q, k, v = qkv_ref[0, 0].T, qkv_ref[1, 0].T, qkv_ref[2, 0]  # q, k [2h, t]; v [s, 2h]
    d_out = d_out_ref[0].T
    products = d_out.astype(jnp.float32) * out_ref[0].T.astype(jnp.float32)
    d_q, d_k, d_v = [], [], []
    for head in (0, 1):
        own_q, own_k = _rotate(_half(q, head), rotary, SCALE * LOG2_E), _rotate(_half(k, head), rotary)
        highest, share = (statistics_ref[0, 0, i : i + 1] for i in (2 * head, 2 * head + 1))  # [1, t]
        weights = jnp.exp2(_scores(own_q, own_k, code) - highest) * share  # [s, t]
        d_weights = _dot(_own(head, v), d_out)
        d_scores = weights * (d_weights - _half(products, head).sum(0, keepdims=True))
        weights, d_scores = weights.astype(v.dtype), d_scores.astype(v.dtype)
        d_v.append(_dot(_half(d_out, head), weights, _OVER_QUERIES))  # [h, s]
        # Scores were to base 2: the gradient of q has lost its log2 e already, that of k contains it in q.
        d_k.append(_rotate(_dot(own_q, d_scores, _OVER_QUERIES), rotary, 1 / LOG2_E, back=True))
        d_q.append(_rotate(_dot(own_k, d_scores), rotary, SCALE, back=True))  # [h, t]
    for i, gradient in enumerate((d_q, d_k, d_v)):
        d_qkv_ref[i, 0] = jnp.concatenate(gradient).astype(d_qkv_ref.dtype).T


# ---- inside a program


_OVER_QUERIES = (((1,), (1,)), ((), ()))
"""Contract [h, t] and [s, t] to [h, s]."""


def _dot(x: Array, y: Array, axes=(((1,), (0,)), ((), ()))) -> Array:
    return jax.lax.dot_general(x, y, axes, precision=precision(x.dtype), preferred_element_type=jnp.float32)


def _segment_code(segments: Array, tokens: int, dtype: DTypeLike) -> Array:
    """What stands below the 64 numbers of a query for its segment [1, t]: -STEP in row 2i of [h, t] where bit i is set, in row
    2i + 1 where it is not.

    A key has 0 where a query of its segment has -STEP, and STEP where that has 0. Equal segments multiply to 0 in all rows;
    each bit in which two segments differ gives -STEP^2 in one of its rows. The slots behind the row's tokens, which fill up its
    last tile, differ from everything in every bit.
    """
    row, slot = (jax.lax.broadcasted_iota(jnp.int32, (HEAD_DIM, segments.shape[1]), axis) for axis in (0, 1))
    differs = (segments ^ -(row & 1)) & jax.lax.shift_left(jnp.ones_like(row), row >> 1)
    if tokens < segments.shape[1]:
        differs = jnp.where(slot < tokens, differs, 0)
    return jnp.where(differs != 0, -STEP, 0.0).astype(dtype)


def _scores(q: Array, k: Array, code: Array) -> Array:
    """[s, t] to base 2 of q [h, t] and k [h, s]; at most -2^100 between segments."""
    return _dot(jnp.concatenate([k, code + jnp.asarray(STEP, code.dtype)]).T, jnp.concatenate([q, code]))


def _half(x: Array, head: int) -> Array:
    """One head's rows of [2h, t]."""
    return x[head * HEAD_DIM : (head + 1) * HEAD_DIM]


def _own(head: int, x: Array) -> Array:
    """[t, 2h] with zeros for the other head."""
    first = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < HEAD_DIM
    return jnp.where(first, x, jnp.zeros_like(x)) if head == 0 else jnp.where(first, jnp.zeros_like(x), x)


def _of_row(shared, tokens: int, dtype: DTypeLike) -> tuple[Array, list[Array]]:
    """The code of the segments [h, t], and cosines and sines [h/2, t] or nothing."""
    segments_ref, rotary_refs = shared
    return _segment_code(segments_ref[0], tokens, dtype), [ref[0] for ref in rotary_refs]


def _rotate(x: Array, rotary: list[Array], scale: float = 1.0, *, back: bool = False) -> Array:
    """Turns the two halves of [h, t] by the angles of the tokens, or `back`, in float32; then scales. Result in x's dtype."""
    y = x.astype(jnp.float32)
    if rotary:
        cos, sin = rotary
        sin = -sin if back else sin
        first, second = y[: HEAD_DIM // 2], y[HEAD_DIM // 2 :]
        y = jnp.concatenate([first * cos - second * sin, second * cos + first * sin])
    return (y * np.float32(scale)).astype(x.dtype) if scale != 1.0 else y.astype(x.dtype)

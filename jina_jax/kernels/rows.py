"""Attention within the texts of packed rows, for TPU: forward and backward of rows of up to 1,024 tokens.

A TPU works on tiles of 128 lanes, a head has 64 numbers. So a program of the grid takes two heads of a row, straight from the
fused projection [3, b, t, d] and into [b, t, d], and no array is ever transposed or padded outside. Inside, with the letters of
`model.py` and s for keys:

  * Scores are held as [s, t]: a query is a column. What belongs to a query (its maximum, its sum) is then a row of lanes
    [1, t], which costs next to nothing, and sums over keys are plain additions of tiles.
  * The other products are written so that scores are the side that stays in the matrix unit and the 64 numbers of a head are
    what streams through it: [h, s] @ [s, t] moves 64 rows where [t, s] @ [s, h] moves t.
  * The mask is part of the product of queries and keys. That product contracts 128 lanes, of which one head fills 64. The
    other 64 hold the 32 bits of the segment, two lanes a bit: `segment_code`. They add 0, exactly, to the score of two tokens
    of one segment, and at most -2^100 to any other: whatever the ids, their order and number, and however large the logits.
  * Logits are to base 2 (log2 e is folded into the scale of q), since 2^x is what the hardware computes.
  * The sum of the softmax weights comes from rows of ones below v. The forward pass leaves the backward pass each query's
    maximum and 1 / sum. The log of both in one number would be a subtraction less and wrong for large logits.
  * The products of one head are stated before the exponentials of the other, so that the compiler overlaps the two.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from ..lora import precision

LONGEST_ROW = 1024
"""All scores of a row and head are in the chip's memory at once."""

HEAD_DIM, LANES = 64, 128

STEP = 2.0**50
"""Size of the numbers of `segment_code`: their product, 2^100, outweighs every score. Powers of two are exact in any dtype."""

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
    missing = -t % LANES
    # In a code of zeros every bit differs from every segment's: no token sees the slots that fill up the last tile.
    code = _fill(segment_code(segments, qkv.dtype), missing, 1)
    rotary = tuple(_fill(x, missing, 1) for x in _rotary_lanes(tables))
    out: Array = _attend(_fill(qkv, missing, 2), code, rotary, interpret)
    return out[:, :t]


def segment_code(segments: Int[Array, "b t"], dtype: jnp.dtype) -> Float[Array, "b t lanes"]:
    """What the idle lanes of a query hold for its segment: lane 2i is -STEP where bit i is set, lane 2i + 1 where it is not.

    A key has STEP where a query of its segment has 0, and 0 where that has -STEP (`_key_code`). Equal segments multiply to 0 in
    all lanes; each bit in which two segments differ gives -STEP^2 in one of its lanes. Both halves of the 128 lanes are alike.
    """
    lane = jnp.arange(LANES) % 64
    bits = jax.lax.shift_right_logical(segments.astype(jnp.int32)[..., None], (lane // 2)[None, None])
    return jnp.where(((bits ^ lane[None, None]) & 1) == 1, -STEP, 0).astype(dtype)


def _key_code(code: Array) -> Array:
    return code + jnp.asarray(STEP, code.dtype)


def _rotary_lanes(tables: tuple[Array, Array] | None) -> tuple[Array, ...]:
    """Cosines and signed sines over the lanes of two heads, [b, t, 128] each: y = x cos + partner(x) sin."""
    if tables is None:
        return ()
    cos, sin = tables
    return jnp.concatenate([cos, cos, cos, cos], -1), jnp.concatenate([-sin, sin, -sin, sin], -1)


def _fill(x: Array, missing: int, axis: int) -> Array:
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(qkv: Array, code: Array, rotary: tuple[Array, ...], interpret: bool) -> Array:
    return _call(_forward_kernel, "row_attention", (qkv,), code, rotary, (_heads_of(qkv),), interpret)[0]


def _attend_forward(qkv: Array, code: Array, rotary: tuple[Array, ...], interpret: bool):
    _, b, t, d = qkv.shape
    outputs = _heads_of(qkv), jax.ShapeDtypeStruct((b, d // LANES, 4, t), jnp.float32)
    out, statistics = _call(_forward_kernel, "row_attention", (qkv,), code, rotary, outputs, interpret)
    return out, (qkv, code, rotary, out, statistics)


def _attend_backward(interpret: bool, residuals: tuple, d_out: Array):
    qkv, code, rotary, out, statistics = residuals
    inputs = qkv, out, d_out, statistics
    (d_qkv,) = _call(_backward_kernel, "row_attention_backward", inputs, code, rotary, (_like(qkv),), interpret)
    return d_qkv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _heads_of(qkv: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(qkv.shape[1:], qkv.dtype)


# ---- the grid: (row, pair of heads)


def _call(kernel, name: str, inputs: tuple, code: Array, rotary: tuple, outputs: tuple, interpret: bool) -> tuple[Array, ...]:
    """`kernel(*rotary, code, *inputs, *outputs)` for each row and pair of heads; what a row's pairs share is loaded once."""
    _, b, t, d = inputs[0].shape
    shared = pl.BlockSpec((1, t, LANES), lambda row, pair: (row, 0, 0))
    specs = {  # by rank and kind of array: qkv [3, b, t, d], out [b, t, d], statistics [b, n/2, 4, t]
        (3, b, t, d): pl.BlockSpec((3, 1, t, LANES), lambda row, pair: (0, row, 0, pair)),
        (b, t, d): pl.BlockSpec((1, t, LANES), lambda row, pair: (row, 0, pair)),
        (b, d // LANES, 4, t): pl.BlockSpec((1, 1, 4, t), lambda row, pair: (row, pair, 0, 0)),
    }
    run = pl.pallas_call(
        partial(kernel, bool(rotary)),
        name=name,
        grid=(b, d // LANES),
        in_specs=[shared] * (len(rotary) + 1) + [specs[x.shape] for x in inputs],
        out_specs=[specs[x.shape] for x in outputs],
        out_shape=list(outputs),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
    )
    return tuple(run(*rotary, code, *inputs))


def _forward_kernel(rotated: bool, *refs) -> None:
    """softmax(q k / 8) v of two heads. For a gradient, the last of `refs` takes the statistics of each head's softmax."""
    rotary, (code_ref, qkv_ref, out_ref, *statistics_ref) = _rotary(rotated, refs)
    code = code_ref[0]
    q = _rotate(qkv_ref[0, 0], rotary, SCALE * LOG2_E)
    k = _rotate(qkv_ref[1, 0], rotary)
    v = qkv_ref[2, 0].T  # [2h, s]
    scores = [_scores(head, q, k, code) for head in (0, 1)]
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


def _backward_kernel(rotated: bool, *refs) -> None:
    """The gradient of qkv of two heads. The weights are computed again from the scores and the statistics of the softmax."""
    rotary, (code_ref, qkv_ref, out_ref, d_out_ref, statistics_ref, d_qkv_ref) = _rotary(rotated, refs)
    code = code_ref[0]
    q = _rotate(qkv_ref[0, 0], rotary, SCALE * LOG2_E)
    k = _rotate(qkv_ref[1, 0], rotary)
    v = qkv_ref[2, 0]
    d_out = d_out_ref[0]
    q_rows, k_rows, d_out_rows = q.T, k.T, d_out.T  # [2h, t]
    products = d_out_rows.astype(jnp.float32) * out_ref[0].T.astype(jnp.float32)
    d_q, d_k, d_v = [], [], []
    for head in (0, 1):
        highest, share = (statistics_ref[0, 0, i : i + 1] for i in (2 * head, 2 * head + 1))  # [1, t]
        weights = jnp.exp2(_scores(head, q, k, code) - highest) * share  # [s, t]
        d_weights = _dot(_own(head, v, jnp.zeros_like(v)), d_out, _LANES_OF_BOTH)
        d_scores = weights * (d_weights - _half(products, head).sum(0, keepdims=True))
        weights, d_scores = weights.astype(v.dtype), d_scores.astype(v.dtype)
        d_v.append(_dot(_half(d_out_rows, head), weights, _LANES_OF_BOTH))  # [h, s]
        d_k.append(_dot(_half(q_rows, head), d_scores, _LANES_OF_BOTH))
        d_q.append(_dot(_half(k_rows, head), d_scores))  # [h, t]
    # Scores were to base 2: the gradient of q has lost its log2 e already, that of k contains it in q.
    d_qkv_ref[0, 0] = _rotate(SCALE * jnp.concatenate(d_q).T, rotary, back=True).astype(d_qkv_ref.dtype)
    d_qkv_ref[1, 0] = _rotate(jnp.concatenate(d_k).T / LOG2_E, rotary, back=True).astype(d_qkv_ref.dtype)
    d_qkv_ref[2, 0] = jnp.concatenate(d_v).astype(d_qkv_ref.dtype).T


# ---- inside a program


_LANES_OF_BOTH = (((1,), (1,)), ((), ()))
"""Contract the last axes of both operands."""


def _dot(x: Array, y: Array, axes=(((1,), (0,)), ((), ()))) -> Array:
    return jax.lax.dot_general(x, y, axes, precision=precision(x.dtype), preferred_element_type=jnp.float32)


def _scores(head: int, q: Array, k: Array, code: Array) -> Array:
    """[s, t] to base 2; at most -2^100 between segments."""
    return _dot(_own(head, k, _key_code(code)), _own(head, q, code), _LANES_OF_BOTH)


def _own(head: int, x: Array, other: Array) -> Array:
    """[t, 2h]: the lanes of one head of x, and the lanes of `other` where the other head is."""
    first = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < HEAD_DIM
    return jnp.where(first, x, other) if head == 0 else jnp.where(first, other, x)


def _half(x: Array, head: int) -> Array:
    """One head's rows of [2h, t]."""
    return x[head * HEAD_DIM : (head + 1) * HEAD_DIM]


def _rotary(rotated: bool, refs: tuple) -> tuple[tuple[Array, ...], tuple]:
    """Cosines and sines [t, 2h] of this row, or none, and the other references."""
    count = 2 if rotated else 0
    return tuple(ref[0] for ref in refs[:count]), refs[count:]


def _rotate(x: Array, rotary: tuple[Array, ...], scale: float = 1.0, *, back: bool = False) -> Array:
    """Turns each half of a head towards the other, in float32 and back to x's dtype; `back` turns the other way."""
    y = x.astype(jnp.float32)
    if rotary:
        cos, sin = rotary
        first = (jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) & (HEAD_DIM // 2)) == 0
        partner = jnp.where(first, pltpu.roll(y, LANES - HEAD_DIM // 2, 1), pltpu.roll(y, HEAD_DIM // 2, 1))
        y = y * cos - partner * sin if back else y * cos + partner * sin
    return (y * scale).astype(x.dtype) if scale != 1.0 else y.astype(x.dtype)

"""Parts that the two TPU kernels share: head pairs, the mask within the matmul, rotary positions.

A TPU works on tiles of 128 lanes, and a head has 64 elements. So a program of the grid takes two
heads of a row, straight from the fused projection [3, b, t, d] and into [b, t, d], and no array is
ever transposed or padded outside. Inside, with the shape letters of `model/encoder.py` and s for
keys:

  * Everything is transposed: q, k and v are [h, t], scores [s, t]. A token is a lane. The halves
    that rotary positions rotate are rows apart, and the values of a query (its maximum, its sum)
    are one row; in lanes both would have to be moved about.
  * The matmuls are written so that the scores stay in the matrix unit and the 64 elements of a head
    stream through it: [h, s] @ [s, t] moves 64 rows where [t, s] @ [s, h] moves t.
  * The mask is part of the matmul of queries and keys. That matmul contracts 128 elements at no
    more cost than the 64 of a head. The other 64 hold the 32 bits of the segment id, two elements a
    bit: `segment_code`. They add exactly 0 to the score of two tokens of one segment, and at most
    -2^100 to any other, whatever the ids, their order and number, and the logits.
  * Logits are to base 2 (log2 e is folded into the scale of q), since 2^x is what the hardware
    computes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from ..matmul import matmul_precision

HEAD_DIM, LANES = 64, 128

STEP = 2.0**50
"""Magnitude of the elements of `segment_code`: their product, 2^100, outweighs every score.

Powers of two are exact in any dtype.
"""

SCALE = HEAD_DIM**-0.5
LOG2_E = float(np.log2(np.e))

VMEM_LIMIT = 60 * 2**20
"""Bytes of on-chip memory that the compiler may use. Chips have at least 64 MiB."""

OVER_QUERIES = (((1,), (1,)), ((), ()))
"""Dimension numbers that contract [h, t] and [s, t] to [h, s]."""


def supports_head_pairs(qkv: Array, num_heads: int) -> bool:
    """True for a bfloat16 or float32 projection [3, b, t, d] with an even number of heads of 64."""
    d = qkv.shape[3]
    return d == num_heads * HEAD_DIM and d % LANES == 0 and qkv.dtype in (jnp.bfloat16, jnp.float32)


Shared = tuple[Array, tuple[Array, ...]]
"""Arrays shared by all heads of a row.

They are segment_ids [b, 1, t], and cosines and sines [b, h/2, t] or nothing.
"""


def shared_by_heads(segment_ids: Array, tables: tuple[Array, Array] | None) -> Shared:
    """Lays out segment_ids [b, t], and tables [b, t, h/2] or None, with tokens as lanes."""
    return segment_ids.astype(jnp.int32)[:, None], tuple(jnp.swapaxes(x, 1, 2) for x in tables or ())


def padded_to_blocks(x: Array, size: int) -> Array:
    """Pads the tokens of [.., .., t, ..] with zeros, up to a multiple of `size`."""
    missing = -x.shape[2] % size
    return jnp.pad(x, [(0, missing if axis == 2 else 0) for axis in range(x.ndim)]) if missing else x


def dot(x: Array, y: Array, axes=(((1,), (0,)), ((), ()))) -> Array:
    return jax.lax.dot_general(x, y, axes, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)


def segment_code(segment_ids: Array, tokens: int | Array, dtype: DTypeLike) -> Array:
    """Code [h, t] of the queries' segments [1, t], placed below the 64 elements of each query.

    It is -STEP in row 2i where bit i of the segment id is set, in row 2i + 1 where it is not, and 0
    elsewhere. A key has 0 where a query of its segment has -STEP, and STEP where that query has 0.
    Equal segments multiply to 0 in all rows; each bit in which two segments differ gives -STEP^2 in
    one of its rows. As keys, the slots behind the first `tokens`, which fill up a tile or block,
    differ from every token in every bit.
    """
    row, slot = (jax.lax.broadcasted_iota(jnp.int32, (HEAD_DIM, segment_ids.shape[1]), axis) for axis in (0, 1))
    differs = (segment_ids ^ -(row & 1)) & jax.lax.shift_left(jnp.ones_like(row), row >> 1)
    if isinstance(tokens, Array) or tokens < segment_ids.shape[1]:
        differs = jnp.where(slot < tokens, differs, 0)
    return jnp.where(differs != 0, -STEP, 0.0).astype(dtype)


def query_side(q: Array, code: Array) -> Array:
    """Query operand [2h, t] of q [h, t]; multiplied with `key_side` it gives the scores."""
    return jnp.concatenate([q, code])


def key_side(k: Array, code: Array) -> Array:
    """Key operand [s, 2h] of k [h, s].

    `key_side @ query_side` is the scores [s, t], to base 2; at most -2^100 between segments.
    """
    return jnp.concatenate([k, code + jnp.asarray(STEP, code.dtype)]).T


def head_rows(x: Array, head: int) -> Array:
    """Rows of one head in [2h, t]."""
    return x[head * HEAD_DIM : (head + 1) * HEAD_DIM]


def other_head_zeroed(head: int, x: Array) -> Array:
    """Zeroes the columns of the other head in [t, 2h]."""
    first = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < HEAD_DIM
    return jnp.where(first, x, jnp.zeros_like(x)) if head == 0 else jnp.where(first, jnp.zeros_like(x), x)


def rotate(x: Array, rotary: list[Array], scale: float = 1.0, *, back: bool = False) -> Array:
    """Rotates the two halves of [h, t] by the angles of the tokens, or `back`, then scales.

    Computes in float32; returns x's dtype.
    """
    y = x.astype(jnp.float32)
    if rotary:
        cos, sin = rotary
        sin = -sin if back else sin
        first, second = y[: HEAD_DIM // 2], y[HEAD_DIM // 2 :]
        y = jnp.concatenate([first * cos - second * sin, second * cos + first * sin])
    return (y * np.float32(scale)).astype(x.dtype) if scale != 1.0 else y.astype(x.dtype)


class Block(NamedTuple):
    """What a program of the grid loads of an array, and by which of its row and pair of heads."""

    shape: tuple[int, ...]
    index_map: Callable[[Any, Any], tuple[Any, ...]]


def blocks_by_shape(inputs: tuple[Array, ...], shared: Shared) -> dict[tuple[int, ...], Block]:
    """Returns the block of every array of a kernel, by the array's shape; `inputs` begins with
    qkv."""
    _, b, t, d = inputs[0].shape
    blocks = {
        (3, b, t, d): Block((3, 1, t, LANES), lambda row, pair: (0, row, 0, pair)),  # qkv
        (b, t, d): Block((1, t, LANES), lambda row, pair: (row, 0, pair)),  # out
        # statistics
        (b, d // LANES, 4, t): Block((1, 1, 4, t), lambda row, pair: (row, pair, 0, 0)),
    }
    return blocks | {x.shape: Block((1, *x.shape[1:]), lambda row, pair: (row, 0, 0)) for x in jax.tree.leaves(shared)}


def call_for_head_pairs(
    kernel: Callable[..., None],
    inputs: tuple[Array, ...],
    shared: Shared,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    *,
    semantics: Sequence[Any],
    interpret: bool,
    spans: Array | None = None,
    scratch: tuple[jax.ShapeDtypeStruct, ...] = (),
    buffers: pl.Buffered | None = None,
) -> tuple[Array, ...]:
    """Runs a kernel for each row and pair of heads.

    Args:
        kernel: takes references to `spans` if given, to `shared`, to `inputs`, to the outputs, and
            to the scratch arrays.
        inputs: qkv first.
        shared: loaded once for a row.
        outputs: shapes of the results.
        semantics: whether rows, and pairs of heads, may be spread over the cores of a chip.
        interpret: run on any backend, slowly, for tests.
        spans: small numbers of each row [b, ...], for the scalar unit.
        scratch: on-chip arrays of a program.
        buffers: how many blocks of an array are on the chip at a time; None = two.
    """
    blocks = blocks_by_shape(inputs, shared)
    b, d = inputs[0].shape[1], inputs[0].shape[3]

    def spec(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(*blocks[x.shape], pipeline_mode=buffers)

    scalars = [] if spans is None else [spans]
    scalar_specs = [pl.BlockSpec((1, *x.shape[1:]), lambda row, pair: (row, 0, 0), memory_space=pltpu.SMEM) for x in scalars]
    call = pl.pallas_call(
        kernel,
        name=getattr(kernel, "func", kernel).__name__.strip("_"),
        grid=(b, d // LANES),
        in_specs=[*scalar_specs, jax.tree.map(spec, shared), *map(spec, inputs)],
        out_specs=[*map(spec, outputs)],
        out_shape=list(outputs),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype) for x in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
    )
    return tuple(call(*scalars, shared, *inputs))

"""Rotary positions and attention by segments.

`attention` takes the fused projection [3, b, t, n*h] of packed rows and is the one place that chooses how it is computed. Every
form gives the same result as `plain_attention`: a token attends to all tokens of its own segment, in both directions, and to
nothing else. Padding is a segment of its own (0), so no token is ever without a key and the result is finite everywhere.
"""

from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from .kernels.blocks import MASKED, visits
from .kernels.gpu_blocks import attend_blocks
from .kernels.gpu_blocks import serves as serves_gpu
from .kernels.long_rows import attend_long_rows
from .kernels.long_rows import serves as serves_long
from .kernels.pairs import ATTENDED
from .kernels.rows import attend_rows, serves
from .lora import precision

LONGEST_PLAIN_ROW = 1024
"""Up to this many tokens the [b, n, t, t] scores of a row are built; longer rows are computed in blocks."""

SMALL_CHIPS = ("TPU v2", "TPU v3", "TPU v4")
"""Kinds of device that have too little memory on the chip for the kernel of long rows: 16 or 32 MiB."""

BLOCK = 512
"""Tokens in a block of the chunked form, about. The scores of a pair of blocks and one head stay in the cache of a CPU core."""


class RotaryTables(NamedTuple):
    """Cosines and sines of each token's rotary angles, in float32."""

    cos: Float[Array, "b t h_half"]
    sin: Float[Array, "b t h_half"]


def rotary_tables(positions: Int[Array, "b t"], head_dim: int, theta: float) -> RotaryTables:
    """Angles position / theta^(2i / h). In float32 throughout: bfloat16 cannot tell position 257 from 256."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(theta) ** exponents
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return RotaryTables(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "b t n h"], tables: RotaryTables | None) -> Float[Array, "b t n h"]:
    """Turns the two halves of each head by the token's angles ("rotate half"); without tables x itself."""
    if tables is None:
        return x
    cos, sin = tables.cos[:, :, None], tables.sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def attention(
    qkv: Float[Array, "3 b t d"], segments: Int[Array, "b t"], tables: RotaryTables | None, *, num_heads: int
) -> Float[Array, "b t d"]:
    """Softmax attention within segments over `num_heads` heads, scaled by 1 / sqrt(h).

    On TPU, heads of 64 numbers and of an even count go to a kernel: rows of up to 1,024 tokens to `kernels/rows.py`, of up to
    16,384 (8,192 in float32) to `kernels/long_rows.py`, which needs a v5e or later. On GPU, heads of 16 to 128 numbers go to
    `kernels/gpu_blocks.py`. Everything else is computed by XLA: rows of up to 1,024 tokens at once, longer ones in blocks. The
    kernels for TPU have no gradient by the tables.

    Args:
        qkv: the fused projection before rotation; its dtype is that of the products, softmax is in float32.
        segments: 0 = padding; tokens of equal segment see each other.
        tables: rotary angles, or None for a model with absolute positions.
        num_heads: d = n * h.
    """
    on_tpu = platform() == "tpu"
    if on_tpu and serves(qkv, num_heads):
        form = attend_rows
    elif on_tpu and serves_long(qkv, num_heads) and not device_kind().startswith(SMALL_CHIPS):
        form = attend_long_rows
    elif platform() == "gpu" and serves_gpu(qkv, num_heads):
        form = gpu_attention
    elif qkv.shape[2] > LONGEST_PLAIN_ROW:
        form = chunked_attention
    else:
        form = plain_attention
    return form(qkv, segments, tables, num_heads=num_heads)


def platform() -> str:
    """Kind of device the program is being traced for: that of the mesh around it, else the default.

    The mesh is what counts when a program for TPUs is compiled ahead of time on a machine without one. The choice is made here,
    and not when the program is lowered, because a choice at lowering keeps the residuals of every branch for the gradient.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def device_kind() -> str:
    """Name of that device's kind, such as "TPU v5 lite"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


@cache
def has_amx() -> bool:
    """Whether this machine's CPU has matrix units for bfloat16, as Linux tells. XLA does not say."""
    file = Path("/proc/cpuinfo")
    return file.exists() and "amx_bf16" in file.read_text()


def plain_attention(
    qkv: Float[Array, "3 b t d"], segments: Int[Array, "b t"], tables: RotaryTables | None, *, num_heads: int
) -> Float[Array, "b t d"]:
    """The definition: all scores of a row at once."""
    q, k, v = _heads(qkv, tables, num_heads)
    scores = _product("btnh,bsnh->bnts", q, k)
    own = segments[:, None, :, None] == segments[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(own, scores, MASKED), axis=-1).astype(v.dtype)
    return checkpoint_name(_product("bnts,bsnh->btnh", weights, v).astype(qkv.dtype).reshape(qkv.shape[1:]), ATTENDED)


def chunked_attention(
    qkv: Float[Array, "3 b t d"], segments: Int[Array, "b t"], tables: RotaryTables | None, *, num_heads: int
) -> Float[Array, "b t d"]:
    """The same in blocks of queries and keys with a running softmax; forward and backward in memory linear in t.

    Pairs of blocks without a text in common are left out.
    """
    t = segments.shape[1]
    size = -(-t // max(1, round(t / BLOCK)))
    size += -size % 8
    padded = -t % size
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded), (0, 0), (0, 0))) for x in _heads(qkv, tables, num_heads))
    # What is added is a segment of its own, so that even the row's own padding comes out as in the plain form.
    segments = jnp.pad(segments, ((0, 0), (0, padded)), constant_values=-1)
    out: Array = (_one_by_one if platform() == "cpu" else _blockwise)(q, k, v, segments, size)
    return out[:, :t].astype(qkv.dtype).reshape(qkv.shape[1:])


def gpu_attention(
    qkv: Float[Array, "3 b t d"],
    segments: Int[Array, "b t"],
    tables: RotaryTables | None,
    *,
    num_heads: int,
    interpret: bool = False,
) -> Float[Array, "b t d"]:
    """The same by a kernel for GPUs. XLA rotates, in one pass with the bias of the projection."""
    return attend_blocks(*_heads(qkv, tables, num_heads), segments, interpret=interpret).reshape(qkv.shape[1:])


def _heads(qkv: Array, tables: RotaryTables | None, n: int) -> tuple[Array, Array, Array]:
    """q (scaled, rotated), k (rotated) and v, each [b, t, n, h]."""
    _, b, t, d = qkv.shape
    q, k, v = qkv.reshape(3, b, t, n, d // n)
    q, k = rotate(q, tables), rotate(k, tables)
    return (q * (d // n) ** -0.5).astype(q.dtype), k, v


def _product(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, precision=precision(x.dtype), preferred_element_type=jnp.float32)


def _one_by_one(q: Array, k: Array, v: Array, segments: Array, size: int) -> Array:
    """Row by row and head by head: what a core of a CPU works on stays in its cache, and a row visits its own texts alone.

    CPUs without matrix units for bfloat16 multiply float32 twice as fast.
    """
    if q.dtype == jnp.bfloat16 and not has_amx():
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))

    def of_row(row: tuple[Array, ...]) -> Array:
        *heads, segments = row
        of_heads = (jnp.moveaxis(x, 1, 0)[:, None, :, None] for x in heads)  # [n, 1, t, 1, h]
        out = jax.lax.map(lambda head: _blockwise(*head, segments[None], size), tuple(of_heads))
        return jnp.moveaxis(out[:, 0, :, 0], 0, 1)

    return jax.lax.map(of_row, (q, k, v, segments))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(q: Array, k: Array, v: Array, segments: Array, size: int) -> Array:
    return _blockwise_forward(q, k, v, segments, size)[0]


def _blockwise_forward(q: Array, k: Array, v: Array, segments: Array, size: int):
    """Online softmax (Milakov & Gimelshein 2018): for each block of queries a loop over the blocks of keys."""
    b, _, n, h = q.shape

    def queries(block):
        q, own, first, stop = block

        def visit(j, carry):
            highest, total, out = carry  # [b, n, t], [b, n, t], [b, n, t, h]
            k_block, v_block, theirs = (_block(x, j, size) for x in (k, v, segments))
            scores = _scores(q, k_block, own, theirs)
            new = jnp.maximum(highest, scores.max(-1))
            weights = jnp.exp(scores - new[..., None])
            decay = jnp.exp(highest - new)
            total = total * decay + weights.sum(-1)
            out = out * decay[..., None] + _product("bnts,bsnh->bnth", weights.astype(v.dtype), v_block)
            return new, total, out

        start = jnp.full((b, n, size), MASKED), jnp.zeros((b, n, size)), jnp.zeros((b, n, size, h))
        highest, total, out = jax.lax.fori_loop(first, stop, visit, start)
        return (out / total[..., None]).swapaxes(1, 2).astype(q.dtype), highest + jnp.log(total)

    out, log_total = jax.lax.map(queries, (_blocks(q, size), _blocks(segments, size), *_visits(segments, size)))
    out, log_total = (checkpoint_name(x, ATTENDED) for x in (_unblocked(out), log_total))
    return out, (q, k, v, segments, out, log_total)


def _blockwise_backward(size: int, residuals, d_out: Array):
    """Recomputes the weights of each pair of blocks from the saved log of the softmax sum (Dao et al. 2022)."""
    q, k, v, segments, out, log_total = residuals
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)  # [b, n, t]
    delta = jnp.moveaxis(delta.reshape(*delta.shape[:2], -1, size), 2, 0)

    def keys(d_q, block):
        k, v, theirs, first, stop = block

        def visit(i, carry):
            d_q, d_k, d_v = carry
            q_block, d_out_block, own = (_block(x, i, size) for x in (q, d_out, segments))
            weights = jnp.exp(_scores(q_block, k, own, theirs) - log_total[i][..., None])
            d_v += _product("bnts,btnh->bsnh", weights.astype(v.dtype), d_out_block)
            d_weights = _product("btnh,bsnh->bnts", d_out_block, v)
            d_scores = (weights * (d_weights - delta[i][..., None])).astype(q.dtype)
            d_k += _product("bnts,btnh->bsnh", d_scores, q_block)
            d_q = d_q.at[i].add(_product("bnts,bsnh->btnh", d_scores, k))
            return d_q, d_k, d_v

        zero = jnp.zeros(k.shape, jnp.float32)
        d_q, d_k, d_v = jax.lax.fori_loop(first, stop, visit, (d_q, zero, zero))
        return d_q, (d_k, d_v)

    d_q = jnp.zeros((log_total.shape[0], q.shape[0], size, *q.shape[2:]), jnp.float32)
    blocks = *(_blocks(x, size) for x in (k, v, segments)), *_visits(segments, size)
    d_q, (d_k, d_v) = jax.lax.scan(keys, d_q, blocks)
    return *(_unblocked(d).astype(q.dtype) for d in (d_q, d_k, d_v)), np.zeros(segments.shape, jax.dtypes.float0)


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _visits(segments: Array, size: int) -> tuple[Array, Array]:
    """Of each block, the first and one past the last block that any row needs."""
    first, stop = visits(segments, size, size)
    return first.min(0), stop.max(0)


def _scores(q: Array, k: Array, own: Array, theirs: Array) -> Array:
    """Scores [b, n, t, s] of one block of queries and one of keys."""
    scores = _product("btnh,bsnh->bnts", q, k)
    return jnp.where(own[:, None, :, None] == theirs[:, None, None, :], scores, MASKED)


def _block(x: Array, i: Array, size: int) -> Array:
    """Block number i of [b, t, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1)


def _blocks(x: Array, size: int) -> Array:
    """[b, t, ...] -> [t / size, b, size, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _unblocked(x: Array) -> Array:
    """[t / size, b, size, ...] -> [b, t, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])

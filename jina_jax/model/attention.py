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

from .kernels.block_mask import MASKED, bounds, visits
from .kernels.gpu import attend_blocks
from .kernels.gpu import serves as serves_gpu
from .kernels.tpu import ATTENDED
from .kernels.tpu_long import attend_long_rows
from .kernels.tpu_long import serves as serves_long
from .kernels.tpu_short import attend_rows, serves
from .lora import precision

LONGEST_PLAIN_ROW = 1024
"""Up to this many tokens the [b, n, t, t] scores of a row are built; longer rows are computed in blocks."""

SMALL_CHIPS = ("TPU v2", "TPU v3", "TPU v4")
"""Kinds of device that have too little memory on the chip for the kernel of long rows: 16 or 32 MiB."""

MOST_PLAIN_SCORES = 2**21
"""Scores of one row, over all heads, from which on a CPU computes row by row: those of all rows would leave its caches."""

BLOCK = 512
"""Keys in a block of the chunked form, about."""

MOST_QUERIES = 2048
"""In a block of the chunked form, about: the more, the fewer passes over the keys. Scores of both stay in a CPU's cache."""


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
    `kernels/gpu_blocks.py`. Everything else is computed by XLA: rows of up to 1,024 tokens at once (large ones on CPU one by
    one), longer ones in blocks. The kernels for TPU have no gradient by the tables.

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
    elif platform() == "cpu" and num_heads * qkv.shape[2] ** 2 > MOST_PLAIN_SCORES:
        form = rowwise_attention
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
def multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for products of bfloat16, as Linux tells. XLA does not say."""
    file = Path("/proc/cpuinfo")
    return file.exists() and any(name in file.read_text() for name in ("amx_bf16", "avx512_bf16"))


def plain_attention(
    qkv: Float[Array, "3 b t d"], segments: Int[Array, "b t"], tables: RotaryTables | None, *, num_heads: int
) -> Float[Array, "b t d"]:
    """The definition: all scores at once."""
    q, k, v = (x.swapaxes(1, 2) for x in _heads(qkv, tables, num_heads))
    out = jax.vmap(_attend_row)(q, k, v, segments).swapaxes(1, 2)
    return checkpoint_name(out.astype(qkv.dtype).reshape(qkv.shape[1:]), ATTENDED)


def rowwise_attention(
    qkv: Float[Array, "3 b t d"], segments: Int[Array, "b t"], tables: RotaryTables | None, *, num_heads: int
) -> Float[Array, "b t d"]:
    """The same with the scores of one row at a time."""
    heads = (x.swapaxes(1, 2) for x in _heads(qkv, tables, num_heads))
    out = jax.lax.map(lambda row: _attend_row(*row), (*heads, segments)).swapaxes(1, 2)
    return checkpoint_name(out.astype(qkv.dtype).reshape(qkv.shape[1:]), ATTENDED)


def _attend_row(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """All heads of one row, [n, t, h]."""
    own = segments[:, None] == segments[None]
    scores = jnp.where(own[None], _product("nth,nsh->nts", q, k), MASKED)
    return _product("nts,nsh->nth", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def chunked_attention(
    qkv: Float[Array, "3 b t d"], segments: Int[Array, "b t"], tables: RotaryTables | None, *, num_heads: int
) -> Float[Array, "b t d"]:
    """The same in blocks of queries and keys with a running softmax; forward and backward in memory linear in t.

    Pairs of blocks without a text in common are left out.
    """
    t = segments.shape[1]
    queries, keys = _block_sizes(t)
    padded = -t % queries
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded), (0, 0), (0, 0))).swapaxes(1, 2) for x in _heads(qkv, tables, num_heads))
    # What is added is a segment of its own, so that even the row's own padding comes out as in the plain form.
    segments = jnp.pad(segments, ((0, 0), (0, padded)), constant_values=-1)
    form = _one_by_one if platform() == "cpu" else _all_at_once
    out = form(q, k, v, segments, *visits(segments, queries, keys), keys)
    return out.swapaxes(1, 2)[:, :t].astype(qkv.dtype).reshape(qkv.shape[1:])


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


def _block_sizes(t: int) -> tuple[int, int]:
    """Queries and keys in a block: as queries a quarter of the row, for most of a long row is its longest text."""
    keys_of_queries = min(max(1, round(t / 4 / BLOCK)), MOST_QUERIES // BLOCK)
    queries = -(-t // max(1, round(t / BLOCK / keys_of_queries)))
    queries += -queries % (8 * keys_of_queries)
    return queries, queries // keys_of_queries


def _one_by_one(q: Array, k: Array, v: Array, segments: Array, first: Array, stop: Array, keys: int) -> Array:
    """Row by row and head by head: what the cores of a CPU work on stays in their caches, and a row visits its own texts alone.

    A CPU without instructions for bfloat16 multiplies float32 twice as fast.
    """
    if q.dtype == jnp.bfloat16 and not multiplies_bfloat16():
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))

    def of_row(row: tuple[Array, ...]) -> Array:
        *heads, segments, first, stop = row
        return jax.lax.map(lambda head: _blockwise(*head, segments, first, stop, keys), tuple(heads))

    return jax.lax.map(of_row, (q, k, v, segments, first, stop))


def _all_at_once(q: Array, k: Array, v: Array, segments: Array, first: Array, stop: Array, keys: int) -> Array:
    """All rows and heads in step, so that a block visits what any row needs."""
    attend = partial(_blockwise, first=first.min(0), stop=stop.max(0), keys=keys)
    return jax.vmap(jax.vmap(attend, (0, 0, 0, None)))(q, k, v, segments)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _blockwise(q: Array, k: Array, v: Array, segments: Array, first: Array, stop: Array, keys: int) -> Array:
    """One head of one row, [t, h]. `first` and `stop` of each block of queries bound the blocks of `keys` tokens it visits."""
    return _blockwise_forward(q, k, v, segments, first, stop, keys)[0]


def _blockwise_forward(q: Array, k: Array, v: Array, segments: Array, first: Array, stop: Array, keys: int):
    """Online softmax (Milakov & Gimelshein 2018): for each block of queries a loop over the blocks of keys."""
    k_blocks, v_blocks, theirs = (_blocks(x, len(x) // keys) for x in (k, v, segments))

    def of_queries(block):
        q, own, first, stop = block

        def visit(j, carry):
            highest, total, out = carry  # [t], [t], [t, h]
            scores = _scores(q, k_blocks[j], own, theirs[j])
            new = jnp.maximum(highest, scores.max(-1))
            weights = jnp.exp(scores - new[:, None])
            decay = jnp.exp(highest - new)
            total = total * decay + weights.sum(-1)
            out = out * decay[:, None] + _product("ts,sh->th", weights.astype(v.dtype), v_blocks[j])
            return new, total, out

        start = jnp.full(len(q), MASKED), jnp.zeros(len(q)), jnp.zeros(q.shape)
        highest, total, out = jax.lax.fori_loop(first, stop, visit, start)
        return (out / total[:, None]).astype(q.dtype), highest, total

    out, *statistics = jax.lax.map(of_queries, (_blocks(q, len(first)), _blocks(segments, len(first)), first, stop))
    out, *statistics = (checkpoint_name(x, ATTENDED) for x in (out.reshape(q.shape), *statistics))
    return out, (q, k, v, segments, first, stop, out, statistics)


def _blockwise_backward(keys: int, residuals, d_out: Array):
    """Recomputes the weights of each pair of blocks from the saved maximum and sum of the softmax (Dao et al. 2022).

    They are [s, t], and the gradient of q [h, t]: XLA's products on CPU are slow where the first operand has to be transposed.
    """
    q, k, v, segments, first, stop, out, (highest, total) = residuals
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    q_blocks, d_out_blocks, own, delta = (_blocks(x, len(first)) for x in (q, d_out, segments, delta))
    k_blocks, v_blocks, theirs = (_blocks(x, len(x) // keys) for x in (k, v, segments))
    key_block = jnp.arange(len(theirs))[:, None]
    visited = (first[None] <= key_block) & (key_block < stop[None])

    def of_keys(d_q, block):
        k, v, theirs, first, stop = block

        def visit(i, carry):
            d_q, d_k, d_v = carry
            weights = jnp.exp(_scores(k, q_blocks[i], theirs, own[i]) - highest[i][None]) / total[i][None]
            d_v += _product("st,th->sh", weights.astype(v.dtype), d_out_blocks[i])
            d_weights = _product("sh,th->st", v, d_out_blocks[i])
            d_scores = (weights * (d_weights - delta[i][None])).astype(q.dtype)
            d_k += _product("st,th->sh", d_scores, q_blocks[i])
            d_q = d_q.at[i].add(_product("sh,st->ht", k, d_scores))
            return d_q, d_k, d_v

        zero = jnp.zeros(k.shape, jnp.float32)
        d_q, d_k, d_v = jax.lax.fori_loop(first, stop, visit, (d_q, zero, zero))
        return d_q, (d_k, d_v)

    d_q = jnp.zeros_like(q_blocks.swapaxes(1, 2), jnp.float32)
    d_q, (d_k, d_v) = jax.lax.scan(of_keys, d_q, (k_blocks, v_blocks, theirs, *bounds(visited)))
    d_q = d_q.swapaxes(1, 2)
    return *(d.reshape(q.shape).astype(q.dtype) for d in (d_q, d_k, d_v)), None, None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _scores(q: Array, k: Array, own: Array, theirs: Array) -> Array:
    """Scores [t, s] of one block of queries and one of keys, or [s, t] if they come the other way round."""
    return jnp.where(own[:, None] == theirs[None], _product("th,sh->ts", q, k), MASKED)


def _blocks(x: Array, count: int) -> Array:
    """[t, ...] -> [count, t / count, ...]."""
    return x.reshape(count, -1, *x.shape[1:])

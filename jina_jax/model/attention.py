"""Rotary positions and attention by segments.

`attention` takes the fused projection [3, b, t, n*h] of packed rows and is the one place that chooses how it is computed. Every
form gives the same result as `plain_attention`: a token attends to all tokens of its own segment, in both directions, and to
nothing else. Padding is a segment of its own (0), so no token is ever without a key and the result is finite everywhere.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from .chunked_attention import blockwise_attention
from .device import device_kind, platform
from .kernels.block_mask import ATTENTION_RESIDUALS, MASK_VALUE
from .kernels.gpu import gpu_flash_attention
from .kernels.gpu import supports as serves_gpu
from .kernels.tpu_long import supports as serves_long
from .kernels.tpu_long import tpu_flash_attention
from .kernels.tpu_short import supports, tpu_fused_attention
from .matmul import einsum
from .rotary import RotaryTables, rotated_heads

LONGEST_PLAIN_ROW = 1024
"""Up to this many tokens the [b, n, t, t] scores of a row are built; longer rows are computed in blocks."""

SMALL_CHIPS = ("TPU v2", "TPU v3", "TPU v4")
"""Kinds of device that have too little memory on the chip for the kernel of long rows: 16 or 32 MiB."""

MOST_PLAIN_SCORES = 2**21
"""Scores of one row, over all heads, from which on a CPU computes row by row: those of all rows would leave its caches."""


def attention(
    qkv: Float[Array, "3 b t d"], segment_ids: Int[Array, "b t"], tables: RotaryTables | None, *, num_heads: int
) -> Float[Array, "b t d"]:
    """Softmax attention within segments over `num_heads` heads, scaled by 1 / sqrt(h).

    On TPU, heads of 64 numbers and of an even count go to a kernel: rows of up to 1,024 tokens to `kernels/rows.py`, of up to
    16,384 (8,192 in float32) to `kernels/long_rows.py`, which needs a v5e or later. On GPU, heads of 16 to 128 numbers go to
    `kernels/gpu_blocks.py`. Everything else is computed by XLA: rows of up to 1,024 tokens at once (large ones on CPU one by
    one), longer ones in blocks. The kernels for TPU have no gradient by the tables.

    Args:
        qkv: the fused projection before rotation; its dtype is that of the products, softmax is in float32.
        segment_ids: 0 = padding; tokens of equal segment see each other.
        tables: rotary angles, or None for a model with absolute positions.
        num_heads: d = n * h.
    """
    on_tpu = platform() == "tpu"
    if on_tpu and supports(qkv, num_heads):
        form = tpu_fused_attention
    elif on_tpu and serves_long(qkv, num_heads) and not device_kind().startswith(SMALL_CHIPS):
        form = tpu_flash_attention
    elif platform() == "gpu" and serves_gpu(qkv, num_heads):
        form = gpu_attention
    elif qkv.shape[2] > LONGEST_PLAIN_ROW:
        form = blockwise_attention
    elif platform() == "cpu" and num_heads * qkv.shape[2] ** 2 > MOST_PLAIN_SCORES:
        form = rowwise_attention
    else:
        form = plain_attention
    return form(qkv, segment_ids, tables, num_heads=num_heads)


def plain_attention(
    qkv: Float[Array, "3 b t d"], segment_ids: Int[Array, "b t"], tables: RotaryTables | None, *, num_heads: int
) -> Float[Array, "b t d"]:
    """The definition: all scores at once."""
    q, k, v = (x.swapaxes(1, 2) for x in rotated_heads(qkv, tables, num_heads))
    out = jax.vmap(_attend_row)(q, k, v, segment_ids).swapaxes(1, 2)
    return checkpoint_name(out.astype(qkv.dtype).reshape(qkv.shape[1:]), ATTENTION_RESIDUALS)


def rowwise_attention(
    qkv: Float[Array, "3 b t d"], segment_ids: Int[Array, "b t"], tables: RotaryTables | None, *, num_heads: int
) -> Float[Array, "b t d"]:
    """The same with the scores of one row at a time."""
    heads = (x.swapaxes(1, 2) for x in rotated_heads(qkv, tables, num_heads))
    out = jax.lax.map(lambda row: _attend_row(*row), (*heads, segment_ids)).swapaxes(1, 2)
    return checkpoint_name(out.astype(qkv.dtype).reshape(qkv.shape[1:]), ATTENTION_RESIDUALS)


def _attend_row(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """All heads of one row, [n, t, h]."""
    own = segment_ids[:, None] == segment_ids[None]
    scores = jnp.where(own[None], einsum("nth,nsh->nts", q, k), MASK_VALUE)
    return einsum("nts,nsh->nth", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def gpu_attention(
    qkv: Float[Array, "3 b t d"],
    segment_ids: Int[Array, "b t"],
    tables: RotaryTables | None,
    *,
    num_heads: int,
    interpret: bool = False,
) -> Float[Array, "b t d"]:
    """The same by a kernel for GPUs. XLA rotates, in one pass with the bias of the projection."""
    return gpu_flash_attention(*rotated_heads(qkv, tables, num_heads), segment_ids, interpret=interpret).reshape(qkv.shape[1:])

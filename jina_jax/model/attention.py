"""Attention within segments: the choice of an implementation, and the plain ones.

`attention` takes the fused projection [3, b, t, n*h] of packed rows and is the one place that
chooses the implementation. All of them give the result of `plain_attention`: a token attends to all
tokens of its segment, in both directions, and to no others. Padding is a segment too (0), so every
token has a key and the result is finite everywhere.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from .chunked_attention import blockwise_attention
from .device import device_kind, platform
from .kernels import gpu, tpu_long, tpu_short
from .kernels.block_mask import ATTENTION_RESIDUALS, MASK_VALUE
from .matmul import einsum
from .rotary import RotaryTables, rotated_heads

LONGEST_PLAIN_ROW = 1024
"""Longest row, in tokens, whose [n, t, t] scores are built; longer rows are computed in blocks."""

SMALL_CHIPS = ("TPU v2", "TPU v3", "TPU v4")
"""Kinds of device with too little on-chip memory for the kernel of long rows: 16 or 32 MiB."""

MOST_PLAIN_SCORES = 2**21
"""Scores of one row, over all heads, above which a CPU computes row by row.

Those of all rows would leave its caches.
"""


def attention(
    qkv: Float[Array, "3 b t d"], segment_ids: Int[Array, "b t"], tables: RotaryTables | None, *, num_heads: int
) -> Float[Array, "b t d"]:
    """Softmax attention within segments over `num_heads` heads, scaled by 1 / sqrt(h).

    On TPU, an even number of heads of 64 elements goes to a kernel: rows of up to 1,024 tokens to
    `kernels/tpu_short.py`, of up to 16,384 (8,192 in float32) to `kernels/tpu_long.py`, which needs
    a v5e or later. On GPU, heads of 16, 32, 64 or 128 elements in half precision go to
    `kernels/gpu.py`. Everything else is computed by XLA: rows of up to 1,024 tokens at once (large
    ones on CPU one by one), longer ones in blocks. The TPU kernels give the tables no gradient.

    Args:
        qkv: the fused projection before rotation; matmuls are in its dtype, softmax in float32.
        segment_ids: 0 = padding; tokens with equal segment ids attend to each other.
        tables: rotary angles, or None for a model with absolute positions.
        num_heads: n, with d = n * h.
    """
    on_tpu = platform() == "tpu"
    if on_tpu and tpu_short.supports(qkv, num_heads):
        implementation = tpu_short.tpu_fused_attention
    elif on_tpu and tpu_long.supports(qkv, num_heads) and not device_kind().startswith(SMALL_CHIPS):
        implementation = tpu_long.tpu_flash_attention
    elif platform() == "gpu" and gpu.supports(qkv, num_heads):
        implementation = gpu_attention
    elif qkv.shape[2] > LONGEST_PLAIN_ROW:
        implementation = blockwise_attention
    elif platform() == "cpu" and num_heads * qkv.shape[2] ** 2 > MOST_PLAIN_SCORES:
        implementation = rowwise_attention
    else:
        implementation = plain_attention
    return implementation(qkv, segment_ids, tables, num_heads=num_heads)


def plain_attention(
    qkv: Float[Array, "3 b t d"], segment_ids: Int[Array, "b t"], tables: RotaryTables | None, *, num_heads: int
) -> Float[Array, "b t d"]:
    """Reference implementation: all scores at once."""
    q, k, v = (x.swapaxes(1, 2) for x in rotated_heads(qkv, tables, num_heads))
    out = jax.vmap(_attend_row)(q, k, v, segment_ids).swapaxes(1, 2)
    return checkpoint_name(out.astype(qkv.dtype).reshape(qkv.shape[1:]), ATTENTION_RESIDUALS)


def rowwise_attention(
    qkv: Float[Array, "3 b t d"], segment_ids: Int[Array, "b t"], tables: RotaryTables | None, *, num_heads: int
) -> Float[Array, "b t d"]:
    """`plain_attention` with the scores of one row at a time."""
    heads = (x.swapaxes(1, 2) for x in rotated_heads(qkv, tables, num_heads))
    out = jax.lax.map(lambda row: _attend_row(*row), (*heads, segment_ids)).swapaxes(1, 2)
    return checkpoint_name(out.astype(qkv.dtype).reshape(qkv.shape[1:]), ATTENTION_RESIDUALS)


def _attend_row(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """Attention over one row, all heads: [n, t, h]."""
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
    """`plain_attention` by the Triton kernel; XLA rotates, in one pass with the qkv bias."""
    return gpu.gpu_flash_attention(*rotated_heads(qkv, tables, num_heads), segment_ids, interpret=interpret).reshape(
        qkv.shape[1:]
    )

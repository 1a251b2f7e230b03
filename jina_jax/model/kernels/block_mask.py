"""Mask of attention in blocks: the score of a foreign key, and the blocks that can be skipped.

The texts of a row lie one behind the other, so the blocks of keys that a block of queries needs are
contiguous.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int

MASK_VALUE = -1e30
"""Score of a foreign key, one of another segment.

Finite: the difference of two of them is a number, and exp(MASK_VALUE - m) is exactly 0.
"""

LAST = np.iinfo(np.int32).max


def block_ranges(
    segment_ids: Int[Array, "b t"], size: int, others: int
) -> tuple[Int[Array, "b blocks"], Int[Array, "b blocks"]]:
    """Range of blocks of `others` tokens that may share a text with each block of `size` tokens.

    Blocks are compared by their lowest and highest segment id, so unordered segments are right too,
    but may cost more visits.

    Returns:
        For each block, the first block of its range and one past the last.
    """
    order = jnp.where(segment_ids <= 0, LAST, segment_ids)  # padding lies behind the texts
    low, high = _extremes(order, size)
    other_low, other_high = _extremes(order, others)
    meet = (low[:, :, None] <= other_high[:, None]) & (other_low[:, None] <= high[:, :, None])
    return bounds(meet)


def bounds(wanted: Bool[Array, "... blocks"]) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Returns the index of the first wanted block, and one past the last."""
    stop = wanted.shape[-1] - jnp.argmax(wanted[..., ::-1], -1)
    return jnp.argmax(wanted, -1).astype(jnp.int32), stop.astype(jnp.int32)


def _extremes(segment_ids: Array, size: int) -> tuple[Array, Array]:
    blocks = segment_ids.reshape(segment_ids.shape[0], -1, size)
    return blocks.min(-1), blocks.max(-1)


ATTENTION_RESIDUALS = "attended"
"""Checkpoint name of the residuals of attention, for `jax.checkpoint`'s policies."""

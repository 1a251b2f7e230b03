"""What attention in blocks shares: the score of a foreign key, and which blocks of a packed row may be left out.

Texts lie one behind the other in a row, so the blocks of keys that a block of queries needs are neighbours.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int

MASK_VALUE = -1e30
"""Score of a foreign key. Finite: the difference of two of them is a number, and exp(MASKED - m) is exactly 0."""

LAST = np.iinfo(np.int32).max


def block_ranges(
    segment_ids: Int[Array, "b t"], size: int, others: int
) -> tuple[Int[Array, "b blocks"], Int[Array, "b blocks"]]:
    """Of each block of `size` tokens, the first and one past the last block of `others` tokens that may share a text with it.

    By the lowest and highest segment of a block, so unordered segments are right too, but may cost more visits.
    """
    order = jnp.where(segment_ids <= 0, LAST, segment_ids)  # padding lies behind the texts
    low, high = _extremes(order, size)
    other_low, other_high = _extremes(order, others)
    meet = (low[:, :, None] <= other_high[:, None]) & (other_low[:, None] <= high[:, :, None])
    return bounds(meet)


def bounds(wanted: Bool[Array, "... blocks"]) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """The first block that is wanted, and one past the last."""
    stop = wanted.shape[-1] - jnp.argmax(wanted[..., ::-1], -1)
    return jnp.argmax(wanted, -1).astype(jnp.int32), stop.astype(jnp.int32)


def _extremes(segment_ids: Array, size: int) -> tuple[Array, Array]:
    blocks = segment_ids.reshape(segment_ids.shape[0], -1, size)
    return blocks.min(-1), blocks.max(-1)


ATTENTION_RESIDUALS = "attended"
"""Name of what the backward pass needs of the forward pass, for `jax.checkpoint`'s policies."""

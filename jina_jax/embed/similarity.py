"""Cosine similarity of embeddings on the host."""

from typing import Any

import numpy as np
from jaxtyping import Float

SMALLEST_NORM = 1e-12
"""Vectors of a smaller norm are divided by this: a zero vector stays zero."""


def normalize(embeddings: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    """Divides each embedding by its norm."""
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=-1, keepdims=True), SMALLEST_NORM)


def cosine_similarity(
    embeddings1: Float[Any, "n d"] | Float[Any, " d"], embeddings2: Float[Any, "m d"] | Float[Any, " d"]
) -> Float[np.ndarray, "n m"]:
    """Returns the cosine of every row of one with every row of the other; a vector counts as one
    row.

    Raises:
        ValueError: the embeddings are integers, that is bits or steps.
    """
    return _unit_rows(embeddings1) @ _unit_rows(embeddings2).T


def pairwise_cosine_similarity(
    embeddings1: Float[Any, "n d"] | Float[Any, " d"], embeddings2: Float[Any, "n d"] | Float[Any, " d"]
) -> Float[np.ndarray, " n"]:
    """Returns the cosine of each row of one with the same row of the other."""
    return np.einsum("nd,nd->n", _unit_rows(embeddings1), _unit_rows(embeddings2))


def _unit_rows(embeddings: Any) -> np.ndarray:
    array = np.asarray(embeddings)
    if array.dtype.kind in "iub":
        raise ValueError(
            f"similarities are of floats, not of {array.dtype}: encode with precision float32; what is quantised turns back "
            "by np.unpackbits (ubinary), or by low + step * (x - lowest x) with the ranges that it was quantised with"
        )
    return normalize(np.atleast_2d(array.astype(np.float32)))

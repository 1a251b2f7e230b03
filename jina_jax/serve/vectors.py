"""Embeddings in the forms in which they are sent."""

import base64
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ..embed.quantize import quantize
from ..embed.similarity import normalize

Rows = Float[np.ndarray, "n d"]


def finished(results: Sequence[np.ndarray], dim: int, *, normalized: bool) -> Rows:
    """Returns embeddings cut to their leading dimensions and scaled to length 1, in this order."""
    embeddings = np.ascontiguousarray(np.stack(results)[:, :dim])
    return normalize(embeddings) if normalized else embeddings


def _base64(embeddings: Rows) -> list[str]:
    """Little-endian float32, as the official clients decode it."""
    return [base64.b64encode(row.tobytes()).decode() for row in embeddings.astype("<f4")]


def _int8(embeddings: Rows) -> np.ndarray:
    """A fixed map of -1..1: what one request gets does not depend on the others."""
    return np.clip(np.rint(embeddings * 127), -128, 127).astype(np.int8)


def _uint8(embeddings: Rows) -> np.ndarray:
    return np.clip(np.rint((embeddings + 1) * 127.5), 0, 255).astype(np.uint8)


FORMS: dict[str, Callable[[Rows], Any]] = {
    "float": lambda embeddings: embeddings,
    "base64": _base64,
    "binary": lambda embeddings: quantize(embeddings, "binary"),
    "ubinary": lambda embeddings: quantize(embeddings, "ubinary"),
    "int8": _int8,
    "uint8": _uint8,
}
"""From embeddings to one item a text, which orjson writes as it is."""

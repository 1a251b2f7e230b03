"""Quantises embeddings to bytes or bits, as sentence-transformers' `quantize_embeddings` does."""

import logging
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Num

logger = logging.getLogger(__name__)

EmbeddingPrecision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
EMBEDDING_PRECISIONS = get_args(EmbeddingPrecision)

_FEW_EMBEDDINGS = 100


def quantize(embeddings: Float[np.ndarray, "n d"], precision: EmbeddingPrecision) -> Num[np.ndarray, "n _"]:
    """Quantises embeddings.

    Returns:
        float32: [n, d], unchanged.
        int8 and uint8: [n, d], in 256 steps between each dimension's minimum and maximum in
            `embeddings`.
        binary (int8) and ubinary (uint8): [n, ceil(d / 8)], the signs packed into bits.

    Raises:
        ValueError: an unknown precision, or a single embedding to take int8 or uint8 ranges from.
    """
    match precision:
        case "float32":
            return embeddings
        case "ubinary":
            return np.packbits(embeddings > 0, axis=-1)
        case "binary":
            return (np.packbits(embeddings > 0, axis=-1).astype(np.int16) - 128).astype(np.int8)
        case "uint8":
            return _steps(embeddings, precision).astype(np.uint8)
        case "int8":
            return (_steps(embeddings, precision) - 128).astype(np.int8)
    raise ValueError(f"unknown precision {precision!r}; use one of {list(EMBEDDING_PRECISIONS)}")


def _steps(embeddings: np.ndarray, precision: str) -> np.ndarray:
    if len(embeddings) == 0:
        return embeddings
    if len(embeddings) == 1:
        raise ValueError(f"{precision} takes its ranges from the embeddings of a call; one embedding has none")
    if len(embeddings) < _FEW_EMBEDDINGS:
        logger.warning("%s ranges are taken from only %d embeddings", precision, len(embeddings))
    low, high = embeddings.min(axis=0), embeddings.max(axis=0)
    step = (high - low) / np.float32(255)
    return np.clip(np.floor((embeddings - low) / np.where(step == 0, np.float32(1), step)), 0, 255)

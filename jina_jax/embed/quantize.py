"""Quantises embeddings to bytes or bits, as sentence-transformers' `quantize_embeddings` does, and
reads them back."""

import logging
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Num

logger = logging.getLogger(__name__)

EmbeddingPrecision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
EMBEDDING_PRECISIONS = get_args(EmbeddingPrecision)

_FEW_EMBEDDINGS = 100


def quantize(embeddings: Float[np.ndarray, "n d"], precision: EmbeddingPrecision, ranges: Any = None) -> Num[np.ndarray, "n _"]:
    """Quantises embeddings.

    Args:
        embeddings: to quantise.
        precision: of the result.
        ranges: least and largest value of each dimension [2, d], for int8 and uint8, from
            embeddings of the kind that is quantised; values beyond them become the ends. Only
            embeddings of the same ranges can be compared. None = those of `embeddings`.

    Returns:
        float32: [n, d], unchanged.
        int8 and uint8: [n, d], in 256 steps between the ends of each dimension's range.
        binary (int8) and ubinary (uint8): [n, ceil(d / 8)], the signs packed into bits.

    Raises:
        ValueError: an unknown precision, a single embedding to take int8 or uint8 ranges from, or
            ranges that are none.
    """
    ranges = parse_ranges(ranges, precision, embeddings.shape[-1])
    match precision:
        case "float32":
            return embeddings
        case "ubinary":
            return np.packbits(embeddings > 0, axis=-1)
        case "binary":
            return (np.packbits(embeddings > 0, axis=-1).astype(np.int16) - 128).astype(np.int8)
        case "uint8":
            return _steps(embeddings, precision, ranges).astype(np.uint8)
        case "int8":
            return (_steps(embeddings, precision, ranges) - 128).astype(np.int8)
    raise ValueError(f"unknown precision {precision!r}; use one of {list(EMBEDDING_PRECISIONS)}")


def dequantize(
    embeddings: Num[np.ndarray, "n _"], precision: EmbeddingPrecision, dim: int, ranges: Any = None
) -> Float[np.ndarray, "n {dim}"]:
    """Returns the values that quantised embeddings stand for.

    Args:
        embeddings: as `quantize` returns them.
        precision: of the embeddings.
        dim: how many dimensions they had.
        ranges: those that they were quantised with, for int8 and uint8.

    Returns:
        The middle of each value's step, and for bits +1 and -1, in float32.

    Raises:
        ValueError: an unknown precision, no ranges for int8 and uint8, or ranges that are none.
    """
    ranges = parse_ranges(ranges, precision, dim)
    match precision:
        case "float32":
            return embeddings
        case "ubinary":
            return _signs(embeddings, dim)
        case "binary":
            return _signs((embeddings.astype(np.int16) + 128).astype(np.uint8), dim)
        case "uint8" | "int8":
            if ranges is None:
                raise ValueError(f"{precision} embeddings are read with the ranges that they were quantised with")
            low, high = ranges
            steps = embeddings.astype(np.float32) + np.float32(128 if precision == "int8" else 0)
            return np.minimum(low + (high - low) / np.float32(255) * (steps + np.float32(0.5)), high)
    raise ValueError(f"unknown precision {precision!r}; use one of {list(EMBEDDING_PRECISIONS)}")


def parse_ranges(ranges: Any, precision: str, dim: int) -> np.ndarray | None:
    """Returns calibration ranges as an array [2, d], or None where none are given.

    Raises:
        ValueError: the precision takes none, or they are not a minimum and a maximum for each of
            `dim` dimensions.
    """
    if ranges is None:
        return None
    if precision not in ("int8", "uint8"):
        raise ValueError(f"ranges are for the precisions int8 and uint8, not for {precision}")
    try:
        ranges = np.asarray(ranges, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"ranges must be numbers [2, {dim}]: {error}") from error
    if ranges.shape != (2, dim):
        raise ValueError(f"ranges must be [2, {dim}], least and largest value of each dimension, not {ranges.shape}")
    if not np.isfinite(ranges).all() or (ranges[0] > ranges[1]).any():
        raise ValueError("ranges must be finite, and no least value above its largest")
    return ranges


def _signs(bits: np.ndarray, dim: int) -> np.ndarray:
    return 2 * np.unpackbits(bits, axis=-1, count=dim).astype(np.float32) - 1


def _steps(embeddings: np.ndarray, precision: str, ranges: np.ndarray | None) -> np.ndarray:
    if len(embeddings) == 0:
        return embeddings
    if ranges is None and len(embeddings) == 1:
        raise ValueError(f"{precision} takes its ranges from the embeddings of a call; one embedding has none: give `ranges`")
    if ranges is None and len(embeddings) < _FEW_EMBEDDINGS:
        logger.warning("%s ranges are taken from only %d embeddings", precision, len(embeddings))
    low, high = (embeddings.min(axis=0), embeddings.max(axis=0)) if ranges is None else ranges
    step = (high - low) / np.float32(255)
    return np.clip(np.floor((embeddings - low) / np.where(step == 0, np.float32(1), step)), 0, 255)

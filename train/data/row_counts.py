"""Row counts that a stage's batches may have, fitted to the lengths of its texts.

Each combination of row counts is a program to compile, and rows beyond what a batch needs are
computed for nothing. So a few texts are tokenised before training, batches of such lengths are
drawn, and the counts are those that leave the fewest empty rows in them.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from jina_jax.text import packing

from ..config import Stage

ChunkRows = int | Literal["auto"] | None
"""`Stage.encode_chunk_rows`."""

SAMPLED_EXAMPLES = 2048
"""Examples of a stage that are tokenised to learn the lengths of its texts."""

DRAWN_BATCHES = 256
DRAWN_TEXTS = 1_000_000
"""Batches that are drawn from these lengths, or texts of them, whichever are fewer."""

SLACK = 0.25
"""Rows beyond the most that a drawn batch needs, relative to the distance of that from the mean. A
batch that needs still more, one in some thousands, takes the largest shape."""

WORTH = 0.01
"""Fraction of all rows that a further combination of row counts must save."""


def texts_per_row(stage: Stage) -> int:
    """Most texts of a packed row.

    MLM takes fewer: each text rounds its masked tokens up, and the loss has room for all of them.
    """
    return stage.row_length // 16 if stage.objective == "mlm" else packing.max_texts(stage.row_length)


def most_rows(examples: int, texts: int, stage: Stage) -> tuple[int, ...]:
    """Returns rows of each part of a batch that hold its texts even if all are of full length.

    Packed rows, except the last, are so full that no further text fits, so each holds at least
    row_length // max_length texts.

    Args:
        examples: examples on each device.
        texts: of each example.
        stage: gives `row_length`, `max_length`, `adapters` and `encode_chunk_rows`.
    """
    per_row = min(stage.row_length // stage.max_length, texts_per_row(stage))
    of_parts = (examples, examples * (texts - 1)) if len(stage.adapters) == 2 else (examples * texts,)
    return tuple(in_even_chunks(-(-held // per_row), stage.encode_chunk_rows) for held in of_parts)


def chunk_count(rows: int, chunk_rows: ChunkRows) -> int:
    """Number of equal chunks of at most `chunk_rows` rows; None = one chunk, "auto" = not known."""
    return max(-(-rows // chunk_rows), 1) if isinstance(chunk_rows, int) else 1


def in_even_chunks(rows: int, chunk_rows: ChunkRows) -> int:
    """Returns the least number of at least `rows` rows that splits into as many equal chunks."""
    chunks = chunk_count(rows, chunk_rows)
    return -(-rows // chunks) * chunks


def rows_needed(
    stage: Stage,
    lengths: Sequence[Sequence[Int[np.ndarray, " texts"]]],
    weights: Float[np.ndarray, " datasets"],
    devices: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, "batches parts"]:
    """Draws batches of sampled lengths and returns the rows that their fullest device needs.

    Args:
        stage: gives `batch_size` and the rows' sizes.
        lengths: of each dataset, for each part of its batches: the lengths of each sampled
            example's texts, [n, texts].
        weights: fraction of the batches that are of each dataset.
        devices: over which a batch is split.
        rng: random generator.
    """
    texts = stage.batch_size * max(sum(part.shape[1] for part in parts) for parts in lengths)
    batches = int(np.clip(DRAWN_TEXTS // texts, 8, DRAWN_BATCHES))
    needed = []
    for dataset in rng.choice(len(lengths), size=batches, p=weights / weights.sum()):
        parts = lengths[dataset]
        drawn = rng.integers(len(parts[0]), size=(devices, stage.batch_size // devices))
        needed.append([max(_packed_rows(part[device], stage) for device in drawn) for part in parts])
    return np.array(needed)


def fitted_row_counts(
    needed: Int[np.ndarray, "batches parts"], most: Sequence[int], fitted: int, chunk_rows: ChunkRows
) -> tuple[tuple[int, ...], ...]:
    """Returns combinations of row counts that leave few empty rows, the fewest rows first.

    Args:
        needed: from `rows_needed`.
        most: from `most_rows`; the last combination.
        fitted: combinations before the last one, at most.
        chunk_rows: most rows encoded at once.
    """
    ordered = needed[np.argsort(needed.sum(axis=1), kind="stable")]
    most_drawn = ordered.max(axis=0, keepdims=True)
    largest = np.ceil(most_drawn + SLACK * (most_drawn - ordered.mean(axis=0))).astype(ordered.dtype)
    counts = {
        tuple(min(in_even_chunks(int(rows), chunk_rows), limit) for rows, limit in zip(group, most, strict=True))
        for group in (_groups(np.concatenate([ordered, largest]), fitted) if fitted else ())
    }
    return (*sorted(counts - {tuple(most)}, key=lambda rows: (sum(rows), rows)), tuple(most))


def _packed_rows(lengths: Int[np.ndarray, "examples texts"], stage: Stage) -> int:
    return len(packing.best_fit_decreasing(lengths.reshape(-1).tolist(), stage.row_length, texts_per_row(stage)))


def _groups(ordered: Int[np.ndarray, "batches parts"], groups: int) -> list[Int[np.ndarray, " parts"]]:
    """Splits batches, in their order, into groups that all take the most rows of one of them.

    The groups are those that take the fewest rows in all, found by dynamic programming.

    Args:
        ordered: rows of each batch.
        groups: of them at most; a further one must be worth it.

    Returns:
        The rows of each group.
    """
    count = len(ordered)
    # cost[i, j]: rows that the batches i .. j take as one group
    cost = np.full((count, count), np.inf)
    for first in range(count):
        most = np.maximum.accumulate(ordered[first:], axis=0).sum(axis=1)
        cost[first, first:] = most * np.arange(1, count - first + 1)
    least, starts = cost[0], [np.zeros(count, int)]
    while len(starts) < groups:
        # The last group begins at i + 1, behind the best split of 0 .. i.
        totals = least[:-1, None] + cost[1:]
        if totals[:, -1].min(initial=np.inf) > (1 - WORTH) * least[-1]:
            break
        starts.append(np.where(totals.min(axis=0) < least, totals.argmin(axis=0) + 1, -1))
        least = np.minimum(least, totals.min(axis=0))
    found, end = [], count
    for start in reversed(starts):
        if end and start[end - 1] >= 0:  # below zero: fewer groups take as few rows
            found.append(ordered[start[end - 1] : end].max(axis=0))
            end = start[end - 1]
    return found

"""Texts to packed rows and back.

A row of `t` token slots holds several texts; `segment_ids` says which text of its row a token
belongs to. Rows come in a few fixed shapes, so that whatever the lengths of the texts, only a few
programs are ever compiled.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

ROW_LENGTHS = (512, 1024, 2048, 4096, 8320)
"""Lengths of full-size rows. The last one holds the longest text of the model, 8,194 tokens, in
whole lanes of 128."""

SMALL_ROW_LENGTHS = (12, 16, 24, 32, 64, 128)
"""Lengths of a lone row for a call so small that it fits into one.

A CPU takes longer for every slot, where a TPU or GPU hardly does.
"""

TOKENS_PER_TEXT = 8
"""A row of t slots holds at most t / 8 texts, which bounds the arrays per text. Queries of ten
tokens still fill it."""

FULL = 0.95
"""Filled fraction of its token slots at which a batch no longer waits for more texts."""


class PackedBatch(NamedTuple):
    """One batch of packed rows: the inputs of the encoder, and where each text went."""

    tokens: Int[np.ndarray, "b t"]
    segment_ids: Int[np.ndarray, "b t"]
    """0 = padding, 1..g = which text of the row a token belongs to."""
    positions: Int[np.ndarray, "b t"]
    """Counted from 0 inside each text."""
    texts: Int[np.ndarray, "b g"]
    """Index of the text in the list that was packed, -1 = none."""
    pool_ids: Int[np.ndarray, "b t"]
    """Which embedding of the row a token is averaged into, 0 = none: that of its text, or chunk."""
    truncated: int = 0
    """Texts of the batch that were longer than the limit."""


class BatchPlan(NamedTuple):
    """Texts of each row of a batch, and the shape (rows, slots) of its arrays."""

    rows: list[list[int]]
    shape: tuple[int, int]


def max_texts(row_length: int) -> int:
    return row_length // TOKENS_PER_TEXT


def best_fit_decreasing(lengths: Sequence[int], capacity: int, max_texts_per_row: int) -> list[list[int]]:
    """Packs texts, longest first, each into the fullest row that still takes it.

    Args:
        lengths: tokens of each text, 1..capacity.
        capacity: token slots of a row.
        max_texts_per_row: texts a row may hold.

    Returns:
        The indices of the texts of each row; every text is in exactly one row.
    """
    rows: list[list[int]] = []
    open_rows: defaultdict[int, list[int]] = defaultdict(list)  # by free slots
    # bit f is set while a row with f free slots is open: the best fit is one shift away
    occupied = 0
    for text in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[text]
        if not 1 <= length <= capacity:
            raise ValueError(f"text {text} has {length} tokens; a row takes 1 to {capacity}")
        fitting = occupied >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                occupied &= ~(1 << free)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(text)
        free -= length
        if free and len(rows[row]) < max_texts_per_row:
            open_rows[free].append(row)
            occupied |= 1 << free
    return rows


def plan_batches(lengths: Sequence[int], budget: int, devices: int = 1) -> list[BatchPlan]:
    """Splits texts into batches of packed rows whose shapes come from a short fixed list.

    Args:
        lengths: tokens of each text, at most the last of ROW_LENGTHS.
        budget: most token slots of a batch on each device; a text longer than that gets a row of
            its own all the same.
        devices: over which a batch is split: its number of rows is a multiple of this.

    Returns:
        Batches that hold every text once. A call that fits into one small row gets just that.
    """
    if not lengths:
        return []
    for length in SMALL_ROW_LENGTHS:
        if sum(lengths) <= length and len(lengths) <= max_texts(length):
            return [BatchPlan([list(range(len(lengths)))], (devices, length))]
    return plan_without_small_rows(lengths, budget, devices)


def plan_full_batches(lengths: Sequence[int], budget: int, devices: int = 1) -> list[BatchPlan]:
    """Plans those batches that no further text would fill better: of the largest shape, and full.

    Args: see `plan_batches`.
    """

    def is_full(batch: BatchPlan) -> bool:
        b, t = batch.shape
        held = sum(lengths[text] for row in batch.rows for text in row)
        return b == most_rows(budget, t) * devices and held >= FULL * b * t

    return [batch for batch in plan_without_small_rows(lengths, budget, devices) if is_full(batch)]


def plan_without_small_rows(lengths: Sequence[int], budget: int, devices: int = 1) -> list[BatchPlan]:
    """Plans batches of full-size rows only; each row takes the shortest length that fits its
    longest text.

    Args: see `plan_batches`.
    """
    batches = []
    shortest = 0
    for length in ROW_LENGTHS:
        members = [i for i, n in enumerate(lengths) if shortest < n <= length]
        shortest = length
        packed = best_fit_decreasing([lengths[i] for i in members], length, max_texts(length))
        rows = [[members[i] for i in row] for row in packed]
        for start, count in _cut(-(-len(rows) // devices), most_rows(budget, length)):
            own = rows[start * devices : (start + count) * devices]
            batches.append(BatchPlan(own, (count * devices, length)))
    if longest := [n for n in lengths if n > shortest]:
        raise ValueError(f"a text has {max(longest)} tokens; the longest row holds {shortest}")
    return batches


def row_shapes(longest: int, budget: int, devices: int = 1) -> list[tuple[int, int]]:
    """Returns every shape (rows, slots) of the batches of texts of up to `longest` tokens, smallest
    first.

    Args: see `plan_batches`.
    """
    lengths = [length for length in ROW_LENGTHS if length <= row_length(longest)]
    full = [(count * devices, length) for length in lengths for count in row_counts(most_rows(budget, length))]
    small = [(devices, length) for length in SMALL_ROW_LENGTHS if length <= row_length(longest)]
    return sorted(small + full, key=lambda shape: (shape[0] * shape[1], shape[1]))


def row_length(tokens: int) -> int:
    """Returns the length of the full-size rows that a text belongs into.

    Raises:
        ValueError: no row is that long.
    """
    for length in ROW_LENGTHS:
        if tokens <= length:
            return length
    raise ValueError(f"a text has {tokens} tokens; the longest row holds {ROW_LENGTHS[-1]}")


def most_rows(budget: int, length: int) -> int:
    """Rows of a batch on one device."""
    return max(1, budget // length)


def row_counts(largest: int) -> list[int]:
    """Numbers of rows that batches have: 1, 4, 16, ... and `largest`."""
    counts = [1]
    while counts[-1] * 4 <= largest:
        counts.append(counts[-1] * 4)
    return counts if counts[-1] == largest else [*counts, largest]


def lay_out(token_ids: Sequence[Sequence[int] | np.ndarray], batch: BatchPlan, pad_id: int) -> PackedBatch:
    """Writes the tokens of a planned batch into arrays; empty slots are padding."""
    b, t = batch.shape
    rows = PackedBatch(
        tokens=np.full((b, t), pad_id, np.int32),
        segment_ids=np.zeros((b, t), np.int32),
        positions=np.zeros((b, t), np.int32),
        texts=np.full((b, max_texts(t)), -1, np.int32),
        pool_ids=np.zeros((b, t), np.int32),
    )
    for row, texts in enumerate(batch.rows):
        start = 0
        for index_in_row, text in enumerate(texts):
            end = start + len(token_ids[text])
            rows.tokens[row, start:end] = token_ids[text]
            rows.segment_ids[row, start:end] = index_in_row + 1
            rows.pool_ids[row, start:end] = index_in_row + 1
            rows.positions[row, start:end] = np.arange(end - start)
            rows.texts[row, index_in_row] = text
            start = end
    return rows


def scatter(pooled: np.ndarray, rows: PackedBatch, out: np.ndarray) -> None:
    """Puts the pooled vectors [b, g, d] of a batch at their texts' places in `out` [texts, d]."""
    held = rows.texts >= 0
    out[rows.texts[held]] = pooled[held]


def _cut(count: int, largest: int) -> list[tuple[int, int]]:
    """Cuts `count` rows into (start, size) batches of `row_counts(largest)` rows, the last at most
    a quarter empty."""
    cuts, start = [], 0
    while start < count:
        size = next_count(count - start, largest)
        cuts.append((start, size))
        start += size
    return cuts


def next_count(left: int, largest: int) -> int:
    """Returns how many rows the next batch has where `left` rows are to be computed."""
    counts = row_counts(largest)
    padded = min((count for count in counts if count >= left), default=counts[-1])
    return padded if left >= 0.75 * padded else max(count for count in counts if count <= left)

"""Texts to batches of packed rows: tokenised chunk by chunk, while the device computes batches of
earlier chunks."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .packing import PackedBatch, lay_out, plan_batches, plan_full_batches, plan_without_small_rows

FIRST_CHUNK = 128
"""Texts of the first chunk, for which the device waits. Each chunk is twice the one before it."""

LARGEST_CHUNK = 4096
"""Texts that are tokenised, and may wait for others, at most: enough to fill rows well."""


Tokenize = Callable[[Sequence[str]], tuple[list[list[int]], list[bool]]]
"""From texts to the token ids of each, and whether it was cut."""


def packed_batches(
    texts: Sequence[str],
    tokenize: Tokenize,
    pad_id: int,
    budget: int,
    devices: int = 1,
    *,
    first_chunk: int = FIRST_CHUNK,
    largest_chunk: int = LARGEST_CHUNK,
) -> Iterator[PackedBatch]:
    """Batches that hold every text once; `PackedBatch.texts` are indices in `texts`.

    Texts that do not fill a batch wait for those of the next chunks, so that chunks cost no empty
    rows.

    Args:
        texts: what to pack.
        tokenize: token ids of some of the texts; but for the first, in another thread.
        pad_id: token of empty slots.
        budget, devices: as in `packing.plan_batches`.
        first_chunk, largest_chunk: see FIRST_CHUNK and LARGEST_CHUNK.
    """
    # index of a text, its tokens, whether it was cut
    waiting: list[tuple[int, list[int], bool]] = []
    start = 0
    for (chunk_ids, chunk_cut), is_last in _tokenized(_chunks(texts, first_chunk, largest_chunk), tokenize):
        waiting += zip(range(start, start + len(chunk_ids)), chunk_ids, chunk_cut, strict=True)
        start += len(chunk_ids)
        token_ids = [ids for _, ids, _ in waiting]
        indices, cut = np.array([index for index, *_ in waiting]), np.array([cut for *_, cut in waiting], bool)
        if not is_last and len(waiting) < largest_chunk:
            plan_now = plan_full_batches
        # a small row is for a small call: for what is left of a larger one it would be a program
        # more to compile
        else:
            plan_now = plan_batches if len(waiting) == start else plan_without_small_rows
        batches = plan_now([len(ids) for ids in token_ids], budget, devices)
        for batch in batches:
            rows = lay_out(token_ids, batch, pad_id)
            truncated = int(cut[rows.texts[rows.texts >= 0]].sum())
            yield rows._replace(texts=np.where(rows.texts < 0, -1, indices[rows.texts]), truncated=truncated)
        packed = {text for batch in batches for row in batch.rows for text in row}
        waiting = [each for i, each in enumerate(waiting) if i not in packed]


def _tokenized(chunks: list[Sequence[str]], tokenize: Tokenize) -> Iterator[tuple[tuple[list[list[int]], list[bool]], bool]]:
    """Token ids of each chunk, and whether it is the last; the next one is tokenised while the
    caller works on it."""
    first, *others = chunks
    token_ids = tokenize(first)
    with ThreadPoolExecutor(1) as pool:
        for chunk in others:
            following = pool.submit(tokenize, chunk)
            yield token_ids, False
            token_ids = following.result()
    yield token_ids, True


def _chunks(texts: Sequence[str], first: int, largest: int) -> list[Sequence[str]]:
    chunks, size = [texts[:first]], first
    start = size
    while start < len(texts):
        size = min(2 * size, largest)
        chunks.append(texts[start : start + size])
        start += size
    return chunks

"""Texts to batches, chunk by chunk: every text once, in rows as full as if packed together."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jina_jax.text.batching import packed_batches
from jina_jax.text.packing import plan_batches, plan_full_batches

BUDGET = 1024


def of_length(texts: list[str]) -> tuple[list[list[int]], list[bool]]:
    """A text is its number of tokens, and so is each of its tokens.

    Those of an odd number count as cut.
    """
    return [[int(text)] * int(text) for text in texts], [int(text) % 2 == 1 for text in texts]


def recorded() -> tuple[list[int], Callable]:
    """`of_length`, and the number of texts of each of its calls."""
    seen: list[int] = []

    def tokenize(texts: list[str]) -> tuple[list[list[int]], list[bool]]:
        seen.append(len(texts))
        return of_length(texts)

    return seen, tokenize


@given(
    st.lists(st.one_of(st.integers(1, 60), st.integers(1, 1100), st.integers(1, 8194)), min_size=1, max_size=60),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 3),
)
def test_every_text_is_laid_out_once_in_its_place(lengths, first, largest, devices):
    found = []
    sizes = {"first_chunk": first, "largest_chunk": largest}
    for rows in packed_batches([str(n) for n in lengths], of_length, 0, BUDGET, devices, **sizes):
        assert rows.tokens.shape[0] % devices == 0
        for row, slot in zip(*np.nonzero(rows.texts >= 0), strict=True):
            text = rows.texts[row, slot]
            own = rows.tokens[row][rows.segment_ids[row] == slot + 1]
            np.testing.assert_array_equal(own, [lengths[text]] * lengths[text])
            found.append(text)
        assert (rows.tokens[rows.segment_ids == 0] == 0).all()
        assert rows.truncated == sum(lengths[text] % 2 for text in rows.texts[rows.texts >= 0])
    assert sorted(found) == list(range(len(lengths)))


@given(st.lists(st.one_of(st.integers(1, 60), st.integers(1, 1100)), max_size=120), st.integers(1, 9000), st.integers(1, 4))
def test_full_batches_are_those_of_the_plan_that_others_could_not_fill(lengths, budget, devices):
    full = plan_full_batches(lengths, budget, devices)
    assert all(batch in plan_batches(lengths, budget, devices) for batch in full)
    for batch in full:
        b, t = batch.shape
        assert len(batch.rows) == b == max(1, budget // t) * devices
        assert sum(lengths[text] for row in batch.rows for text in row) >= 0.95 * b * t


def test_the_corpus_in_chunks_takes_no_more_slots_than_together(corpus, tokenizer):
    def tokenize(texts):
        ids = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts)]
        return ids, [False] * len(ids)

    for texts in (corpus[:512], corpus[:2000], sorted(corpus[:2000], key=len)):
        together = sum(
            b * t for b, t in (batch.shape for batch in plan_batches([len(ids) for ids in tokenize(texts)[0]], 8192))
        )
        in_chunks = sum(rows.tokens.size for rows in packed_batches(texts, tokenize, 1, 8192))
        assert in_chunks <= 1.02 * together


def test_texts_wait_for_others_that_fill_their_rows():
    seen, tokenize = recorded()
    (rows,) = packed_batches(["300", "300", "200", "200"], tokenize, 0, BUDGET, first_chunk=2, largest_chunk=100)
    assert seen == [2, 2] and rows.tokens.shape == (2, 512) and (rows.segment_ids > 0).sum() == 1000


def test_only_a_small_call_gets_a_small_row():
    def shapes(*texts: str) -> list[tuple[int, int]]:
        batches = packed_batches(texts, of_length, 0, BUDGET, first_chunk=2, largest_chunk=100)
        return [batch.tokens.shape for batch in batches]

    assert shapes("512", "512", "5") == [(2, 512), (1, 512)]
    assert shapes("5", "5", "5") == [(1, 24)]


def test_texts_that_nothing_fills_do_not_wait_for_the_end():
    seen, tokenize = recorded()
    batches = packed_batches(["300"] * 40, tokenize, 0, BUDGET, first_chunk=2, largest_chunk=8)
    next(batches)
    assert sum(seen) <= 22  # eight wait at most, and the next chunk may have been begun
    batches.close()


def test_an_error_of_the_tokenizer_is_the_callers():
    def tokenize(texts):
        if "2" in texts:
            raise RuntimeError("not this one")
        return of_length(texts)

    with pytest.raises(RuntimeError, match="not this one"):
        list(packed_batches(["1", "1", "1", "2"], tokenize, 0, BUDGET, first_chunk=1, largest_chunk=8))

"""Packing: every text once, in its place, in rows of few shapes that are nearly full."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jina_jax.text import packing
from jina_jax.text.packing import (
    ROW_LENGTHS,
    SMALL_ROW_LENGTHS,
    BatchPlan,
    best_fit_decreasing,
    lay_out,
    max_texts,
    plan_batches,
    scatter,
)

LONGEST = ROW_LENGTHS[-1]
short_texts = st.lists(st.integers(1, 60), max_size=120)
any_texts = st.lists(st.one_of(st.integers(1, 60), st.integers(1, 1100), st.integers(1, LONGEST)), max_size=120)


def flat(rows: list[list[int]]) -> list[int]:
    return [text for row in rows for text in row]


@given(short_texts, st.integers(60, 512), st.integers(1, 32))
def test_best_fit_holds_each_text_once_within_capacity(lengths, capacity, most):
    rows = best_fit_decreasing(lengths, capacity, most)
    assert sorted(flat(rows)) == list(range(len(lengths)))
    assert all(1 <= len(row) <= most and sum(lengths[i] for i in row) <= capacity for row in rows)


@given(short_texts, st.integers(60, 512), st.integers(1, 32))
def test_best_fit_opens_a_row_only_for_a_text_that_no_earlier_row_takes(lengths, capacity, most):
    rows = best_fit_decreasing(lengths, capacity, most)
    free = [capacity - sum(lengths[i] for i in row) for row in rows]
    for later, row in enumerate(rows):
        first = lengths[row[0]]
        assert all(free[earlier] < first or len(rows[earlier]) == most for earlier in range(later))


def test_best_fit_takes_the_fullest_row_that_fits():
    assert best_fit_decreasing([6, 7, 3, 4], 10, 10) == [[1, 2], [0, 3]]
    assert best_fit_decreasing([8, 5, 2, 5], 10, 10) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("length", [0, -1, 11])
def test_best_fit_names_a_text_that_fits_no_row(length):
    with pytest.raises(ValueError, match=f"text 1 has {length} tokens; a row takes 1 to 10"):
        best_fit_decreasing([3, length], 10, 4)


@given(any_texts, st.integers(1, 20_000))
def test_plan_holds_each_text_once_in_rows_of_fixed_shapes(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(flat([row for batch in batches for row in batch.rows])) == list(range(len(lengths)))
    for batch in batches:
        b, t = batch.shape
        assert t in ROW_LENGTHS + SMALL_ROW_LENGTHS and len(batch.rows) <= b
        assert b in (1, 4, 16, budget // t) and (b == 1 or b * t <= budget)
        assert all(len(row) <= t / 8 and sum(lengths[i] for i in row) <= t for row in batch.rows)


@given(any_texts, st.integers(1, 20_000))
def test_no_text_pays_for_a_longer_row_than_it_needs(lengths, budget):
    for batch in plan_batches(lengths, budget):
        t = batch.shape[1]
        if t in ROW_LENGTHS:
            enough = [min(n for n in ROW_LENGTHS if n >= lengths[i]) for row in batch.rows for i in row]
            assert set(enough) == {t}
        else:
            assert sum(lengths) <= t and len(plan_batches(lengths, budget)) == 1


@given(any_texts, st.integers(8_192, 20_000))
def test_at_most_a_quarter_of_a_batch_is_empty_rows(lengths, budget):
    assert all(len(batch.rows) >= 0.75 * batch.shape[0] for batch in plan_batches(lengths, budget))


@pytest.mark.parametrize(
    ("lengths", "shape"),
    [([5], (1, 12)), ([16], (1, 16)), ([17], (1, 24)), ([5, 5], (1, 16)), ([16, 16], (1, 32)), ([33], (1, 64))]
    + [([3] * 3, (1, 24)), ([5] * 5, (1, 64)), ([8] * 16, (1, 128)), ([7] * 17, (1, 512)), ([129], (1, 512))],
)
def test_a_small_call_gets_one_small_row(lengths, shape):
    assert [batch.shape for batch in plan_batches(lengths, 8192)] == [shape]


def test_no_texts_make_no_batches():
    assert plan_batches([], 8192) == []


def test_the_longest_row_holds_the_longest_text_and_no_more():
    assert plan_batches([8194], 8192) == [BatchPlan([[0]], (1, LONGEST))] and LONGEST % 128 == 0
    with pytest.raises(ValueError, match=f"a text has 9999 tokens; the longest row holds {LONGEST}"):
        plan_batches([9999, 7, LONGEST + 1], 8192)


@st.composite
def token_lists(draw) -> list[list[int]]:
    lengths = draw(st.lists(st.one_of(st.integers(1, 40), st.integers(1, 700)), max_size=60))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return [rng.integers(2, 1000, length).tolist() for length in lengths]


@given(token_lists(), st.sampled_from([512, 2048, 8192]))
def test_rows_are_as_a_plain_twin_writes_them(token_ids, budget):
    for batch in plan_batches([len(ids) for ids in token_ids], budget):
        rows = lay_out(token_ids, batch, pad_id=1)
        b, t = batch.shape
        assert rows.texts.shape == (b, max_texts(t)) and {array.dtype for array in rows[:5]} == {np.dtype(np.int32)}
        for row in range(b):
            texts = batch.rows[row] if row < len(batch.rows) else []
            lengths = [len(token_ids[i]) for i in texts]
            tail = t - sum(lengths)
            tokens = [token for i in texts for token in token_ids[i]]
            np.testing.assert_array_equal(rows.tokens[row], tokens + [1] * tail)
            np.testing.assert_array_equal(rows.segment_ids[row], np.repeat([*range(1, len(texts) + 1), 0], [*lengths, tail]))
            np.testing.assert_array_equal(rows.pool_ids[row], rows.segment_ids[row])
            np.testing.assert_array_equal(rows.positions[row], [i for n in lengths for i in range(n)] + [0] * tail)
            np.testing.assert_array_equal(rows.texts[row], texts + [-1] * (max_texts(t) - len(texts)))


@given(token_lists(), st.sampled_from([512, 2048, 8192]))
def test_scatter_puts_each_text_in_its_place(token_ids, budget):
    out = np.full((len(token_ids), 2), np.nan)
    for batch in plan_batches([len(ids) for ids in token_ids], budget):
        rows = lay_out(token_ids, batch, pad_id=1)
        segment_ids = 1 + np.arange(rows.texts.shape[1])
        member = rows.segment_ids[:, None] == segment_ids[None, :, None]
        scatter(np.stack([(member * rows.tokens[:, None]).sum(-1), member.sum(-1)], -1), rows, out)
    np.testing.assert_array_equal(out, np.reshape([(sum(ids), len(ids)) for ids in token_ids], (-1, 2)))


def test_the_corpus_fills_its_rows(corpus, tokenizer):
    lengths = [len(encoding.ids) for encoding in tokenizer.backend_tokenizer.encode_batch_fast(corpus)]
    batches = plan_batches(lengths, 32 * 256)
    assert sum(lengths) >= 0.95 * sum(b * t for b, t in (batch.shape for batch in batches))
    assert len({batch.shape for batch in batches}) <= 4

    fitting = [length for length in lengths if length <= 512]
    assert len(fitting) > 0.99 * len(lengths)
    assert sum(fitting) >= 0.95 * 512 * len(best_fit_decreasing(fitting, 512, packing.max_texts(512)))

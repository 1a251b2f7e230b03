"""Whole-word masking: bounded, of whole words, deterministic, with BERT's shares."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.corpus import BUNDLED, read_corpus
from train.data.masking import mask_words, max_masked, word_starts

SPECIAL = (0, 1, 2, 3, 49)
STARTS = np.arange(50) % 3 == 1  # two of three tokens continue a word
rates = st.floats(0.01, 1)
texts = st.lists(st.integers(4, 48), max_size=60).map(lambda ids: np.array([0, *ids, 2], np.int32))


def mask(tokens, *, rate=0.3, seed=0, starts=STARTS, **shares):
    rng = np.random.default_rng(seed)
    return mask_words(tokens, starts, rate=rate, mask_id=49, special_ids=SPECIAL, rng=rng, **shares)


def words_of(tokens, starts=STARTS, special=SPECIAL) -> list[list[int]]:
    """Positions of each word's tokens, one token at a time."""
    words, is_open = [], False
    for position, token in enumerate(tokens.tolist()):
        if token in special:
            is_open = False
        elif starts[token] or not is_open:
            words.append([position])
            is_open = True
        else:
            words[-1].append(position)
    return words


@given(texts, rates, st.integers(0, 9))
def test_labels_are_the_originals_and_nothing_else_changes(tokens, rate, seed):
    inputs, labels = mask(tokens, rate=rate, seed=seed)
    masked = labels >= 0
    assert inputs.dtype == labels.dtype == np.int32
    np.testing.assert_array_equal(labels[masked], tokens[masked])
    np.testing.assert_array_equal(inputs[~masked], tokens[~masked])
    assert not masked[np.isin(tokens, SPECIAL)].any()
    assert np.isin(inputs[masked], np.setdiff1d(np.arange(50), SPECIAL[:-1])).all()


@given(texts, rates, st.integers(0, 9))
def test_at_least_one_and_at_most_the_rate_rounded_up(tokens, rate, seed):
    ordinary = len(tokens) - 2
    count = (mask(tokens, rate=rate, seed=seed)[1] >= 0).sum()
    assert min(1, ordinary) <= count <= max_masked(ordinary, rate) <= math.ceil(rate * ordinary)


@given(texts, rates, st.integers(0, 9))
def test_words_are_masked_whole_but_one_where_none_fits(tokens, rate, seed):
    masked = mask(tokens, rate=rate, seed=seed)[1] >= 0
    words = words_of(tokens)
    budget = max_masked(len(tokens) - 2, rate)
    if min(map(len, words), default=0) <= budget:
        assert all(masked[word].all() or not masked[word].any() for word in words)
    else:
        touched = [word for word in words if masked[word].any()]
        assert len(touched) == 1 and np.flatnonzero(masked).tolist() == touched[0][:budget]


@given(texts, rates, st.integers(0, 9))
def test_a_word_is_left_only_where_it_does_not_fit(tokens, rate, seed):
    masked = mask(tokens, rate=rate, seed=seed)[1] >= 0
    free = max_masked(len(tokens) - 2, rate) - masked.sum()
    assert all(len(word) > free for word in words_of(tokens) if not masked[word].any())


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), rates)
def test_a_row_of_texts_stays_within_its_bound(lengths, rate):
    assert sum(max_masked(n, rate) for n in lengths) <= max_masked(sum(lengths), rate, texts=len(lengths))


def test_the_bound_is_not_thrown_off_by_rounding():
    assert max_masked(100, 0.07) == 7  # 0.07 * 100 is above 7 in floating point, 0.07 * 500 is 35
    assert 5 * max_masked(100, 0.07) <= max_masked(500, 0.07, texts=5)


@given(texts, st.integers(0, 9))
def test_the_same_generator_gives_the_same_masks(tokens, seed):
    np.testing.assert_array_equal(mask(tokens, seed=seed), mask(tokens, seed=seed))


def test_another_state_of_the_generator_gives_other_masks():
    tokens, rng = np.full(100, 4, np.int32), np.random.default_rng(0)
    first, second = (mask_words(tokens, STARTS, rate=0.3, mask_id=49, special_ids=SPECIAL, rng=rng)[1] for _ in range(2))
    assert (first != second).any()


def test_the_input_is_left_alone():
    tokens = np.arange(4, 40, dtype=np.int32)
    mask(tokens, rate=1)
    np.testing.assert_array_equal(tokens, np.arange(4, 40))


@pytest.mark.parametrize("tokens", [[], [0, 2], [0, 3, 3, 2]])
def test_a_text_without_words_has_no_masks(tokens):
    inputs, labels = mask(np.array(tokens, np.int32))
    assert inputs.tolist() == tokens and labels.tolist() == [-1] * len(tokens)


def test_masks_random_tokens_and_kept_ones_come_in_their_shares():
    tokens = np.full(200_000, 4, np.int32)
    inputs, labels = mask(tokens, rate=0.5)
    outcome = inputs[labels >= 0]
    assert len(outcome) == 100_000
    counts = np.bincount(outcome, minlength=50) / len(outcome)
    assert counts[49] == pytest.approx(0.8, abs=0.005)
    assert counts[4] == pytest.approx(0.1 + 0.1 / 45, abs=0.004)
    np.testing.assert_allclose(counts[5:49], 0.1 / 45, rtol=0.25)
    assert not counts[list(SPECIAL[:-1])].any()


@pytest.mark.parametrize(("shares", "expected"), [((1, 0), {49}), ((0, 0), {4}), ((0, 1), set(range(4, 49)))])
def test_shares_are_parameters(shares, expected):
    inputs, labels = mask(np.full(5000, 4, np.int32), rate=1, mask_share=shares[0], random_share=shares[1])
    assert set(inputs.tolist()) == expected and (labels == 4).all()


def test_words_are_drawn_evenly():
    tokens = np.array([0, *[4, 5, 6] * 10, 2], np.int32)  # ten words of three tokens
    hits = sum(mask(tokens, seed=seed)[1][1:-1:3] >= 0 for seed in range(2000))
    np.testing.assert_allclose(hits / 2000, 0.3, atol=0.04)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": 0}, r"rate must be in \(0, 1\], not 0"),
        ({"rate": 1.1}, "not 1.1"),
        ({"rate": float("nan")}, "not nan"),
        ({"mask_share": 0.95}, "shares of at most 1 together"),
        ({"random_share": -0.1}, "shares of at most 1 together"),
    ],
)
def test_bad_rates_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        mask(np.array([0, 4, 2], np.int32), **wrong)


@pytest.mark.parametrize("token", [-1, 50])
def test_tokens_outside_the_vocabulary_are_named(token):
    with pytest.raises(ValueError, match=r"token ids must be in 0\.\.49"):
        mask(np.array([0, token, 2]))


def test_a_vocabulary_without_spaces_is_refused():
    class Bytes:
        def get_vocab(self):
            return {"a": 0, "Ġa": 1}

    with pytest.raises(ValueError, match="marks no words"):
        word_starts(Bytes())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("multiformatowy odtwarzacz", ["multiformatowy", "odtwarzacz"]),
        ("GNOME/GTK+-basierte Hilfsprogramme.", ["GNOME/GTK+-basierte", "Hilfsprogramme."]),
        ("라이브러리를 사용하는", ["라이브러리를", "사용하는"]),
        ("для роботи", ["для", "роботи"]),
    ],
)
def test_words_stand_between_spaces(tokenizer, text, words):
    tokens = np.array(tokenizer.encode(text))
    found = [tokenizer.decode(tokens[word]) for word in words_of(tokens, word_starts(tokenizer), tokenizer.all_special_ids)]
    assert found == words


@pytest.mark.parametrize("text", ["日本語の文書を処理するためのライブラリ。", "用于处理文档的程序库"])
def test_tokens_of_scripts_without_spaces_are_words(tokenizer, text):
    tokens, special = np.array(tokenizer.encode(text)), tokenizer.all_special_ids
    words = words_of(tokens, word_starts(tokenizer), special)
    assert len(words) == np.isin(tokens, special, invert=True).sum() > 3


def test_texts_of_the_corpus_are_masked_at_the_rate(tokenizer):
    starts, special, rng = word_starts(tokenizer), tokenizer.all_special_ids, np.random.default_rng(0)
    shares: dict[str, list[int]] = {}
    for package in read_corpus(BUNDLED, "test")[:300]:
        for language, text in package.text.items():
            tokens = np.array(tokenizer.encode(text.body), np.int32)
            labels = mask_words(tokens, starts, rate=0.3, mask_id=tokenizer.mask_token_id, special_ids=special, rng=rng)[1]
            masked, ordinary = int((labels >= 0).sum()), int(np.isin(tokens, special, invert=True).sum())
            assert 1 <= masked <= math.ceil(0.3 * ordinary)
            totals = shares.setdefault(language, [0, 0])
            totals[0] += masked
            totals[1] += ordinary
    assert len(shares) == 16
    assert all(0.29 < masked / ordinary < 0.32 for masked, ordinary in shares.values()), shares

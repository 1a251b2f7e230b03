"""The overlap filter: 80 % of the shorter text's words, at least 4, are in the longer text."""

import random
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data import word_overlap
from train.data.word_overlap import overlaps

words = st.lists(st.text("abcdAB", min_size=1, max_size=3), max_size=12)
texts = words.map(" ".join)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("one two three four", "zero one two three four five", True),
        ("one two three", "zero one two three four five", False),  # fewer than 4 words
        ("one two three four x", "one two three four five six", True),  # 4 of 5 are 80 %
        ("one two three four q z", "one two three four five six seven", False),  # 4 of 6
        ("a b c x y", "a b c d e f", False),  # 3 shared
        ("One TWO three Four", "one two Three four five", True),
        ("STRASSE zwei drei vier", "Straße zwei drei vier fünf", True),
        ("port able ware soft", "portable software of any kind", True),  # inside words, in any order
        ("portable software of kinds", "port able soft ware of any kind", False),
        ("go go go go", "we go on and on", True),  # repeated words count each time
        ("one\ttwo\nthree  four", "one two three four five", True),
        ("日本語の文書を処理する", "日本語の文書を処理するライブラリ", False),  # one word
        ("라이브러리 문서 처리 도구", "라이브러리와 문서를 처리하는 도구입니다 그리고 더", True),
        ("", "one two three four", False),
        ("", "", False),
        (" \n", "one two three four", False),
    ],
)
def test_pairs_by_hand(a, b, expected):
    assert overlaps(a, b) is expected


def test_the_shorter_text_is_that_of_fewer_words():
    long_words = "incomprehensibilities one two three"
    assert overlaps(long_words, "incomprehensibilities 1 one 2 two 3 three")
    assert not overlaps("a one two three", "a1 2 3 4 5")


def by_definition(a: str, b: str) -> bool:
    shorter, longer = sorted((a.casefold(), b.casefold()), key=lambda text: (len(text.split()), len(text), text))
    shared = sum(word in longer for word in shorter.split())
    return shared >= 4 and shared >= 0.8 * len(shorter.split())


@pytest.mark.parametrize("few", [0, 2, word_overlap.FEW])
def test_all_words_at_once_are_each_by_itself(few, monkeypatch):
    monkeypatch.setattr(word_overlap, "FEW", few)
    rng, found = random.Random(few), Counter()
    for _ in range(4000):
        a, b = (" ".join("".join(rng.choices("abA", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 9))) for _ in "ab")
        found[by_definition(a, b)] += 1
        assert overlaps(a, b) == by_definition(a, b), (a, b)
    assert min(found.values()) > 400


def test_long_texts_take_time_in_proportion():
    """Each of 60,000 words against all others would take a minute."""
    a, b = (" ".join(f"{mark}{i}x" for i in range(60_000)) for mark in "pq")
    began = time.process_time()
    assert not overlaps(a, b)
    assert time.process_time() - began < 5


@given(texts, texts)
def test_order_and_case_do_not_matter(a, b):
    assert overlaps(a, b) == overlaps(b, a) == overlaps(a.upper(), b.lower())


@given(words.filter(lambda words: len(words) >= 4), words)
def test_a_text_inside_the_other_overlaps(inner, more):
    assert overlaps(" ".join(inner), " ".join(inner + more))


@given(texts, texts)
def test_fewer_than_four_words_never_overlap(a, b):
    assert overlaps(a, b) <= (min(len(a.split()), len(b.split())) >= 4)


@given(st.integers(4, 200), st.integers(0, 200))
def test_the_share_is_exact(shared, others):
    shorter = " ".join(["same"] * shared + ["other"] * others)
    longer = " ".join(["same"] * (shared + others + 1))
    assert overlaps(shorter, longer) == (5 * shared >= 4 * (shared + others))

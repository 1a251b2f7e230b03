"""The part that is held out: its size, its classes, and that no text is on both sides."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jina_jax.errors import DataError
from train.data.records import LabelledText, Pair
from train.own_task import held_out
from train.own_task.held_out import split_classes, split_pairs


def classes(**sizes: int) -> list[LabelledText]:
    return [LabelledText(text=f"{label} {i}", label=label) for label, size in sizes.items() for i in range(size)]


def test_each_class_gives_its_share():
    records = classes(x=100, y=40, z=20)
    parts = split_classes(records, 0.1, seed=0)
    assert Counter(record.label for record in parts.held_out) == {"x": 10, "y": 4, "z": 2}
    assert sorted([*parts.train, *parts.held_out], key=records.index) == records
    assert split_classes(records, 0.1, seed=0) == parts != split_classes(records, 0.1, seed=1)


def test_small_classes_give_their_share_together():
    parts = split_classes(classes(**{f"c{i}": 5 for i in range(200)}), 0.1, seed=0)
    assert 70 < len(parts.held_out) < 130  # 100 on average


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("xyz")), min_size=2, max_size=40), st.floats(0.05, 0.9))
def test_no_text_is_on_both_sides_and_every_label_is_trained_on(rows, share):
    records = [LabelledText(text=text, label=label) for text, label in rows]
    try:
        parts = split_classes(records, share, seed=0)
    except DataError:
        return
    assert Counter([*parts.train, *parts.held_out]) == Counter(records)
    assert not {record.text for record in parts.train} & {record.text for record in parts.held_out}
    assert {record.label for record in parts.held_out} <= {record.label for record in parts.train}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcdefghij"), st.sampled_from("abcKLMNOP")), min_size=2, max_size=30),
    st.floats(0.05, 0.9),
)
def test_no_text_of_pairs_is_on_both_sides(rows, share):
    records = [Pair(anchor=anchor, positive=positive) for anchor, positive in rows]
    try:
        parts = split_pairs(records, share, seed=0)
    except DataError:
        return
    assert Counter([*parts.train, *parts.held_out]) == Counter(records)
    assert len(parts.held_out) <= share * len(records)
    sides = [{text for pair in part for text in (pair.anchor, pair.positive)} for part in parts]
    assert not sides[0] & sides[1]


def test_pairs_without_a_text_in_common_give_the_share():
    records = [Pair(anchor=f"q{i}", positive=f"a{i}") for i in range(100)]
    parts = split_pairs(records, 0.2, seed=0)
    assert len(parts.held_out) == 20 and parts == split_pairs(records, 0.2, seed=0)


def test_of_many_records_only_so_many_are_held_out(monkeypatch):
    monkeypatch.setattr(held_out, "MOST", 50)
    assert len(split_pairs([Pair(anchor=f"q{i}", positive=f"a{i}") for i in range(1000)], 0.5, seed=0).held_out) == 50
    assert abs(len(split_classes(classes(x=500, y=500), 0.5, seed=0).held_out) - 50) <= 1


def test_what_cannot_be_split_is_an_error():
    with pytest.raises(DataError, match="4 texts of 2 classes leave none to measure on"):
        split_classes(classes(x=2, y=2), 0.5, seed=0)
    with pytest.raises(DataError, match="5 pairs in 1 groups"):
        split_pairs([Pair(anchor=f"q{i}", positive="a") for i in range(5)], 0.5, seed=0)
    assert np.all([len(part) for part in split_classes(classes(x=3, y=3), 0.5, seed=0)])

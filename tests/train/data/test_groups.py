"""Numbers of groups against a plain union of sets, and how they are agreed on."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train.data.examples import Example
from train.data.groups import count_contradictions, group_links, group_numbers
from train.data.whole_batch import agree_alone, agree_on

names = st.sampled_from("abcdefghij")
groups = st.sampled_from(["", "", "a", "b", "x", "y", "z"])


@st.composite
def batches(draw):
    """Examples of few texts and groups, so that they meet often; a group may be named as a text."""
    count, negatives = draw(st.integers(1, 12)), draw(st.integers(0, 3))
    by_text = draw(st.sampled_from([True, True, False]))
    make = st.builds(
        Example,
        texts=st.tuples(*[names] * (2 + negatives)),
        group=groups if by_text else groups.filter(bool),
        negative_groups=st.tuples(*[groups if by_text else groups.filter(bool)] * negatives),
        by_text=st.just(by_text),
    )
    return [draw(make) for _ in range(count)]


def plain_numbers(examples: list[Example]) -> list[list[int]]:
    """By sets that are joined until no two have a member in common."""
    sets: list[set] = []

    def join(*members):
        joined = set(members)
        for other in [each for each in sets if each & joined]:
            joined |= other
            sets.remove(other)
        sets.append(joined)

    def named(text, group, example):
        return {("group", group)} if not example.by_text else {("text", text)} | ({("group", group)} if group else set())

    members = []
    for example in examples:
        anchor, positive, *negatives = example.texts
        own = named(anchor, example.group, example) | named(positive, example.group, example)
        pairs = zip(negatives, example.negative_groups, strict=True)
        members.append([own, *(named(text, group, example) for text, group in pairs)])
        for each in members[-1]:
            join(*each)
    return [[next(i for i, each in enumerate(sets) if one & each) for one in row] for row in members]


@given(batches())
def test_numbers_are_equal_where_texts_or_groups_are(examples):
    got, want = group_numbers(group_links(examples)), np.array(plain_numbers(examples))
    assert got.shape == want.shape and got.dtype == np.int32 and (got >= 0).all()
    np.testing.assert_array_equal(got.reshape(-1, 1) == got.reshape(1, -1), want.reshape(-1, 1) == want.reshape(1, -1))


@given(batches(), st.integers(1, 3))
def test_processes_have_the_numbers_of_the_whole_batch(examples, processes):
    examples = (examples * processes)[: max(len(examples) // processes, 1) * processes]  # so that it divides
    shares, values, made, told = [examples[i::processes] for i in range(processes)], [], [], []

    def leave(value, answers):
        values.append(value)
        return answers([value])[0]

    def meet(value, answers):
        made.append(answers(values))
        return made[-1][values.index(value)]

    rows = [np.array([3 + i, 9 - i]) for i in range(processes)]
    for i, share in enumerate(shares):
        agree_on(rows[i], share, leave, lambda count: None)
    whole = agree_alone(np.max(rows, axis=0), examples)
    for i, share in enumerate(shares):
        found = agree_on(rows[i], share, meet, told.append)
        np.testing.assert_array_equal(found.groups, whole.groups[i::processes])
        assert found.rows.tolist() == whole.rows.tolist() == [2 + processes, 9]
    assert told == [count for count in [count_contradictions(examples)] if count] * processes


def test_numbers_are_the_same_in_every_program():
    """The least hash of what is linked; Python's own hashes differ from one process to the next."""
    examples = [Example(("a", "b", "c")), Example(("d", "b", "a"), group="g"), Example(("e", "f", "é"), negative_groups=("g",))]

    def number(*names: str) -> int:
        kinds = {"text": [name for name in names if name != "g"], "group": [name for name in names if name == "g"]}
        hashes = [hashlib.blake2b(n.encode(), digest_size=8, person=k.encode()) for k, of in kinds.items() for n in of]
        return min(int.from_bytes(each.digest(), "little") for each in hashes) >> 33

    linked = number(*"abd", "é", "g")
    assert group_numbers(group_links(examples)).tolist() == [[linked, number("c")], [linked, linked], [number(*"ef"), linked]]


def test_a_text_by_itself_has_a_number():
    (first,), (second,) = group_numbers(group_links([Example(("a",)), Example(("b",))])).tolist()
    assert first != second


def test_contradictions_are_counted_by_example():
    examples = [
        Example(("a", "b", "c", "b", "a")),
        Example(("a", "b", "c", "d"), group="g", negative_groups=("", "g")),
        Example(("a", "b", "c"), group="g", negative_groups=("h",)),
        Example(("a", "b", "c"), negative_groups=("",)),
        Example(("a", "a")),
    ]
    assert count_contradictions(examples) == 2

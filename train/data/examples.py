"""Turns records into examples: the texts that one record puts into a batch, and the role of each.

How an objective uses a record is decided here, on the host; how it uses the embeddings, in
`step/objectives.py`. Section 4 of the jina-embeddings-v3 paper (its adapters: sections 4.3.1 to
4.3.4).
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..config import Stage
from .records import LabelledText, Pair, PlainText, Record, ScoredPair, Triplet


class Example(NamedTuple):
    """One record in the form that a batch takes."""

    texts: tuple[str, ...]
    """Texts, the anchor first; every example of a batch has equally many."""
    score: float = 0.0
    group: str = ""
    """Group of anchor and positive; texts of equal group are not negatives of one another. "" =
    none."""
    suffix: str = ""
    """Text put behind every text of the example, and never cut off."""
    seed: int = 0
    """Seed of later random draws for this example (masking)."""
    negative_groups: tuple[str, ...] = ()
    """Group of each negative, "" = none; () = none has one."""
    by_text: bool = True
    """True if equal texts are of one group, whatever groups are given; False if those decide."""


ToExample = Callable[[Any, np.random.Generator], Example]


def to_example(stage: Stage, kind: str, source: Sequence[Record]) -> ToExample:
    """Returns the function that turns a record of a dataset into an example of a stage's objective.

    It takes the record and a random generator for that record's draws.

    Args:
        stage: its objective accepts `kind`.
        kind: record kind of the dataset.
        source: the dataset; further texts of the same and of other classes are drawn from it.
    """
    match kind:
        case "text":
            return _mlm_example
        case "pair":
            return _pair_example
        case "triplet":
            return lambda record, rng: _triplet_example(record, rng, stage.num_negatives)
        case "scored_pair":
            return _scored_example
        case "labelled_text" if stage.objective == "classification":
            classes, told_apart = (
                Classes(source),
                {"suffix": _class_id_suffix, "excluded": _class_as_group}[stage.same_class],
            )
            return lambda record, rng: told_apart(_class_example(record, rng, classes, stage.num_negatives), rng)
        case "labelled_text":
            classes = Classes(source)
            return lambda record, rng: _class_example(record, rng, classes, 1)
    raise ValueError(f"no examples are made of {kind} records")


def texts_per_example(stage: Stage, kind: str) -> int:
    """Length of `Example.texts` for records of one kind."""
    match kind:
        case "text":
            return 1
        case "triplet":
            return 2 + stage.num_negatives
        case "labelled_text":
            return 2 + (stage.num_negatives if stage.objective == "classification" else 1)
    return 2


class Classes:
    """Records of a dataset by label."""

    def __init__(self, source: Sequence[Record]):
        self._source = source
        labels = [record.label for record in source if isinstance(record, LabelledText)]
        by_label = defaultdict(list)
        for index, label in enumerate(labels):
            by_label[label].append(index)
        if len(by_label) < 2:
            raise ValueError(f"labelled texts need at least 2 labels, not {sorted(by_label)}")
        self._own = {label: np.array(indices) for label, indices in by_label.items()}
        self._labels = labels

    def same(self, label: str, rng: np.random.Generator, unlike: Collection[str]) -> LabelledText:
        """Draws a record of a class with a text unlike some, if it has one."""
        return self._drawn(lambda: int(rng.choice(self._own[label])), unlike)

    def other(self, label: str, rng: np.random.Generator, unlike: Collection[str]) -> LabelledText:
        """Draws a record of another class with a text unlike some, if there is one."""

        def draw() -> int:
            while self._labels[index := int(rng.integers(len(self._labels)))] == label:
                pass
            return index

        return self._drawn(draw, unlike)

    def _drawn(self, draw: Callable[[], int], unlike: Collection[str]) -> LabelledText:
        for _ in range(8):
            record = self._source[draw()]
            if record.text not in unlike:  # type: ignore[attr-defined]
                break
        return record  # type: ignore[return-value]


def _mlm_example(record: PlainText, rng: np.random.Generator) -> Example:
    return Example((record.text,), seed=int(rng.integers(2**31)))


def _pair_example(record: Pair, _: np.random.Generator) -> Example:
    return Example((record.anchor, record.positive), group=record.group)


def _triplet_example(record: Triplet, rng: np.random.Generator, count: int) -> Example:
    """Example of a triplet; negatives are drawn without repetition if there are enough of them."""
    held = len(record.negatives)
    drawn = rng.permutation(held)[:count] if held >= count else rng.integers(held, size=count)
    texts = (record.anchor, record.positive, *(record.negatives[i] for i in drawn))
    groups = tuple(record.negative_groups[i] for i in drawn) if record.negative_groups else ()
    return Example(texts, group=record.group, negative_groups=groups)


def _scored_example(record: ScoredPair, _: np.random.Generator) -> Example:
    return Example((record.sentence1, record.sentence2), score=record.score)


def _class_example(record: LabelledText, rng: np.random.Generator, classes: Classes, negatives: int) -> Example:
    """Example of a text, another of its class, and texts of other classes; the groups are classes.

    No text stands on both sides, even if it has two labels in the dataset.
    """
    others = [classes.other(record.label, rng, {record.text}) for _ in range(negatives)]
    same = classes.same(record.label, rng, {record.text, *(other.text for other in others)})
    texts = (record.text, same.text, *(other.text for other in others))
    own = {record.text, same.text}  # still equal to another where the dataset has no further text
    labels = (record.label if other.text in own else other.label for other in others)
    return Example(texts, group=record.label, negative_groups=tuple(labels))


def _class_id_suffix(example: Example, rng: np.random.Generator) -> Example:
    """Ends all texts in one number that no other tuple has.

    Texts of the same class in another tuple are told apart by it and do no harm as negatives.
    """
    return example._replace(suffix=f" {rng.integers(10**9):09d}", group="", negative_groups=())


def _class_as_group(example: Example, _: np.random.Generator) -> Example:
    """Keeps all tuples of a class, and others' negatives of that class, from being negatives.

    Texts do not decide here: one that has two labels would make one group of both classes.
    """
    return example._replace(by_text=False)

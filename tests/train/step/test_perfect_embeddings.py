"""Perfect embeddings lose nothing, whatever a batch holds: no negative belongs to its anchor.

A text's embedding is the axis of what it is about, so that those of different things are at right
angles.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
from train.config import DatasetConfig, Stage
from train.data.collate import BatchShape, TokenizedTexts, collate
from train.data.examples import Example, to_example
from train.data.hard_negatives import MiningConfig, mine
from train.data.records import LabelledText, Pair, Record, Triplet
from train.data.row_counts import most_rows, texts_per_row
from train.step.objectives import info_nce_loss

About = Callable[[str, Example], object]
"""What a text is about, in its example."""


def losses(stage: Stage, kind: str, records: list[Record], about: About) -> tuple[float, float]:
    """Loss of one batch of all records: of perfect embeddings, and of positives that go astray."""
    make = to_example(stage, kind, records)
    examples = [make(record, np.random.default_rng(i)) for i, record in enumerate(records)]
    shape = BatchShape(stage.row_length, texts_per_row(stage), (most_rows(len(examples), len(examples[0].texts), stage),))
    batch = collate(examples, partial(one_token, stage), shape, 1, pad_id=1)
    topics = [[about(text, example) for text in example.texts] for example in examples]
    axes = {topic: axis for axis, topic in enumerate(dict.fromkeys(topic for row in topics for topic in row))}
    perfect = np.eye(len(axes), dtype=np.float32)[[[axes[topic] for topic in row] for row in topics]]
    astray = perfect.copy()
    astray[:, 1] = np.roll(astray[:, 1], len(astray) // 2 + 1, axis=0)
    return tuple(float(info_nce_loss(each, batch, stage, None)) for each in (perfect, astray))


def one_token(stage: Stage, examples) -> TokenizedTexts:
    last = max(len(stage.adapters) - 1, 0)
    parts = [0 if number == 0 else last for example in examples for number in range(len(example.texts))]
    return TokenizedTexts([np.array([5], np.int32)] * len(parts), None, parts)


def stage(objective: str, kind: str, **fields) -> Stage:
    adapters = {"retrieval": ("retrieval.query", "retrieval.passage"), "classification": ("classification",)}
    sizes = {"steps": 1, "batch_size": 8, "max_length": 8, "learning_rate": 1e-3}
    datasets = (DatasetConfig("not read", kind),)
    return Stage("s", objective, datasets, adapters=adapters.get(objective, ()), temperature=0.05, **(sizes | fields))


# Every record tells its topic in its first word, apart from a positive and an anchor of two topics'
# records each, which makes one topic of them.
SHARED = {"yes": "topic0", "untitled": "topic2"}
PAIRS = [
    Pair(anchor="topic0 is it?", positive="yes"),
    Pair(anchor="topic0 or is it?", positive="yes"),
    Pair(anchor="untitled", positive="topic2 first"),
    Pair(anchor="untitled", positive="topic2 second", group="2"),
    Pair(anchor="topic2 title", positive="topic2 third", group="2"),
    Pair(anchor="topic3 chain", positive="topic3 link"),
    Pair(anchor="topic3 link", positive="topic3 end"),
    *(
        Pair(anchor=f"topic{i} {j} title", positive=f"topic{i} {j} body", group=f"{i}")
        for i in range(4, 9)
        for j in "de en".split()
    ),
]


def topic(text: str, _: Example) -> str:
    return SHARED.get(text, text.split()[0])


def assert_perfect(loss: tuple[float, float]) -> None:
    perfect, astray = loss
    assert perfect < 1e-6 and astray > 1


def test_pairs():
    assert_perfect(losses(stage("pairs", "pair"), "pair", PAIRS, topic))


def mined() -> list[Triplet]:
    """Every negative is another row's positive, or of its group."""
    rng = np.random.default_rng(0)
    return mine(PAIRS, lambda anchors, texts: iter([rng.random((len(anchors), len(texts)))]), MiningConfig(3, 0, 9))


def test_mined_triplets():
    triplets = mined()
    assert len(triplets) == len(PAIRS)
    assert_perfect(losses(stage("retrieval", "triplet", num_negatives=3), "triplet", triplets, topic))


def test_mined_triplets_known_by_their_texts_alone():
    triplets = [triplet.model_copy(update={"negative_groups": ()}) for triplet in mined()]
    assert_perfect(losses(stage("retrieval", "triplet", num_negatives=3), "triplet", triplets, topic))


def test_mined_negatives_known_by_their_groups_alone():
    """The negatives' own pairs are not in the batch, another of their group is."""
    triplets = [triplet for triplet in mined() if " de " not in triplet.positive]
    assert any(" de " in text for triplet in triplets for text in triplet.negatives)
    assert_perfect(losses(stage("retrieval", "triplet", num_negatives=3), "triplet", triplets, topic))


def test_a_positive_among_its_own_negatives():
    wrong = PAIRS[0].model_dump() | {"negatives": ("topic2 first", "yes", "topic0 is it?")}
    triplets = [Triplet.model_construct(**wrong), *mined()[1:]]
    assert_perfect(losses(stage("retrieval", "triplet", num_negatives=3), "triplet", triplets, topic))


LABELLED = [LabelledText(text=f"class{i % 4} {i}", label=f"class{i % 4}") for i in range(24)]


def test_classes_that_are_excluded():
    plan = stage("classification", "labelled_text", num_negatives=2, same_class="excluded")
    assert_perfect(losses(plan, "labelled_text", LABELLED, lambda text, _: text.split()[0]))


def test_classes_told_apart_by_a_suffix():
    plan = stage("classification", "labelled_text", num_negatives=2)
    assert_perfect(losses(plan, "labelled_text", LABELLED, lambda text, example: (text.split()[0], example.suffix)))

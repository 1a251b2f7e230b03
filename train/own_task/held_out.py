"""Holds a part of the records out of training, to measure on.

No text is on both sides. Of labelled texts each class gives its share; pairs that have a text in
common stay together.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from jina_jax.errors import DataError

from ..data.records import LabelledText, Pair

MOST = 2000
"""Records that are held out at most: more of them make a score hardly surer, and take longer."""

LEAST_TRAINED = 2
"""Texts of a class that stay in training at least."""


AnyRecord = TypeVar("AnyRecord", LabelledText, Pair)


class Parts(NamedTuple, Generic[AnyRecord]):
    """Records to train on and to measure on, each in the order given."""

    train: list[AnyRecord]
    held_out: list[AnyRecord]


def split_classes(records: Sequence[LabelledText], share: float, seed: int) -> Parts[LabelledText]:
    """Holds out a share of the different texts of each class.

    Raises:
        DataError: the classes are too small for the share.
    """
    rng = np.random.default_rng(seed)
    texts: dict[str, dict[str, None]] = defaultdict(dict)
    of_text: dict[str, str] = {}
    for record in records:
        # A text of several labels goes with its first.
        texts[of_text.setdefault(record.text, record.label)][record.text] = None
    share = min(share, MOST / len(of_text))
    held: set[str] = set()
    for own in texts.values():
        count = min(_rounded(share * len(own), rng), len(own) - LEAST_TRAINED)
        held.update(_chosen(list(own), count, rng))
    trained = {record.label for record in records if record.text not in held}
    # Of a class that only such texts have, none is held out: what is measured has been learnt.
    held -= {record.text for record in records if record.label not in trained}
    parts = _parts(records, [record.text in held for record in records])
    if not parts.held_out:
        raise DataError(
            f"{len(of_text)} texts of {len(texts)} classes leave none to measure on with --held-out {share:g}: "
            "give a larger share, or a file of --test"
        )
    return parts


def split_pairs(records: Sequence[Pair], share: float, seed: int) -> Parts[Pair]:
    """Holds out a share of the pairs; those that have a text in common go the same way.

    Raises:
        DataError: fewer than 2 pairs can be held out, or none is left to train on.
    """
    groups = _connected([record_texts(record) for record in records])
    sizes = np.bincount(groups)
    room = min(share * len(records), MOST)
    held: set[int] = set()
    for group in np.random.default_rng(seed).permutation(len(sizes)):
        if sizes[group] <= room:
            held.add(int(group))
            room -= sizes[group]
    parts = _parts(records, [int(group) in held for group in groups])
    if len({pair.positive for pair in parts.held_out}) < 2 or not parts.train:
        raise DataError(
            f"{len(records)} pairs in {len(sizes)} groups without a text in common cannot be split with --held-out {share:g}, "
            "and 2 are needed to measure on: give a larger share, or a file of --test"
        )
    return parts


def record_texts(record: LabelledText | Pair) -> set[str]:
    """Returns the texts of a record that are not on both sides."""
    return {record.text} if isinstance(record, LabelledText) else {record.anchor, record.positive}


def _parts(records: Sequence[AnyRecord], is_held: Sequence[bool]) -> Parts[AnyRecord]:
    train, held_out = ([record for record, out in zip(records, is_held, strict=True) if out is side] for side in (False, True))
    return Parts(train, held_out)


def _rounded(expected: float, rng: np.random.Generator) -> int:
    """Rounds up or down by chance, so that small classes give their share together."""
    whole = int(expected)
    return whole + int(rng.random() < expected - whole)


def _chosen(texts: list[str], count: int, rng: np.random.Generator) -> Iterable[str]:
    return (texts[index] for index in rng.permutation(len(texts))[: max(count, 0)])


def _connected(texts: Sequence[Iterable[str]]) -> Int[np.ndarray, " n"]:
    """Numbers the groups of records that are linked by texts in common.

    Args:
        texts: of each record.
    """
    numbers: dict[str, int] = {}
    links = [(row, numbers.setdefault(text, len(numbers))) for row, own in enumerate(texts) for text in own]
    rows, columns = np.array(links).T
    size = len(texts) + len(numbers)
    graph = coo_array((np.ones(len(rows), np.int8), (rows, len(texts) + columns)), shape=(size, size))
    return connected_components(graph, directed=False)[1][: len(texts)]

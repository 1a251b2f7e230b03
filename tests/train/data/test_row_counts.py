"""Row counts: as few empty rows as any choice would leave, and few in batches of real texts."""

import itertools
import json
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")

from jina_jax import ModelConfig
from train.config import DatasetConfig, Stage
from train.data.records import Pair
from train.data.row_counts import WORTH, chunk_count, fitted_row_counts, in_even_chunks, rows_needed
from train.data.stream import batch_stream

ROOT = Path(__file__).resolve().parents[3]


def stage(objective: str = "pairs", **fields) -> Stage:
    sizes = {"batch_size": 128, "max_length": 128, "row_length": 256}
    defaults = {"name": "s", "steps": 1, "learning_rate": 1e-3, "datasets": (DatasetConfig("d", "pair"),)}
    return Stage(objective=objective, **(defaults | sizes | fields))


def slots(needed, counts) -> int:
    """Rows that batches take if each takes the first counts that hold it."""
    return sum(next(sum(rows) for rows in counts if all(np.array(rows) >= each)) for each in needed)


@given(st.lists(st.tuples(st.integers(1, 9)), min_size=1, max_size=7), st.integers(1, 3))
def test_no_other_counts_leave_fewer_empty_rows(needed, fitted):
    """Of one part; "fewer" by more than what a further program must be worth."""
    needed = np.array(needed)
    counts = fitted_row_counts(needed, (12,), fitted, None)
    assert len(counts) <= fitted + 1 and counts[-1] == (12,) and list(counts) == sorted(set(counts))
    top = int(np.ceil(needed.max() + 0.25 * (needed.max() - needed.mean())))  # what the last fitted count holds
    others = (
        (*((rows,) for rows in sorted({*choice, top})), (12,))
        for choice in itertools.product(range(1, top + 1), repeat=fitted - 1)
    )
    both = np.concatenate([needed, [[top]]])
    assert slots(both, counts) <= min(slots(both, other) for other in others) / (1 - WORTH) ** (fitted - 1)


@given(st.integers(0, 99), st.integers(0, 3), st.sampled_from([None, 3, 8]))
def test_two_parts_are_fitted_together(seed, fitted, chunk):
    rng = np.random.default_rng(seed)
    needed = rng.integers(1, [6, 40], size=(50, 2))
    most = tuple(in_even_chunks(rows, chunk) for rows in (8, 60))
    counts = fitted_row_counts(needed, most, fitted, chunk)
    assert len(counts) <= fitted + 1 and counts[-1] == most
    assert all(rows % chunk_count(rows, chunk) == 0 for each in counts for rows in each)
    assert [sum(each) for each in counts] == sorted(sum(each) for each in counts)
    if fitted:  # all that was drawn has a place before the last
        assert (needed <= np.array(counts[:-1] or counts).max(axis=0)).all()


def test_equal_batches_have_one_count():
    assert fitted_row_counts(np.full((9, 2), 3), (8, 8), 3, None) == ((3, 3), (8, 8))


@given(st.integers(1, 1000), st.one_of(st.none(), st.integers(1, 50)))
def test_chunks_are_equal_and_hold_all(rows, chunk):
    count = in_even_chunks(rows, chunk)
    chunks = chunk_count(count, chunk)
    assert rows <= count < rows + chunks and count % chunks == 0 and count // chunks <= (chunk or count)


def test_the_fullest_device_decides():
    lengths = [[np.array([[10], [60]])]]
    plan = stage(batch_size=256, max_length=64, row_length=64)
    needed = rows_needed(plan, lengths, np.ones(1), 64, np.random.default_rng(0))
    assert (needed == 4).all()  # some device of 64 draws four long texts, or three and a short one
    alone = rows_needed(replace(plan, batch_size=4), lengths, np.ones(1), 1, np.random.default_rng(0))
    assert set(alone[:, 0]) == {1, 2, 3, 4}


@pytest.fixture(scope="module")
def searches() -> list[Pair]:
    """Titles and bodies of the corpus' test split, in all languages."""
    with lzma.open(ROOT / "data" / "debian_packages.jsonl.xz", "rt", encoding="utf-8") as lines:
        packages = [package for package in map(json.loads, lines) if package["split"] == "test"]
    return [
        Pair(anchor=text["title"], positive=text["body"], language=language)
        for package in packages
        for language, text in package["text"].items()
    ]


@pytest.mark.parametrize("by_language", [False, True])
@pytest.mark.parametrize("adapters", [(), ("retrieval.query", "retrieval.passage")])
def test_batches_of_real_texts_are_nearly_full(searches, tokenizer, by_language, adapters):
    datasets = (DatasetConfig("corpus", "pair", by_language=by_language, language_exponent=0.5),)
    plan = stage("retrieval" if adapters else "pairs", adapters=adapters, datasets=datasets)
    batches = batch_stream(plan, [searches], ModelConfig(vocab_size=16_000), tokenizer, seed=0)
    parts = [batches[i][1].parts for i in range(50)]  # type: ignore[index]
    held, slots = (
        sum(map(count, itertools.chain(*parts)))
        for count in (lambda rows: (rows.segment_ids > 0).sum(), lambda rows: rows.tokens.size)
    )
    # Of one language, titles are long where bodies are not: rows of two parts differ apart.
    assert 1 - held / slots < (0.11 if by_language and adapters else 0.1)
    assert len({tuple(len(rows.tokens) for rows in each) for each in parts}) <= 4

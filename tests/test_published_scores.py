"""The packaged multilingual-e5-small on MTEB's tasks, beside its published scores."""

import os
from pathlib import Path

import pytest

pytest.importorskip("mteb")
pytest.importorskip("click")

from benchmarks import published_scores
from benchmarks.published_scores import DATA, TASKS, Row, below
from jina_jax import Embedder
from train.mteb.run import model_name

ROW = Row("STS16", "test", "default", 83.0, 83.5)


@pytest.fixture
def data() -> Path:
    if not os.environ.get(DATA):
        pytest.skip(f"{DATA} names no directory with the tasks' data")
    return Path(os.environ[DATA])


def score(model: Path, dtype: str, data: Path, out: Path, names: list[str], subsets: tuple[str, ...] = ()) -> list[Row]:
    embedder = Embedder.load(model, dtype=dtype)
    tasks = published_scores.prepare(data, out / "data", names, subsets)
    return published_scores.score(embedder, model_name(str(model), embedder), tasks, out / "results")


@pytest.mark.usefixtures("optimized", "unchecked")
def test_the_packaged_model_finds_as_many_translations_as_is_published(demo_model, data, tmp_path):
    (row,) = score(demo_model, "bfloat16", data, tmp_path, ["Tatoeba"], ("deu-eng",))
    assert row.published == 97.35 and not below([row]), row


@pytest.mark.slow
@pytest.mark.usefixtures("optimized", "unchecked")
def test_the_packaged_model_has_the_published_scores(demo_model, data, tmp_path):
    rows = score(demo_model, "float32", data, tmp_path, [*TASKS])
    assert len(rows) == 4 + 1 + 1 + 12 + 4 + 1 and not below(rows), rows


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({}, False),
        ({"score": 82.4}, True),
        ({"score": 82.4, "published": None}, False),
        ({"score": 82.4, "subset": "tel-eng"}, False),
        ({"score": 90.0}, False),
        ({"sentence_transformers": 83.05}, False),
        ({"sentence_transformers": 83.2}, True),
    ],
)
def test_scores_may_lie_a_point_below_the_published_ones(changed, fails):
    row = ROW._replace(**changed)
    assert below([row]) == ([row] if fails else [])

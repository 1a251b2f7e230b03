"""The packaged multilingual-e5-small on MTEB's tasks, and the protocols by hand."""

import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata

from benchmarks import published_scores
from benchmarks.published_scores import DATA, MARGIN, TASKS, Model
from jina_jax import Embedder
from train.evaluation.few_shot import few_shot_draws


@pytest.fixture
def data() -> Path:
    if not os.environ.get(DATA):
        pytest.skip(f"{DATA} names no directory with the tasks' data")
    return Path(os.environ[DATA])


def below(model: Model, data: Path, tasks: list[str]) -> list[dict]:
    rows = published_scores.score_tasks(model, data, tasks)
    assert len(rows) == len(tasks)
    return [row for row in rows if row["score"] < row["published"] - MARGIN]


@pytest.mark.usefixtures("optimized")
def test_the_packaged_model_finds_as_many_translations_as_is_published(demo_model, data):
    model = published_scores.model_of(Embedder.load(demo_model, dtype="bfloat16"))
    assert not below(model, data, ["Tatoeba (deu-eng)"])


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_packaged_model_has_the_published_scores(demo_model, data):
    model = published_scores.model_of(Embedder.load(demo_model, dtype="float32"))
    assert not below(model, data, [*TASKS])


# ---- the protocols ----

TEXTS = ["ab", "aab", "bb", "abb", "ba", "b", "aaab", "abab"]


def embed(texts):
    """Shares of a and b in each text, of length 1."""
    counts = np.array([[text.count("a") + 0.1, text.count("b") + 0.01 * len(text)] for text in texts])
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


MODEL = Model(embed, lambda texts: embed(texts))


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_sts_is_the_correlation_of_ranks(tmp_path):
    scores = [3.0, 1.0, 4.0, 1.5]
    pairs = [{"sentence1": a, "sentence2": b, "score": s} for a, b, s in zip(TEXTS[:4], TEXTS[4:], scores, strict=True)]
    write(tmp_path / "x.jsonl", pairs)
    cosines = [float(embed([a])[0] @ embed([b])[0]) for a, b in zip(TEXTS[:4], TEXTS[4:], strict=True)]
    expected = np.corrcoef(rankdata(cosines), rankdata(scores))[0, 1]
    assert published_scores.sts(MODEL, tmp_path, "x") == pytest.approx(expected)


def test_bitext_is_the_f1_of_nearest_neighbours(tmp_path):
    left, right = ["a", "b", "ab"], ["aa", "aabbb", "bbb"]  # b and ab find each other's
    write(tmp_path / "x.jsonl", [{"sentence1": a, "sentence2": b} for a, b in zip(left, right, strict=True)])
    assert published_scores.bitext(MODEL, tmp_path, "x") == pytest.approx(1 / 3)


def test_retrieval_merges_queries_of_equal_text(tmp_path):
    write(tmp_path / "x.docs.jsonl", [{"id": str(i), "text": f" {text} "} for i, text in enumerate(["aaaa", "abab", "bbbb"])])
    queries = [("1", "a", "0"), ("2", "b", "1"), ("3", "a", "0")]
    write(tmp_path / "x.queries.jsonl", [{"id": i, "text": text, "doc": doc} for i, text, doc in queries])
    # "a" finds its document first, "b" its second.
    assert published_scores.retrieval(MODEL, tmp_path, "x") == pytest.approx((1 + 1 / math.log2(3)) / 2)


def test_classifiers_are_fitted_on_ten_draws_of_eight_texts_a_class(tmp_path):
    labels = ["x"] * 20 + ["y"] * 5 + ["z"] * 12
    draws = few_shot_draws(labels)
    assert len(draws) == 10 and len({tuple(draw) for draw in draws}) == 10
    assert all(Counter(labels[row] for row in draw) == {"x": 8, "y": 5, "z": 8} for draw in draws)
    train = [{"text": text, "label": text[:1]} for text in ["aaaa", "aaab", "bbbb", "bbba"] * 4]
    write(tmp_path / "train.jsonl", train)
    write(tmp_path / "test.jsonl", [{"text": "aaa", "label": "a"}, {"text": "bbb", "label": "b"}, {"text": "bb", "label": "a"}])
    assert published_scores.classification(MODEL, tmp_path, "") == pytest.approx(2 / 3)

"""`benchmarks.matryoshka_precision`: searches of quantised embeddings, by hand."""

import numpy as np
import pytest

pytest.importorskip("click")
pytest.importorskip("sklearn")

from benchmarks.matryoshka_precision import markdown, measure, rescored, store
from train.evaluation.retrieval import Retrieval

RNG = np.random.default_rng(0)


def unit(rows: int, dim: int = 16) -> np.ndarray:
    embeddings = RNG.standard_normal((rows, dim)).astype(np.float32)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


DOCUMENTS, QUERIES = unit(300), unit(7)


def test_floats_are_searched_by_the_cosine():
    stored = store(DOCUMENTS, "float32")
    np.testing.assert_allclose(stored.search(QUERIES), QUERIES @ DOCUMENTS.T, atol=1e-6)
    assert stored.bytes_per_text == 64


def test_bits_are_searched_by_the_number_that_differ():
    stored = store(DOCUMENTS, "binary")
    differ = ((QUERIES > 0)[:, None] != (DOCUMENTS > 0)[None]).sum(-1)
    np.testing.assert_allclose(stored.search(QUERIES), 1 - differ / 8, atol=1e-6)
    assert stored.bytes_per_text == 2


def test_int8_is_close_to_the_cosine():
    stored, queries = store(DOCUMENTS, "int8"), DOCUMENTS[:7]  # within the documents' ranges
    assert np.abs(stored.search(queries) - queries @ DOCUMENTS.T).max() < 0.02 and stored.bytes_per_text == 16


def test_rescoring_orders_the_best_by_the_query_in_floats():
    stored = store(DOCUMENTS, "binary")
    scores = rescored(stored, 5)(QUERIES)
    for query, row in zip(QUERIES, scores, strict=True):
        best = np.flatnonzero(row > -2)
        assert len(best) == 5
        others = np.delete(stored.search(query[None])[0], best)
        assert stored.search(query[None])[0][best].min() >= others.max() - 1e-6
        np.testing.assert_allclose(row[best], query @ np.where(DOCUMENTS[best] > 0, 0.25, -0.25).T, atol=1e-6)


def test_every_dimension_is_measured_in_every_way(embedder):
    texts = [f"tool {word} for {word}" for word in ("music", "mail", "maps", "mines", "masks", "moons")]
    tasks = [Retrieval(subset, texts, [f"{text}s" for text in texts], np.arange(6)) for subset in ("en", "de-en", "fr-en")]
    rows = measure(embedder, tasks, None)
    assert [row["dim"] for row in rows[::5]] == [8, 16, 32, 64] and len(rows) == 20
    assert all(0 <= row["en"] <= 100 and row["en"] == row["X-en"] for row in rows)
    table = markdown(rows)
    assert table.startswith("| dimensions | subset | float32 | int8 | int8, rescored | binary | binary, rescored |")
    assert table.count("\n") == 2 + 8

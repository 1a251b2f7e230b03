"""Ranking block by block equals a sort over everything at once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jina_jax.config import ModelConfig
from jina_jax.embed.search import Hit, has_sides, query_side, top_k
from jina_jax.embed.similarity import normalize
from jina_jax.errors import DataError


def random_embeddings(rows: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    return normalize(np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32))


def blocks(embeddings: np.ndarray, size: int):
    for first in range(0, len(embeddings), size):
        part = embeddings[first : first + size]
        yield [f"row {first + i}" for i in range(len(part))], part


@pytest.mark.parametrize("k", [1, 5, 50])
@pytest.mark.parametrize("size", [1, 7, 50, 60])
def test_the_best_of_all_blocks_as_sentence_transformers_ranks_them(k, size):
    semantic_search = pytest.importorskip("sentence_transformers.util").semantic_search
    query, embeddings = random_embeddings(1, seed=1)[0], random_embeddings(50)
    hits = top_k(query, blocks(embeddings, size), k)
    expected = semantic_search(query, embeddings, top_k=k)[0]
    assert [hit.row for hit in hits] == [hit["corpus_id"] for hit in expected]
    assert [hit.id for hit in hits] == [f"row {hit['corpus_id']}" for hit in expected]
    np.testing.assert_allclose([hit.score for hit in hits], [hit["score"] for hit in expected], atol=1e-6)


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=60),
    st.integers(1, 70),
    st.integers(1, 65),
)
def test_equal_scores_are_in_the_order_of_the_input(values, k, size):
    """Whole numbers are exact in float32, and seven of them give ties in and between blocks."""
    hits = top_k(np.ones(1, np.float32), blocks(np.array(values, np.float32)[:, None], size), k)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert [(hit.score, hit.row) for hit in hits] == [(values[i], i) for i in order]


@pytest.mark.parametrize("dim", [3, 16, 384, 1000])
def test_equal_rows_have_equal_scores_whatever_their_block(dim):
    """And so are ties: a matrix product would not round them alike."""
    embeddings = np.tile(random_embeddings(1, dim), (101, 1))
    hits = top_k(random_embeddings(1, dim, seed=1)[0], blocks(embeddings, 37), 101)
    assert [hit.row for hit in hits] == list(range(101)) and len({hit.score for hit in hits}) == 1


def test_more_than_there_are_gives_all():
    hits = top_k(np.array([1, 0], np.float32), [(["a", "b"], np.array([[0.6, 0.8], [1, 0]], np.float32))], 9)
    assert hits == [Hit(1.0, 1, "b"), Hit(np.float32(0.6), 0, "a")]


def test_blocks_without_rows_and_no_blocks():
    query = random_embeddings(1)[0]
    assert top_k(query, [], 3) == []
    empty = [], np.zeros((0, 16), np.float32)
    hits = top_k(query, [empty, (["a"], random_embeddings(1)), empty], 3)
    assert [(hit.row, hit.id) for hit in hits] == [(0, "a")]


def test_no_more_than_one_block_is_held():
    """A block's memory is used again by the next, as a reader may do it."""
    buffer, embeddings = np.zeros((10, 16), np.float32), random_embeddings(100)

    def reused():
        for first in range(0, 100, 10):
            buffer[:] = embeddings[first : first + 10]
            yield range(first, first + 10), buffer

    query = random_embeddings(1, seed=1)[0]
    assert [hit.id for hit in top_k(query, reused(), 7)] == np.argsort(-(embeddings @ query))[:7].tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_its_id(value):
    embeddings = random_embeddings(20)
    embeddings[13, 5] = value
    with pytest.raises(DataError, match="the embedding of row 13 holds NaN"):
        top_k(random_embeddings(1)[0], blocks(embeddings, 8), 3)
    with pytest.raises(ValueError, match="the query's embedding holds NaN"):
        top_k(embeddings[13], blocks(random_embeddings(20), 8), 3)


def test_bad_arguments():
    query = random_embeddings(1)[0]
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        top_k(query, blocks(random_embeddings(3), 3), 0)
    with pytest.raises(ValueError, match=r"a block must be \[3, 16\], ids by dimensions, not \(3, 8\)"):
        top_k(query, blocks(random_embeddings(3, 8), 3), 1)
    with pytest.raises(ValueError, match=r"a block must be \[2, 16\].*not \(3, 16\)"):
        top_k(query, [(["a", "b"], random_embeddings(3))], 1)


# ---- the side of a query

TASKS = ModelConfig(
    tasks=("retrieval.query", "retrieval.passage", "text-matching"),
    prompts=(("retrieval.query", "Q: "), ("retrieval.passage", "D: "), ("text-matching", "")),
)
PROMPTS = ModelConfig(prompts=(("query", "query: "), ("passage", "passage: ")))
INSTRUCT = ModelConfig(prompts=(("query", "Instruct: "), ("document", "")))
PLAIN = ModelConfig()


@pytest.mark.parametrize(
    ("config", "task", "prompt", "side", "expected"),
    [
        (TASKS, "retrieval.passage", "D: ", "document", "query"),
        (TASKS, "retrieval.query", "Q: ", "query", "document"),
        (TASKS, "retrieval.passage", "my own: ", "document", "query"),
        (TASKS, "text-matching", "", None, None),
        (TASKS, None, "", None, None),
        (TASKS, None, "D: ", None, None),
        (PROMPTS, None, "passage: ", "document", "query"),
        (PROMPTS, None, "query: ", "query", "document"),
        (PROMPTS, None, "passage: ", None, "query"),
        (PROMPTS, None, "query: ", None, None),
        (PROMPTS, None, "", None, None),
        (INSTRUCT, None, "", None, "query"),
        (PLAIN, None, "", None, None),
        (PLAIN, None, "", "document", "query"),
    ],
)
def test_the_query_is_on_the_other_side_or_on_none(config, task, prompt, side, expected):
    assert query_side(config, {"task": task, "prompt": prompt, "side": side}) == expected


def test_a_prompt_that_the_model_has_lost_is_an_error():
    """As where a model of the hub, known to need prompts, is loaded from a copy without them."""
    with pytest.raises(ValueError, match="embedded with the prompt 'passage: ', and the model has no prompts"):
        query_side(PLAIN, {"task": None, "prompt": "passage: ", "side": "document"})


def test_models_with_sides():
    assert has_sides(TASKS) and has_sides(PROMPTS) and has_sides(INSTRUCT) and not has_sides(PLAIN)
    assert not has_sides(ModelConfig(prompts=(("query", "text: "), ("document", "text: "))))

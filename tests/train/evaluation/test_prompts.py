"""Evaluation of a base with prompts: it is measured with them, as the authors of E5 measure."""

import numpy as np
import pytest

pytest.importorskip("click")
pytest.importorskip("bm25s")
pytest.importorskip("sklearn")

from conftest import TASKS
from jina_jax import Embedder, ModelConfig
from train.evaluation.classification import Classification, Clustering
from train.evaluation.evaluate import evaluate
from train.evaluation.model_scores import BASE, base_sides, model_scores
from train.evaluation.retrieval import Retrieval
from train.evaluation.similarity import Similarity

E5 = (("query", "query: "), ("passage", "passage: "))
LEFT = ["a chess game", "a music player", "a web server", "an audio mixer", "a puzzle", "a proxy"]
RIGHT = ["Plays chess.", "Plays music.", "Serves pages.", "Mixes sound.", "Puzzles to solve.", "Passes requests on."]
LABELS = ["games", "sound", "web", "sound", "games", "web"]


@pytest.fixture(scope="module")
def evaluation_tasks():
    return [
        Retrieval("en", LEFT, RIGHT, np.arange(6)),
        Classification(LEFT, LABELS, RIGHT, LABELS),
        Clustering(LEFT, LABELS),
        Similarity("en", LEFT, RIGHT, np.linspace(0, 1, 6)),
    ]


@pytest.fixture(scope="module")
def make_embedder(make_encoder, tokenizer):
    def make(**fields) -> Embedder:
        encoder = make_encoder(vocab_size=16_000, num_layers=1, **fields)
        return Embedder(encoder, encoder.config, tokenizer)

    return make


def by_task(scores, adapter: str = "none") -> dict[str, float]:
    return {score.task: score.value for score in scores if score.adapter == adapter}


def expected(tasks, model: Embedder, queries: str, documents: str) -> dict[str, float]:
    """Scores by hand, with prompts put before the texts themselves."""

    def embed(texts, prompt):
        return model.encode([prompt + text for text in texts], prompt="")

    return {
        task.name: task.score(embed(task.left, queries), embed(task.right, documents if task.name == "retrieval" else queries))
        for task in tasks
    }


def test_a_base_with_prompts_is_measured_with_them(make_embedder, evaluation_tasks):
    model = make_embedder(prompts=E5)
    scores = by_task(model_scores("model", model, evaluation_tasks, ()))
    assert scores == pytest.approx(expected(evaluation_tasks, model, "query: ", "passage: "), abs=1e-6)
    assert scores != pytest.approx(expected(evaluation_tasks, model, "", ""), abs=1e-6)


def test_a_model_with_adapters_above_prompts_has_them_in_the_base_rows_alone(make_embedder, evaluation_tasks):
    prompts = (*E5, ("retrieval.query", "query: "), ("retrieval.passage", "passage: "), ("classification", "Sort: "))
    model = make_embedder(prompts=prompts, tasks=TASKS)
    scores = model_scores("model", model, evaluation_tasks, TASKS)
    assert by_task(scores) == pytest.approx(expected(evaluation_tasks, model, "query: ", "passage: "), abs=1e-6)
    retrieval, classification, *_ = evaluation_tasks
    own = retrieval.score(model.encode_query(LEFT), model.encode_document(RIGHT))
    assert by_task(scores, "retrieval.query+retrieval.passage") == {"retrieval": pytest.approx(own)}
    sorted_by = classification.score(*(model.encode(texts, "classification") for texts in (LEFT, RIGHT)))
    assert by_task(scores, "classification")["classification"] == pytest.approx(sorted_by)


@pytest.mark.parametrize(
    "fields", [{}, {"prompts": (("note", "Note: "),)}, {"prompts": (("p", "P: "),), "default_prompt": "p"}]
)
def test_a_model_without_prompts_of_the_sides_is_measured_as_encode_embeds(make_embedder, evaluation_tasks, fields):
    model = make_embedder(**fields)
    plain = dict(fields.get("prompts", ())).get(fields.get("default_prompt"), "")
    scores = by_task(model_scores("model", model, evaluation_tasks, ()))
    assert scores == pytest.approx(expected(evaluation_tasks, model, plain, plain), abs=1e-6)


@pytest.mark.parametrize(
    ("prompts", "retrieval", "similarity"),
    [
        ((), (None, None), (None, None)),
        (E5, ("query: ", "passage: "), ("query: ", "query: ")),
        ((("query", "Instruct: "), ("document", "")), ("Instruct: ", ""), ("Instruct: ", "Instruct: ")),
        ((("corpus", "c: "),), ("", "c: "), ("", "")),
        ((("retrieval.query", "q: "),), (None, None), (None, None)),
    ],
)
def test_prompts_of_the_base_by_task(prompts, retrieval, similarity):
    config = ModelConfig(prompts=prompts)
    assert base_sides(config, "retrieval") == BASE._replace(prompts=retrieval)
    for task in ("classification", "clustering", "similarity"):
        assert base_sides(config, task) == BASE._replace(prompts=similarity)


@pytest.mark.filterwarnings("ignore:.*are longer than 6 tokens:UserWarning")
def test_texts_are_cut_at_the_limit(make_embedder, evaluation_tasks):
    model = make_embedder()
    (retrieval, *_) = evaluation_tasks
    (score,) = model_scores("model", model, [retrieval], (), max_length=6)
    cut = retrieval.score(*(model.encode(texts, max_length=6) for texts in (LEFT, RIGHT)))
    assert score.value == pytest.approx(cut) and cut != pytest.approx(retrieval.score(model.encode(LEFT), model.encode(RIGHT)))


def test_a_limit_above_the_models_is_an_error_before_any_work(make_embedder, monkeypatch):
    monkeypatch.setattr("train.evaluation.evaluate.corpus_tasks", lambda *_: pytest.fail("work began"))
    with pytest.raises(ValueError, match=r"max_length must be an integer in 2\.\.8194, not 9000"):
        evaluate(make_embedder(), None, [], [], max_length=9000)

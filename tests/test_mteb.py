"""`MTEBEncoder`: tasks and prompts by MTEB's own entry, and scores by hand."""

from functools import partial
from typing import get_args

import numpy as np
import pytest

pytest.importorskip("mteb")
pytest.importorskip("torch")
import mteb
import torch
from mteb.abstasks.task_metadata import TaskType
from mteb.mocks import mock_tasks
from mteb.mocks.mock_tasks.clustering import MockClusteringTask
from mteb.models.abs_encoder import get_prompt_name
from mteb.types import PromptType
from scipy.stats import spearmanr
from sentence_transformers.util import quantize_embeddings
from sklearn.metrics import ndcg_score

from jina_jax import ModelConfig
from jina_jax.config import PUBLISHED_INSTRUCTIONS
from jina_jax.mteb import MTEBEncoder, compressed, task_options

pytestmark = pytest.mark.usefixtures("unchecked")

JINA_V3 = ModelConfig(tasks=tuple(PUBLISHED_INSTRUCTIONS), prompts=tuple(PUBLISHED_INSTRUCTIONS.items()))
E5 = ModelConfig(prompts=(("query", "query: "), ("document", "passage: ")))

TEXT_TASKS = (
    mock_tasks.MockBitextMiningTask,
    mock_tasks.MockMultilingualParallelBitextMiningTask,
    mock_tasks.MockClassificationTask,
    mock_tasks.MockMultilabelClassification,
    mock_tasks.MockRegressionTask,
    MockClusteringTask,
    mock_tasks.LegacyMockClusteringFastTask,
    mock_tasks.MockPairClassificationTask,
    mock_tasks.MockSTSTask,
    mock_tasks.MockSummarizationTask,
    mock_tasks.MockRetrievalTask,
    mock_tasks.MockInstructionRetrieval,
    mock_tasks.MockRerankingTask,
    mock_tasks.MockInstructionReranking,
    mock_tasks.MockTextZeroShotClassificationTask,
)


class Metadata:
    """What `get_prompt_name` and the encoder read of a task."""

    def __init__(self, kind: str, name: str = "SomeTask"):
        self.type, self.name = kind, name


def options(config, kind, side, **more):
    return task_options(config, kind, more.pop("name", "SomeTask"), side, **more)


def run(model, task) -> dict:
    """Scores of the task's only subset and split."""
    task.load_data()
    settings = {"co2_tracker": False, "cache": None, "show_progress_bar": False}
    result = mteb.evaluate(model, task, encode_kwargs={"show_progress_bar": False}, **settings).task_results[0]
    return next(iter(result.scores.values()))[0]


@pytest.mark.parametrize("side", ["query", "document", None])
@pytest.mark.parametrize("kind", get_args(TaskType))
def test_adapters_are_those_of_mtebs_entry_for_jina_embeddings_v3(kind, side):
    prompts = mteb.get_model_meta("jinaai/jina-embeddings-v3").loader_kwargs["model_prompts"]
    name = get_prompt_name(prompts, Metadata(kind), side and PromptType(side))
    if kind == "Retrieval" and side is None:
        pytest.skip("retrieval always has sides")
    assert options(JINA_V3, kind, side or "query").get("task") == prompts.get(name)


@pytest.mark.parametrize("kind", ["STS", "Classification", "InstructionReranking"])
def test_a_model_with_prompts_has_that_of_queries_where_the_sides_are_alike(kind):
    assert options(E5, kind, "query") == {"prompt_name": "query"}


@pytest.mark.parametrize("kind", ["Retrieval", "Reranking", "InstructionReranking"])
def test_a_model_with_prompts_has_that_of_each_side(kind):
    assert [options(E5, kind, side) for side in ("query", "document")] == [
        {"prompt_name": "query"},
        {"prompt_name": "document"},
    ]


def test_the_base_embeds_where_there_is_no_adapter():
    config = ModelConfig(tasks=("classification",), prompts=(("classification", ""), ("query", "query: ")))
    assert options(config, "Classification", "query") == {"task": "classification"}
    assert options(config, "Clustering", "query") == {"prompt_name": "query"}
    assert options(ModelConfig(), "STS", "query") == {}


@pytest.mark.parametrize("name", ["ArguAna", "NanoArguAnaRetrieval", "QuoraRetrieval", "CQADupstackWebmastersRetrieval"])
def test_symmetric_retrieval_embeds_both_sides_alike(name):
    for side in ("query", "document"):
        assert options(JINA_V3, "Retrieval", side, name=name, symmetric_retrieval=True) == {"task": "text-matching"}
        assert options(E5, "Retrieval", side, name=name, symmetric_retrieval=True) == {"prompt_name": "query"}
    assert options(JINA_V3, "Retrieval", "document", name=name) == {"task": "retrieval.passage"}
    assert options(JINA_V3, "Retrieval", "query", name="SciFact", symmetric_retrieval=True) == {"task": "retrieval.query"}


@pytest.mark.parametrize("task", TEXT_TASKS, ids=lambda task: task.__name__)
def test_every_type_of_text_task_runs(embedder, task):
    assert np.isfinite(run(MTEBEncoder(embedder), task())["main_score"])


@pytest.mark.parametrize(("dim", "precision"), [(None, "float32"), (16, "int8"), (32, "binary")])
def test_sts_is_the_rank_correlation_of_cosines(embedder, dim, precision):
    task = mock_tasks.MockSTSTask()
    task.load_data()
    rows = {name: 12 * list(task.dataset["test"][name]) for name in ("sentence1", "sentence2", "score")}
    rows["sentence1"] = [f"{text} {number}" for number, text in enumerate(rows["sentence1"])]
    rows["score"] = [number * 7 % 24 for number in range(24)]
    from datasets import Dataset

    task.load_data, task.dataset = (lambda: None), {"test": Dataset.from_dict(rows)}
    got = run(MTEBEncoder(embedder, truncate_dim=dim, precision=precision), task)["main_score"]
    sides = [embedder.encode(rows[name], truncate_dim=dim) for name in ("sentence1", "sentence2")]
    if precision == "int8":
        sides = [between(quantize_embeddings(side, "int8"), side) for side in sides]
    if precision == "binary":
        sides = [np.where(side > 0, 1.0, -1.0) for side in sides]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*sides, strict=True)]
    assert got == pytest.approx(spearmanr(np.round(cosines, 6), rows["score"])[0], abs=1e-3)


def between(steps, values):
    """Middle of each step between the least and the largest value of each dimension."""
    low, high = values.min(axis=0), values.max(axis=0)
    return np.minimum(low + (steps + 128.5) / 255 * (high - low), high)


def test_retrieval_ranks_documents_by_the_cosine_of_their_sides(embedder):
    task = mock_tasks.MockRetrievalTask()
    got = run(MTEBEncoder(embedder), task)["ndcg_at_10"]
    data = task.dataset["test"] if "test" in task.dataset else task.dataset["default"]["test"]
    documents = [f"{row.get('title') or ''} {row['text']}".strip() for row in data["corpus"]]
    scores = embedder.encode_query(data["queries"]["text"]) @ embedder.encode_document(documents).T
    relevance = [
        [data["relevant_docs"][query].get(each, 0) for each in data["corpus"]["id"]] for query in data["queries"]["id"]
    ]
    assert got == pytest.approx(ndcg_score(relevance, scores, k=10), abs=1e-4)


def test_embeddings_keep_the_order_of_the_texts(embedder):
    batches = [{"text": ["one", "two two two"]}, {"text": ["three"]}]
    encode = partial(MTEBEncoder(embedder).encode, task_metadata=Metadata("Clustering"), hf_split="test", hf_subset="default")
    np.testing.assert_allclose(encode(batches), embedder.encode(["one", "two two two", "three"]), atol=1e-6)


def test_white_space_at_the_ends_of_a_text_is_not_embedded(embedder):
    """As in the sentence-transformers that the published scores were measured with."""
    given = []

    def encode(texts, **_):
        given.extend(texts)
        return np.ones((len(texts), embedder.config.hidden_size), np.float32)

    model = MTEBEncoder(embedder, encode=encode)
    texts = ["  one two\n", "\t", "three"]
    model.encode([{"text": texts}], task_metadata=Metadata("BitextMining"), hf_split="test", hf_subset="default")
    assert given == ["one two", "", "three"]


def test_similarities_are_cosines_of_arrays_and_tensors(embedder):
    model, rng = MTEBEncoder(embedder), np.random.default_rng(0)
    first, second = rng.standard_normal((2, 3, 4)).astype(np.float32)
    expected = torch.nn.functional.cosine_similarity(torch.tensor(first)[:, None], torch.tensor(second)[None], dim=-1)
    np.testing.assert_allclose(model.similarity(torch.tensor(first), second), expected, atol=1e-6)
    np.testing.assert_allclose(model.similarity_pairwise(first, torch.tensor(second)), expected.diagonal(), atol=1e-6)
    assert float(model.similarity(first[:1], second[:1])) == pytest.approx(expected[0, 0].item(), abs=1e-6)


def test_bits_order_as_the_number_that_differ():
    embeddings = np.random.default_rng(1).standard_normal((9, 13)).astype(np.float32)
    signs = embeddings > 0
    differ = (signs[:, None] != signs[None]).sum(-1)
    kept = compressed(embeddings, "binary")
    np.testing.assert_allclose(kept @ kept.T, 1 - 2 * differ / 13, atol=1e-6)


def test_results_of_variants_are_filed_apart(embedder):
    names = [
        MTEBEncoder(embedder, **settings).mteb_model_meta.experiment_name
        for settings in ({}, {"truncate_dim": 16}, {"precision": "int8"}, {"symmetric_retrieval": True}, {"max_length": 9})
    ]
    assert names[0] is None and len(set(names)) == 5


def test_metadata_are_those_of_the_model(embedder):
    meta = MTEBEncoder(embedder, name="ours/model", revision="abc").mteb_model_meta
    assert (meta.name, meta.revision, meta.embed_dim, meta.framework) == ("ours/model", "abc", [8, 16, 32, 64], ["JAX"])
    assert meta.max_tokens == embedder.max_length and meta.n_parameters > 1_000_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "ubinary"}, "unknown precision 'ubinary'; use one of"),
        ({"truncate_dim": 65}, r"truncate_dim must be an integer in 1\.\.64"),
        ({"name": "model"}, "ORGANISATION/MODEL"),
    ],
)
def test_bad_settings_are_errors(embedder, settings, message):
    with pytest.raises(ValueError, match=message):
        MTEBEncoder(embedder, **settings)


def test_a_missing_mteb_is_an_error_that_says_how_to_install_it(embedder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mteb.models.model_meta", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[mteb\]'"):
        MTEBEncoder(embedder).mteb_model_meta  # noqa: B018

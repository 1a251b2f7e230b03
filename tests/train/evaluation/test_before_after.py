"""Adapters beside their base: which texts are embedded with what, and none of them twice."""

from collections import Counter

import numpy as np
import pytest

from jina_jax import Embedder
from jina_jax.errors import NotFiniteError
from train.data.corpus import Description, Package
from train.evaluation import before_after
from train.evaluation.before_after import before_after_runs, before_after_scores, sampled_tasks, search
from train.evaluation.bm25 import bm25_score
from train.evaluation.kept_embeddings import KeptEmbeddings, Side
from train.evaluation.model_scores import Sides, base_sides

SIZES = {"vocab_size": 16_000, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "mlp_size": 64}
TASKS = ("retrieval.query", "retrieval.passage", "text-matching", "classification", "separation")
PROMPTS = (("query", "query: "), ("document", "passage: "))


def package(number: int) -> Package:
    languages = ["en", *(("de", "zh_CN") if number < 30 else ())]
    text = {each: Description(f"{each} title {number}", f"{each} body of {number} words") for each in languages}
    return Package(f"p{number}", f"s{number}", "ab"[number % 2], (f"tag{number % 3}", "all"), "test", text)


@pytest.fixture(scope="module")
def packages() -> list[Package]:
    return [package(number) for number in range(40)]


@pytest.fixture(scope="module")
def models(make_encoder, tokenizer) -> tuple[Embedder, Embedder]:
    """A base with prompts, and another model with tasks: it need not be above the base here."""
    base, tuned = make_encoder(**SIZES, prompts=PROMPTS), make_encoder(**SIZES, prompts=PROMPTS, tasks=TASKS)
    return tuple(Embedder(encoder, encoder.config, tokenizer) for encoder in (base, tuned))


@pytest.fixture
def kept(models, tmp_path, monkeypatch):
    """Maker of the embeddings of a file, and how often each text was embedded."""
    counts, encode = Counter(), Embedder.encode

    def counting(self, texts, task=None, *, prompt=None, **options):
        counts.update((task, prompt, text) for text in texts)
        return encode(self, texts, task, prompt=prompt, **options)

    monkeypatch.setattr(Embedder, "encode", counting)

    def embeddings(max_length: int = 32) -> KeptEmbeddings:
        return KeptEmbeddings(tmp_path / "kept.sqlite", lambda adapter: models[adapter is not None], max_length)

    return embeddings, counts


def test_tasks_are_of_all_packages_in_retrieval_and_of_a_sample_in_the_others(packages, monkeypatch):
    monkeypatch.setattr(before_after, "SAMPLE", 25)
    tasks = sampled_tasks(packages, [package(number) for number in range(100, 140)])
    sizes = {(task.name, task.subset): len(task.right or task.left) for task in tasks}
    assert sizes.pop(("similarity", "en")) > 10
    assert sizes == {
        ("retrieval", "en"): 40,
        ("retrieval", "de-en"): 40,
        ("classification", "en"): 25,
        ("clustering", "en"): 25,
    }
    again = sampled_tasks(packages, [package(number) for number in range(100, 140)])
    assert [task.left for task in again] == [task.left for task in tasks]


def test_each_system_embeds_a_text_once_and_smaller_dimensions_are_cut_from_it(packages, models, kept):
    make, counts = kept
    base, tuned = models
    tasks = sampled_tasks(packages, [package(number) for number in range(100, 140)])
    found = search(["en title 3"], packages, base_sides(base.config, "retrieval"), make(), 2, progress=False)
    scores = before_after_scores(before_after_runs(tasks, base.config, (8, 32)), make(), progress=False)
    assert {*counts.values()} == {1}
    used = {(task, prompt) for task, prompt, _ in counts}
    assert used == {(None, "query: "), (None, "passage: "), *((task, None) for task in TASKS)}
    before = sum(counts.values())
    assert before_after_scores(before_after_runs(tasks, base.config, (8, 32)), make(), progress=False) == scores
    assert sum(counts.values()) == before  # by another process, from the file

    bodies = [each.text["en"].body for each in packages]
    cosines = base.encode(["en title 3"], prompt="query: ") @ base.encode(bodies, prompt="passage: ").T
    best = np.argsort(-cosines[0])[:2]
    assert [hit.id for hit in found[0]] == [packages[index].id for index in best]
    np.testing.assert_allclose([hit.score for hit in found[0]], cosines[0, best], atol=1e-5)

    values = {(score.system, score.task, score.subset, score.adapter, score.dim): score.value for score in scores}
    assert values["bm25", "retrieval", "en", None, None] == bm25_score(tasks[0]).value
    task = next(task for task in tasks if task.name == "retrieval" and task.subset == "de-en")
    queries = tuned.encode(list(task.left), "retrieval.query", truncate_dim=8)
    passages = tuned.encode(list(task.right), "retrieval.passage", truncate_dim=8)
    got = values["model", "retrieval", "de-en", "retrieval.query+retrieval.passage", 8]
    assert got == pytest.approx(task.score(queries, passages), abs=1e-6)
    assert {score.adapter for score in scores if score.task == "clustering"} == {"none", "separation"}


def test_texts_are_cut_at_the_limit_without_a_warning(models, kept):
    make, _ = kept
    side = Side(["one two three four five six seven eight nine ten"], None)
    embeddings = make(max_length=4)
    embeddings.add([side], "", progress=False)
    with pytest.warns(UserWarning, match="were cut"):
        want = models[0].encode(list(side.texts), max_length=4)
    np.testing.assert_allclose(embeddings.get(side), want, atol=1e-6)


def test_what_is_not_finite_is_an_error_and_not_kept(make_encoder, tokenizer, tmp_path):
    encoder = make_encoder(**SIZES)
    encoder.tokens.table[...] = encoder.tokens.table[...] * np.nan
    broken = Embedder(encoder, encoder.config, tokenizer)
    embeddings = KeptEmbeddings(tmp_path / "kept.sqlite", lambda adapter: broken, 32)
    for _ in range(2):
        with pytest.raises(NotFiniteError):
            embeddings.add([Side(["one"], None)], "", progress=False)


def test_sides_of_a_base_without_prompts_have_none(make_encoder):
    config = make_encoder(**SIZES).config
    assert base_sides(config, "retrieval") == Sides("none", None, None)

"""`train.evaluate`: scores against references by hand, and the program from corpus to tables."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("click")
pytest.importorskip("bm25s")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from click.testing import CliRunner

from jina_jax import Embedder
from train.data.corpus import Description, Package
from train.evaluate import main
from train.evaluation import report
from train.evaluation import retrieval as retrieval_module
from train.evaluation.bm25 import bm25_score
from train.evaluation.classification import classification_tasks, clustering_tasks
from train.evaluation.evaluate import evaluate, untrained
from train.evaluation.model_scores import BASE, Run, Sides, TextEmbeddings, both_sides, model_scores, planned_runs
from train.evaluation.retrieval import ndcg_at_10, retrieval_tasks
from train.evaluation.scores import Score, write_scores
from train.evaluation.similarity import similarity_tasks
from train.evaluation.tasks import Classification, Clustering, Retrieval, Similarity, corpus_tasks

DIMS = (8, 16, 32, 64)
PAIR = "retrieval.query+retrieval.passage"
TOPICS = {"games": ("puzzle", "chess", "arcade"), "sound": ("music", "mixer", "audio"), "web": ("browser", "server", "proxy")}


def package(number: int, split: str) -> Package:
    """Package of one of three sections, with its words and tags and a unique name.

    Two in three are also in German.
    """
    section = list(TOPICS)[number % 3]
    topic, name = TOPICS[section][number % 9 // 3], f"name{number}"
    text = {"en": Description(f"{topic} of {name}", f"This is {name}, a {topic} for {section}, version {number * 7}.")}
    if number % 3:
        text["de"] = Description(f"{topic} von {name}", f"Das ist {name}, ein {topic} der Art {section}.")
    tags = (f"role::{section}", f"use::{topic}", f"size::{number % 4}")
    return Package(f"{split}-{number}", f"source-{split}-{number // 2}", section, tags, split, text)


@pytest.fixture(scope="module")
def packages() -> list[Package]:
    return [package(number, "test") for number in range(42)]


@pytest.fixture(scope="module")
def train_packages() -> list[Package]:
    return [package(number, "train") for number in range(66)]


@pytest.fixture(scope="module")
def corpus_file(packages, train_packages, tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = []
    for entry in [*train_packages, *packages]:
        text = {language: description._asdict() for language, description in entry.text.items()}
        lines.append(json.dumps(entry._asdict() | {"text": text}))
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


@pytest.fixture(scope="module")
def scores(embedder, packages, train_packages) -> list[Score]:
    return evaluate(embedder, untrained(embedder), packages, train_packages, every_adapter=True)


@pytest.fixture(scope="module")
def model(embedder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluate") / "model"
    embedder.save(directory)
    return directory


@pytest.fixture(scope="module")
def bare(make_encoder, tokenizer) -> Embedder:
    """Without adapters and without a list of dimensions."""
    encoder = make_encoder(vocab_size=16_000)
    return Embedder(encoder, encoder.config, tokenizer)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


# Retrieval


def test_ndcg_is_the_discount_of_the_relevant_ones_rank():
    ranks = [1, 3, 10, 11]
    scores = np.tile(-np.arange(20.0), (4, 1))  # candidate j is ranked j + 1
    expected = np.mean([1, 1 / math.log2(4), 1 / math.log2(11), 0])
    assert ndcg_at_10(lambda rows: scores[rows], np.array(ranks) - 1) == pytest.approx(expected)


def test_ties_count_as_the_mean_over_their_orders():
    scores = np.array([[5.0, 1.0, 1.0, 1.0, 0.0], [2.0, 1.0, 0.5, 0.5, 0.0]])  # relevant: ranks 2 to 4; rank 1, untied
    expected = np.mean([np.mean(1 / np.log2([3, 4, 5])), 1])
    assert ndcg_at_10(lambda rows: scores[rows], np.array([2, 0])) == pytest.approx(expected)


def test_ndcg_does_not_depend_on_how_many_queries_are_ranked_at_once(monkeypatch):
    scores = np.random.default_rng(0).standard_normal((7, 30))
    relevant = np.arange(7)
    whole = ndcg_at_10(lambda rows: scores[rows], relevant)
    monkeypatch.setattr(retrieval_module, "QUERIES_AT_ONCE", 3)
    assert ndcg_at_10(lambda rows: scores[rows], relevant) == pytest.approx(whole)


def test_perfect_and_random_embeddings():
    rng = np.random.default_rng(0)
    candidates, relevant = unit(rng.standard_normal((300, 32))), rng.permutation(300)[:100]
    task = Retrieval("en", [""] * 100, [""] * 300, relevant)
    assert task.score(candidates[relevant], candidates) == 1
    assert task.score(unit(rng.standard_normal((100, 32))), candidates) < 0.1


def test_embeddings_that_are_all_alike_score_as_chance():
    task = Retrieval("en", [""] * 40, [""] * 40, np.arange(40))
    alike = np.full((40, 4), 0.5, np.float32)
    assert task.score(alike, alike) == pytest.approx(np.sum(1 / np.log2(np.arange(2, 12))) / 40)


def test_retrieval_pairs_each_title_with_the_body_of_its_package(packages):
    english, german = retrieval_tasks(packages)
    assert (english.subset, german.subset) == ("en", "de-en")
    assert (english.n, german.n) == (42, 28) and len(german.right) == 42
    for task, language in ((english, "en"), (german, "de")):
        by_title = {entry.text[language].title: entry for entry in packages if language in entry.text}
        for title, index in zip(task.left, task.relevant, strict=True):
            assert task.right[index] == by_title[title].text["en"].body


def test_a_language_of_few_packages_has_no_subset(packages):
    assert [task.subset for task in retrieval_tasks(packages[:20])] == ["en"]


def test_bm25_finds_the_words_of_the_query():
    bodies = ["An editor for images and photos.", "A game of chess.", "Plays music.", "A web server."]
    queries = ["image", "games", "music player", "!", "zzz"]  # the first two after stemming; then no words, an unknown one
    found = bm25_score(Retrieval("en", queries[:3], bodies, np.arange(3)))
    assert found == ("bm25", "retrieval", "en", None, None, "ndcg@10", 1.0, 3)
    nothing = bm25_score(Retrieval("de-en", queries[3:], bodies, np.arange(2)))
    assert nothing.value == pytest.approx(np.mean(1 / np.log2([2, 3, 4, 5])))  # all four tie


# Classification and clustering


def test_separable_sections_are_classified_and_clustered():
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], 30)
    centres = np.repeat(np.eye(3, 16), 30, axis=0)
    first, second = (unit(centres + 0.05 * rng.standard_normal((90, 16))) for _ in range(2))
    texts = [""] * 90
    assert Classification(texts, list(labels), texts, list(labels)).score(first, second) == 1
    assert Clustering(texts, list(labels)).score(first, np.zeros((0, 16))) == pytest.approx(1)
    shuffled = list(rng.permutation(labels))
    assert Classification(texts, shuffled, texts, shuffled).score(first, second) < 0.6
    assert Clustering(texts, shuffled).score(first, np.zeros((0, 16))) < 0.2


def test_embeddings_that_are_all_alike_make_one_cluster():
    assert Clustering([""] * 6, ["a", "b", "c"] * 2).score(np.ones((6, 4)), np.zeros((0, 4))) == 0


def test_classification_fits_on_a_sample_of_the_train_split(packages, train_packages):
    (task,) = classification_tasks(packages, train_packages)
    bodies = {f"{p.text['en'].title}\n{p.text['en'].body}": p.section for p in [*train_packages, *packages]}
    assert len(task.left) == 48 and task.n == 42
    assert [bodies[text] for text in [*task.left, *task.right]] == [*task.left_sections, *task.right_sections]
    assert task == next(iter(classification_tasks(packages, train_packages)))


def test_sections_are_fitted_on_equally_many_packages_or_not_at_all(packages):
    train = [package(3 * number, "train") for number in range(50)]  # games
    train += [package(3 * number + 1, "train") for number in range(16)]  # sound
    train += [package(3 * number + 2, "train") for number in range(15)]  # web
    (task,) = classification_tasks(packages, train)
    assert {section: task.left_sections.count(section) for section in TOPICS} == {"games": 16, "sound": 16, "web": 0}
    assert set(task.right_sections) == {"games", "sound"}


def test_what_the_classifier_was_fitted_on_is_not_measured(train_packages):
    (task,) = classification_tasks(train_packages, train_packages)
    assert len(task.left) == 48 and task.n == 18 and not set(task.left) & set(task.right)
    fitted = train_packages[:48]
    assert not list(classification_tasks(fitted, fitted))


def test_one_section_is_not_clustered(packages):
    assert not list(clustering_tasks([entry for entry in packages if entry.section == "games"]))


# Similarity


def test_spearman_of_cosines_in_the_order_of_the_overlaps():
    angles = np.linspace(0, 3, 12)
    left, right = np.tile([[1.0, 0.0]], (12, 1)), np.stack([np.cos(angles), np.sin(angles)], 1)
    task = Similarity("en", [""] * 12, [""] * 12, np.linspace(1, 0, 12) ** 3)
    assert task.score(left, right) == pytest.approx(1)
    assert task.score(left, right[::-1]) == pytest.approx(-1)
    assert task.score(left, left) == 0


def test_pairs_are_of_different_sources_in_the_right_languages_with_the_overlap_of_their_tags(packages):
    english, other = similarity_tasks(packages)
    assert (english.subset, other.subset) == ("en", "en-other")
    owner = {f"{text.title}\n{text.body}": (p, language) for p in packages for language, text in p.text.items()}
    for task, languages in ((english, {"en"}), (other, {"de"})):
        pairs = set()
        for left, right, overlap in zip(task.left, task.right, task.overlaps, strict=True):
            (first, of_first), (second, of_second) = owner[left], owner[right]
            assert first.source != second.source and of_first == "en" and of_second in languages
            common, either = {*first.tags} & {*second.tags}, {*first.tags} | {*second.tags}
            assert overlap == len(common) / len(either)
            pairs.add(frozenset((first.id, second.id)))
        assert len(pairs) == task.n
    assert 400 < english.n <= 42 * 40 // 2  # all that there are, nearly


def test_half_of_the_pairs_are_related(corpus_split):
    tasks = list(similarity_tasks(corpus_split))
    assert [task.n for task in tasks] == pytest.approx([2000, 1000], abs=5)
    for task in tasks:
        assert 0.4 < (task.overlaps > 0.1).mean() < 0.9


@pytest.fixture(scope="module")
def corpus_split():
    from train.data.corpus import BUNDLED, read_corpus

    return read_corpus(BUNDLED, "test")


def test_the_bundled_test_split(corpus_split):
    english, *others = retrieval_tasks(corpus_split)
    assert english.n == 1672 and {task.subset: task.n for task in others}["de-en"] == 640
    assert len(others) == 15 and {len(task.right) for task in others} == {1672}


def test_packages_without_tags_are_not_compared(packages):
    assert not list(similarity_tasks([entry._replace(tags=()) for entry in packages]))


def test_too_few_packages(packages, train_packages):
    with pytest.raises(ValueError, match="at least 2 packages with an English text .* not 1"):
        corpus_tasks(packages[:1], train_packages)
    tasks = corpus_tasks(packages[:2], [])
    assert [task.name for task in tasks] == ["retrieval", "clustering"]


# The model


def test_dimensions_are_truncated_and_normalised_as_the_embedder_does(embedder, packages):
    (task, *_) = retrieval_tasks(packages)
    run = Run(task, Sides("pair", "retrieval.query", "retrieval.passage"), DIMS)
    embeddings = TextEmbeddings(embedder, [run], 32, "", False)
    for dim in DIMS:
        found = embeddings.lookup(task.left, "retrieval.query", dim)
        np.testing.assert_allclose(found, embedder.encode_query(task.left, truncate_dim=dim), atol=1e-6)


def test_a_default_truncation_of_the_model_does_not_hide_dimensions(make_encoder, tokenizer, packages):
    encoder = make_encoder(vocab_size=16_000, truncate_dim=16)
    embedder = Embedder(encoder, encoder.config, tokenizer)
    (task, *_) = retrieval_tasks(packages)
    scores = model_scores("model", embedder, [task], ())
    assert [score.dim for score in scores] == [64]
    expected = task.score(*(embedder.encode(texts, truncate_dim=64) for texts in (task.left, task.right)))
    assert scores[0].value == pytest.approx(expected)


def test_adapters_of_a_task():
    task = Clustering([""], [""])
    published = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
    own = [Run(task, sides, (8, 16)) for sides in (BASE, both_sides("separation"), both_sides("classification"))]
    assert list(planned_runs(task, published, (8, 16), False)) == own
    others = [Run(task, both_sides(name), (16,)) for name in ("retrieval.query", "retrieval.passage", "text-matching")]
    assert list(planned_runs(task, published, (8, 16), True)) == own + others
    assert list(planned_runs(task, ("legal",), (8, 16), False)) == [
        Run(task, BASE, (8, 16)),
        Run(task, both_sides("legal"), (16,)),
    ]
    assert list(planned_runs(task, (), (8, 16), True)) == [Run(task, BASE, (8, 16))]


def test_every_system_task_adapter_and_dimension_has_its_score(scores):
    measured = [(s.system, s.task, s.subset, s.adapter, s.dim) for s in scores]
    assert len(measured) == len(set(measured)) and all(math.isfinite(score.value) for score in scores)
    expected = {("bm25", "retrieval", subset, None, None) for subset in ("en", "de-en")}
    subsets = {"retrieval": ("en", "de-en"), "classification": ("en",), "clustering": ("en",), "similarity": ("en", "en-other")}
    own = {"retrieval": {PAIR, "retrieval.query", "retrieval.passage"}, "classification": {"classification"}}
    own |= {"clustering": {"classification"}, "similarity": set()}  # the model has no other adapters
    for task, names in subsets.items():
        for subset in names:
            for dim in DIMS:
                expected.add(("untrained", task, subset, "none", dim))
                expected |= {("model", task, subset, adapter, dim) for adapter in own[task] | {"none"}}
            for adapter in ("retrieval.query", "retrieval.passage", "classification"):
                expected.add(("model", task, subset, adapter, 64))
    assert set(measured) == expected


def test_the_query_and_passage_adapters_embed_their_own_side(embedder, packages, scores):
    (task, *_) = retrieval_tasks(packages)
    left = embedder.encode_query(task.left, truncate_dim=16)
    expected = task.score(left, embedder.encode_document(task.right, truncate_dim=16))
    (found,) = [s for s in scores if (s.system, s.subset, s.adapter, s.dim) == ("model", "en", PAIR, 16)]
    assert found.value == pytest.approx(expected) and found.n == 42


def test_the_untrained_model_is_another_of_the_same_sizes(embedder, scores):
    fresh = untrained(embedder)
    assert fresh.config == embedder.config and fresh.tokenizer is embedder.tokenizer
    np.testing.assert_array_equal(fresh.encode("text"), untrained(embedder).encode("text"))
    assert not np.allclose(fresh.encode("text"), embedder.encode("text"))


def test_embeddings_that_are_not_finite_are_an_error(embedder, packages, monkeypatch):
    monkeypatch.setattr(Embedder, "encode", lambda *_, **__: np.full((42, 64), np.nan))
    with pytest.raises(ValueError, match="not finite .adapter: none"):
        model_scores("model", embedder, list(clustering_tasks(packages)), ())


# The program


def run(*arguments: object):
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_the_program_writes_json_tables_and_a_plot(embedder, model, corpus_file, packages, train_packages, tmp_path):
    result = run(model, "--corpus", corpus_file, "--split", "test", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.md", "out.png"]
    content = json.loads((tmp_path / "out.json").read_text())
    assert list(content) == ["records"]
    fields = {"system", "task", "subset", "adapter", "dim", "metric", "value", "n"}
    assert all(set(record) == fields for record in content["records"])
    expected = evaluate(embedder, untrained(embedder), packages, train_packages)
    assert [(*record.values(),)[:6] for record in content["records"]] == [score[:6] for score in expected]
    np.testing.assert_allclose([record["value"] for record in content["records"]], [s.value for s in expected], atol=0.02)
    assert (tmp_path / "out.md").read_text() == result.output.removesuffix("\n")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_without_adapters(bare, corpus_file, tmp_path):
    bare.save(tmp_path / "model")
    out = tmp_path / "out.json"
    assert run(tmp_path / "model", "--corpus", corpus_file, "--split", "test", "--json", out).exit_code == 0
    records = json.loads(out.read_text())["records"]
    assert {record["adapter"] for record in records} == {None, "none"} and {record["dim"] for record in records} == {None, 64}
    assert "own adapter" not in out.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere/at/all"}, "nowhere/at/all"),
        ({"--corpus": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"--split": "dev"}, "unknown split 'dev'"),
        ({"--split": "validation"}, "no packages in the split 'validation'"),
        ({"--corpus": "broken.jsonl"}, "broken.jsonl:2: not JSON"),
        ({"--corpus": "fields.jsonl"}, "fields.jsonl:1: not a package"),
        ({"--json": "nowhere/out.json"}, "no directory nowhere"),
        ({"--json": "out.txt"}, "must end in .json"),
        ({"--json": "folder.json"}, "folder.json is a directory"),
        ({"--json": "/proc/out.json"}, "Error"),
        ({"--batch-size": 0}, "batch-size"),
    ],
    ids=str,
)
def test_a_mistake_is_one_message_before_any_work(model, corpus_file, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("train.evaluate.evaluate", lambda *_, **__: pytest.fail("work began"))
    monkeypatch.chdir(tmp_path)
    line = corpus_file.read_text("utf-8").splitlines()[0]
    (tmp_path / "broken.jsonl").write_text(f"{line}\n{line[:-9]}\n", "utf-8")
    (tmp_path / "fields.jsonl").write_text('{"id": "a"}\n')
    (tmp_path / "folder.json").mkdir()
    before = sorted(tmp_path.iterdir())
    options = {"model": model, "--corpus": corpus_file, "--split": "test", "--json": "out.json"} | changes
    result = run(options.pop("model"), *(part for option in options.items() for part in option))
    assert result.exit_code != 0 and message in result.output
    assert result.output.startswith("Usage:") or len(result.output.splitlines()) == 1
    assert isinstance(result.exception, SystemExit)
    assert sorted(tmp_path.iterdir()) == before


# The report


def score(system, task, subset, adapter, dim, value) -> Score:
    return Score(system, task, subset, adapter, dim, "", value, 10)


def test_tables():
    scores = [score("bm25", "retrieval", subset, None, None, 0.4) for subset in ("en", "de-en", "ja-en")]
    for adapter, gain in (("none", 0.0), (PAIR, 0.1)):
        for dim in (8, 16):
            values = {"en": 0.5, "de-en": 0.3, "ja-en": 0.2}
            scores += [
                score("model", "retrieval", subset, adapter, dim, value + gain + dim / 1000) for subset, value in values.items()
            ]
    lines = report.markdown(scores).splitlines()
    assert "|  | BM25 | base | own adapter |" in lines  # no untrained one here
    assert "| retrieval en, nDCG@10 (n = 10) | 40.00 | 51.60 | 61.60 |" in lines
    assert "| retrieval X-en, nDCG@10 (n = 20) | 40.00 | 26.60 | 36.60 |" in lines
    assert "| ja-en (n = 10) | 40.00 | 21.60 | 31.60 |" in lines
    assert lines.count("| dimensions | retrieval en, nDCG@10 | retrieval X-en, nDCG@10 |") == 2
    assert "| 8 | 60.80 | 35.80 |" in lines and "| 8 | 50.80 | 25.80 |" in lines
    assert f"| {PAIR} | 61.60 | 36.60 |" in lines


def test_a_score_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        write_scores(tmp_path / "out.json", [score("model", "retrieval", "en", "none", 8, math.nan)])
    assert not list(tmp_path.iterdir())


def test_loss_curves_of_several_stages(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("".join(f'{{"step": {step}, "stage": "pairs", "loss": {1 / step}}}\n' for step in range(1, 9)))
    second.write_text('{"step": 1, "stage": "retrieval", "loss": 2}\n{"step": 1, "stage": "retrieval"}\n{"step": 2, "sta')
    report.plot_losses([first, second], tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [("nonsense\n", "a.jsonl:1"), ('{"loss": 1}\n', "a.jsonl:1"), ("[]\n[1]\n", "no losses"), ("3\n", "a.jsonl:1")],
)
def test_malformed_metrics(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        report.plot_losses([tmp_path / "a.jsonl"], tmp_path / "losses.png")
    assert not (tmp_path / "losses.png").exists()

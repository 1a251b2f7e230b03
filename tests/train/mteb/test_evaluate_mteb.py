"""`train.evaluate --mteb`: from a corpus or files to MTEB's results and the table."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mteb")
pytest.importorskip("click")
pytest.importorskip("matplotlib")
import mteb
from click.testing import CliRunner
from mteb.mocks.mock_tasks import MockAggregatedTask
from sklearn.metrics import f1_score, ndcg_score

from jina_jax import Embedder
from train.evaluate import main
from train.mteb.names import select, unique
from train.mteb.run import Variant, model_name, remembering, run, variants

pytestmark = pytest.mark.usefixtures("unchecked")

VARIANTS = ("--dim", 16, "--precision", "float32", "--precision", "binary")
SECTIONS = ("games", "sound")


def record(number: int, split: str) -> dict:
    section = SECTIONS[number % 2]
    english = {"title": f"{section} tool {number}", "body": f"A tool for {section}, the {number}th of its kind."}
    german = {"title": f"Werkzeug {number} ({section})", "body": f"Ein Werkzeug Nr. {number} der Art {section}."}
    tags = [f"role::{section}", f"size::{number % 3}"]
    fields = {"id": f"{split}{number}", "source": f"{split}{number}", "section": section, "tags": tags, "split": split}
    return fields | {"text": {"en": english, "de": german}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    records = [record(number, split) for split, count in (("train", 40), ("test", 24)) for number in range(count)]
    file.write_text("".join(json.dumps(each) + "\n" for each in records))
    return file


@pytest.fixture(scope="module")
def model(embedder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("mteb") / "small"
    embedder.save(directory)
    return directory


def invoke(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


def evaluate(model, corpus, out, *more):
    return invoke(model, "--mteb", "corpus", "--corpus", corpus, "--out", out, *more)


@pytest.fixture(scope="module")
def finished(model, corpus, tmp_path_factory):
    """Directory of a run on the corpus in two precisions, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "out"
    done = evaluate(model, corpus, out, *VARIANTS)
    assert done.exit_code == 0, done.output
    return out, done.stdout


def scores(out) -> dict:
    return json.loads((out / "table.json").read_text())["systems"]


def test_the_corpus_has_a_task_of_each_kind(finished):
    out, _ = finished
    tasks = json.loads((out / "table.json").read_text())["tasks"]
    assert [task["type"] for task in tasks.values()] == [
        "Retrieval",
        "Retrieval",
        "BitextMining",
        "Classification",
        "Clustering",
        "STS",
    ]
    cells = {name: [subset for _, subset in task["cells"]] for name, task in tasks.items()}
    assert cells["PackageRetrieval"] == ["en", "de"] and cells["PackageCrosslingualRetrieval"] == ["de-en"]


def test_scores_are_those_by_hand(finished, embedder):
    test = [record(number, "test") for number in range(24)]
    sides = {(lang, part): [each["text"][lang][part] for each in test] for lang in ("en", "de") for part in ("title", "body")}
    own = scores(finished[0])["jina-jax/small, 16 dimensions"]["scores"]
    queries = embedder.encode_query(sides["de", "title"], truncate_dim=16)
    cosines = queries @ embedder.encode_document(sides["en", "body"], truncate_dim=16).T
    ndcg = 100 * ndcg_score(np.eye(24), cosines, k=10)
    assert own["PackageCrosslingualRetrieval"]["mean"] == pytest.approx(ndcg, abs=0.05)
    titles = [embedder.encode(sides[language, "title"], truncate_dim=16) for language in ("de", "en")]
    nearest = (titles[0] @ titles[1].T).argmax(axis=1)
    f1 = 100 * f1_score(np.arange(24), nearest, average="weighted", zero_division=0)
    assert own["PackageTitleBitextMining"]["mean"] == pytest.approx(f1, abs=0.05)


def test_results_are_mtebs_own_files(finished):
    out, _ = finished
    found = mteb.ResultCache(out).load_results(load_experiments="match_name").model_results
    names = {result.experiment_name for result in found}
    assert names == {"embed_dim_16", "embed_dim_16__output_dtypes_binary"}
    assert {result.model_name for result in found} == {"jina-jax/small"}
    assert all(len(result.task_results) == 6 for result in found)


def test_the_table_says_what_it_is_a_mean_of(finished):
    out, printed = finished
    text = (out / "table.md").read_text()
    assert printed.strip() in text
    assert "Run: all tasks of corpus.jsonl (test)." in text and "over what was run alone" in text
    assert "| PackageRetrieval (ndcg_at_10) |" in text and "| PackageRetrieval de test |" in text
    assert (out / "table.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_there_is_not_run_again(finished, model, corpus, monkeypatch):
    out, _ = finished
    before = (out / "table.json").read_text()

    def encode(*_, **__):
        raise AssertionError("a text was embedded again")

    monkeypatch.setattr(Embedder, "encode", encode)
    done = evaluate(model, corpus, out, *VARIANTS)
    assert done.exit_code == 0 and (out / "table.json").read_text() == before


def test_what_is_missing_is_run(finished, model, corpus):
    out, _ = finished
    file = next((out / "results").rglob("PackageTagSTS.json"))
    kept = file.read_text()
    file.unlink()
    assert evaluate(model, corpus, out, *VARIANTS).exit_code == 0
    again, before = json.loads(file.read_text()), json.loads(kept)
    assert again["scores"]["test"][0]["main_score"] == pytest.approx(before["scores"]["test"][0]["main_score"])


def test_results_of_another_model_are_refused(finished, corpus, make_encoder, embedder, tmp_path):
    other = make_encoder(seed=5, vocab_size=16_000)
    Embedder(other, other.config, embedder.tokenizer).save(tmp_path / "small")
    done = evaluate(tmp_path / "small", corpus, finished[0])
    assert done.exit_code == 1 and "holds results of jina-jax/small at" in done.output


def test_a_damaged_file_of_results_is_named(finished, model, corpus):
    file = next((finished[0] / "results").rglob("PackageTagSTS.json"))
    kept = file.read_text()
    file.write_text(kept[:40])
    done = evaluate(model, corpus, finished[0])
    file.write_text(kept)
    assert done.exit_code == 1 and "PackageTagSTS.json was not written to its end" in done.output


def test_tasks_from_files_stand_beside_published_scores(model, tmp_path, monkeypatch):
    monkeypatch.setattr("mteb.abstasks.task_metadata.TaskMetadata.descriptive_stats", property(lambda _: None))
    pairs = [{"sentence1": f"text {i}", "sentence2": f"text {i * 3 % 7}", "score": i} for i in range(8)]
    for task, name in (("STSBenchmarkMultilingualSTS", "de.test"), ("STSBenchmark", "test")):
        (tmp_path / task).mkdir()
        (tmp_path / task / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    names = ("STSBenchmarkMultilingualSTS", "STSBenchmark")
    done = invoke(model, "--mteb", *names, "--mteb-data", tmp_path, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    systems = scores(tmp_path / "out")
    assert systems["multilingual-e5-small"]["scores"]["STSBenchmarkMultilingualSTS"]["mean"] == 78.94
    assert systems["multilingual-e5-small"]["mean_task"] == pytest.approx((78.94 + 83.59) / 2)
    assert systems["text-embedding-3-large"]["mean_task"] is None  # it lacks STSBenchmark
    assert "STSBenchmarkMultilingualSTS (1 of 20)" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mteb", "STSBenchmrk"), "no task or benchmark 'STSBenchmrk'; near are ['STSBenchmark'"),
        (("--mteb", "MTEB(eng, v3)"), "'MTEB(eng, v2)'"),
        (("--mteb", "CIFAR10"), "CIFAR10 needs image (CIFAR10), and the model embeds text"),
        (("--mteb", "MIEB(eng)"), "MIEB(eng) needs image"),
        (("--mteb", "STSBenchmark", "--mteb-data", "{empty}"), "has no folder STSBenchmark; it has []"),
        (("--mteb", "corpus", "--split", "tst"), "unknown split 'tst'"),
        (("--mteb", "corpus", "--corpus", "{corpus}", "--dim", "65"), "truncate_dim must be an integer in 1..64"),
        (("--mteb", "corpus", "--corpus", "{corpus}", "--max-length", "9999999"), "max_length must be an integer in"),
    ],
)
def test_bad_input_is_one_line(model, corpus, tmp_path, arguments, message):
    arguments = [each.format(empty=tmp_path, corpus=corpus) if "{" in each else each for each in arguments]
    done = invoke(model, *arguments, "--out", tmp_path / "out")
    assert done.exit_code == 1 and message in done.output and "Traceback" not in done.output
    assert not list((tmp_path / "out").rglob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mteb", "corpus"), "needs --out DIR"),
        (("--mteb", "STS16", "--out", "o", "--json", "o.json"), "--json cannot stand beside --mteb"),
        (("--mteb", "STS16", "--out", "o", "--split", "test"), "are of `--mteb corpus`"),
        (("--corpus", "c", "--split", "test", "--dim", "8"), "--dim needs --mteb"),
        (("STS16",), "named behind --mteb"),
        ((), "either --corpus and --split, or --mteb, is needed"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message):
    done = invoke("model", *arguments)
    assert done.exit_code == 2 and message in " ".join(done.output.split())


def test_an_aggregate_has_the_mean_of_its_parts(embedder, tmp_path):
    task = MockAggregatedTask()
    for part in task.metadata.tasks:
        part.load_data()
    name = model_name("some/model", embedder)
    (done,), (system,) = run(embedder, name, [task], [Variant(None, "float32")], tmp_path)
    files = [json.loads(file.read_text()) for file in tmp_path.rglob("Mock*.json") if file.stem != done.name]
    mean = np.mean([file["scores"]["test"][0]["main_score"] for file in files])
    assert len(files) == 2 and done.complete
    assert system.scores[done.name].mean == pytest.approx(100 * mean, abs=1e-3)


def test_data_that_the_hub_does_not_give_are_asked_for(model, tmp_path, monkeypatch):
    def load_data(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("mteb.abstasks.AbsTask.load_data", load_data)
    done = invoke(model, "--mteb", "STS16", "--out", tmp_path)
    assert done.exit_code == 1 and "STS16 cannot be fetched from the hub; give its data by --mteb-data" in done.output


@pytest.mark.parametrize(
    ("source", "name"), [("org/model", "org/model"), ("runs/a/model", "jina-jax/model"), (".", f"jina-jax/{Path.cwd().name}")]
)
def test_results_are_filed_under_the_hub_id_or_the_directory(embedder, source, name):
    assert model_name(source, embedder).name == name


def test_a_models_own_dimension_is_no_variant(embedder):
    assert variants([64, 16, 64], [], embedder) == [Variant(None, "float32"), Variant(16, "float32")]
    cut = dataclasses.replace(embedder.config, truncate_dim=16)
    short = Embedder(embedder.encoder, cut, embedder.tokenizer)
    assert variants([64, 16], ["int8"], short) == [Variant(64, "int8"), Variant(None, "int8")]


def test_the_weights_hash_is_the_revision(embedder, make_encoder):
    again, other = (make_encoder(seed=seed, vocab_size=300) for seed in (0, 1))
    digests = {model_name("a/b", Embedder(each, each.config, embedder.tokenizer)).revision for each in (again, again, other)}
    assert len(digests) == 2


def test_a_task_that_two_benchmarks_narrow_otherwise_is_refused():
    first, second = select("STSBenchmarkMultilingualSTS"), select("STSBenchmarkMultilingualSTS")
    first.tasks[0].hf_subsets = ["de"]
    with pytest.raises(ValueError, match="run one at a time"):
        unique([first, second])


def test_each_text_is_embedded_once_for_each_way():
    seen = []

    def encode(texts, **options):
        seen.append((tuple(texts), options["task"]))
        return np.array([[len(text)] for text in texts])

    remember = remembering(encode, most=3)
    settings = {"batch_size": 1, "show_progress_bar": False}
    assert remember(["a", "bb", "a"], task="x", **settings).tolist() == [[1], [2], [1]]
    assert remember(["bb", "ccc"], task="x", **settings).tolist() == [[2], [3]]
    assert remember(["a"], task="y", **settings).tolist() == [[1]]
    assert remember(["a", "a"], task="y", **settings).tolist() == [[1], [1]]
    assert remember(["a"], task="x", **settings).tolist() == [[1]]  # three were kept, and all forgotten
    assert seen == [(("a", "bb"), "x"), (("ccc",), "x"), (("a",), "y"), (("a",), "x")]

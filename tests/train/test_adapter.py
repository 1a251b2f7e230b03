"""`python -m train.adapter` from a table to a model that is used and shared."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
pytest.importorskip("torch")
from click.testing import CliRunner

from convert.__main__ import main as convert
from helpers.training import assert_identical, compiled_once
from jina_jax import Embedder
from jina_jax.model.adapters import base_arrays
from oracles import bert, checkpoints
from train.adapter import main
from train.own_task import run as of_task
from train.run.metrics import read_metrics

FEW = ["--steps", "4", "--batch-size", "8", "--rank", "2"]
SUBJECTS = {
    "cards": "card payment bank account money",
    "files": "file folder disk image text",
    "mail": "mail letter address post",
}


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small E5: BERT's class, XLM-R's kind of tokenizer, and prompts."""
    directory = tmp_path_factory.mktemp("base") / "e5"
    bert.write_bert(directory, pieces="sentences")
    library = {"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": None}
    checkpoints.write_json(directory / "config_sentence_transformers.json", library)
    return directory


@pytest.fixture(scope="module")
def tickets(tmp_path_factory) -> Path:
    rng, file = np.random.default_rng(0), tmp_path_factory.mktemp("tickets") / "tickets.csv"
    rows = [(" ".join(rng.choice(words.split(), 4)) + f" {i}", label) for i in range(20) for label, words in SUBJECTS.items()]
    file.write_text("body,queue\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return file


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("questions") / "faq.jsonl"
    rows = [
        {"q": f"how do I {word} it", "a": f"you {word} it with a tool", "n": f"nobody can {word}"}
        for word in map(str, range(40))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(*arguments: str | Path):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def of_labels(file: Path, base: Path, out: Path, *more: str):
    return run(file, "--text", "body", "--label", "queue", "--model", base, "--out", out, *FEW, *more)


def of_pairs(file: Path, base: Path, out: Path, *more: str):
    return run(file, "--anchor", "q", "--positive", "a", "--model", base, "--out", out, *FEW, *more)


@pytest.fixture(scope="module")
def labelled(tickets, base, tmp_path_factory):
    """A finished run on labelled texts: its directory and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "tickets"
    done = of_labels(tickets, base, out)
    assert done.exit_code == 0, done.output
    return out, done.output


def test_labelled_texts_give_one_adapter_above_the_base_as_it_is(labelled, base):
    out, _ = labelled
    before, after = Embedder.load(base), Embedder.load(out / "model", strict=True)
    assert after.config.tasks == ("classification",) and after.config.prompt("classification") == "query: "
    assert_identical(base_arrays(after.encoder), base_arrays(before.encoder))
    assert np.abs(after.encode(["a card"], "classification") - before.encode_query(["a card"])).max() > 1e-4


def test_the_report_has_the_scores_before_and_after(labelled):
    out, output = labelled
    report = json.loads((out / "report.json").read_text())
    assert report["adapters"] == ["classification"] and report["rank"] == 2 and report["stage"]["steps"] == 4
    assert 0 <= report["before"]["accuracy"] <= 1 and report["after"]["of"].startswith("logistic regression on 8 texts")
    for moment in ("before", "after"):
        assert f"{100 * report[moment]['accuracy']:.2f}" in output
    held_out = [json.loads(line) for line in (out / "records" / "held_out.jsonl").read_text().splitlines()]
    assert len(held_out) == 6 and f"measured on {len(held_out)} texts" in output


def test_what_is_printed_to_use_the_model_works(labelled):
    _, output = labelled
    lines = re.search(r"Use it:\n((?:  .+\n)+)", output)
    assert lines is not None
    code = [line.strip() for line in lines[1].splitlines()]
    assert len(code) == 3
    names: dict = {}
    exec("\n".join(code[:2]), names)
    assert eval(code[2], names).shape == (2, bert.SIZES["hidden_size"])


def test_what_is_printed_to_share_the_model_works(labelled, base, tmp_path):
    out, output = labelled
    commands = re.findall(r"python -m convert (.*?)(?:\s+#.*)?\n", output + "\n")
    assert len(commands) == 2
    for command in commands:
        done = CliRunner().invoke(convert, command.split())
        assert done.exit_code == 0, done.output
    model = Embedder.load(out / "model")
    shared = Embedder.load(out / "shared")
    np.testing.assert_allclose(shared.encode(["a"], "classification"), model.encode(["a"], "classification"), atol=1e-5)
    # The folder alone, in the base's directory: what another who has the base needs.
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(out / "shared" / "classification", tmp_path / "base" / "classification")
    taken = Embedder.load(tmp_path / "base", prompts={"classification": "query: "})
    np.testing.assert_allclose(taken.encode(["a"], "classification"), model.encode(["a"], "classification"), atol=1e-5)
    from sentence_transformers import SentenceTransformer

    merged = SentenceTransformer(str(out / "merged"), device="cpu")
    np.testing.assert_allclose(merged.encode(["a"]), model.encode(["a"], "classification"), atol=1e-5)


def test_the_same_command_again_trains_nothing_and_prints_the_same(labelled, tickets, base):
    out, output = labelled
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = of_labels(tickets, base, out)
    assert again.exit_code == 0 and again.stdout in output
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == written


def test_another_task_in_the_same_directory_is_refused(labelled, tickets, questions, base, tmp_path):
    out, _ = labelled
    for done in (of_pairs(questions, base, out), of_labels(tickets, base, out, "--seed", "1")):
        assert done.exit_code == 1 and f"{out} holds another run; it differs in: " in done.output
    (tmp_path / "mine.txt").write_text("mine")
    done = of_labels(tickets, base, tmp_path)
    assert done.exit_code == 1 and "exists and is not empty" in done.output


def test_an_interrupted_run_resumes_wherever_its_directory_is(tickets, base, tmp_path, monkeypatch):
    test = tmp_path / "test.csv"
    test.write_text("body,queue\n" + "".join(f"{words},{label}\n" for label, words in SUBJECTS.items()))
    known = tickets.read_text().splitlines()[1]
    test.write_text(f"{test.read_text()}{known}\n")
    more = ("--test", str(test), "--name", "my-task")

    def broken(config, workdir, **options):
        raise OSError("the machine stops here")

    with monkeypatch.context() as patched:
        patched.setattr(of_task, "train", broken)
        stopped = of_labels(tickets, base, tmp_path / "run", *more).output
        assert "the machine stops here" in stopped and "1 of 4 records have a text of" in stopped
    out = (tmp_path / "run").rename(tmp_path / "moved")
    measured = (out / "task.json").stat().st_mtime_ns
    done = of_labels(tickets, base, out, *more, "--steps", "5")
    assert done.exit_code == 0, done.output
    assert (out / "task.json").stat().st_mtime_ns == measured  # the base is not measured again
    assert "of the 60 trained on, measured on 4 texts" in done.output
    assert Embedder.load(out / "model").config.tasks == ("my-task",)
    assert json.loads((out / "report.json").read_text())["stage"]["steps"] == len(read_metrics(out)) == 5


def test_pairs_give_a_query_and_a_passage_adapter(questions, base, tmp_path):
    done = of_pairs(questions, base, tmp_path / "run", "--negative", "n")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["adapters"] == ["retrieval.query", "retrieval.passage"] and report["stage"]["num_negatives"] == 1
    assert "4 anchors, each over 4 positives" in done.output.replace("\n", " ")
    model = Embedder.load(tmp_path / "run" / "model", strict=True)
    assert dict(model.config.prompts)["retrieval.passage"] == "passage: "
    lines = re.search(r"Use it:\n((?:  .+\n)+)", done.output)
    assert lines is not None and "encode_query" in lines[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dims", "8,x"], "--dims are integers"),
        (["--dims", "8,64"], r"--dims \[64\]: the base has 32 dimensions"),
        (["--max-length", "100"], r"--max-length must be in 8..72"),
        (["--batch-size", "100"], r"--batch-size must be in 1..54, the records to train on"),
        (["--rank", "33"], r"--rank must be in 1..32"),
        (["--learning-rate", "nan"], "--learning-rate must be above 0 and finite"),
        (["--held-out", "nan"], "--held-out is a share above 0 and below 1"),
        (["--name", "query"], "has 'query' already"),
        (["--name", "a/b"], "--name 'a/b': a name is up to 100 letters"),
        (["--test", "no.csv"], "there is no file no.csv"),
        (["--test", "x.csv", "--held-out", "0.2"], "--test and --held-out exclude each other"),
        (["--anchor", "x"], "name the columns"),
        (["--label", "quest"], r"did you mean 'queue'\?"),
        (["--held-out", "0.01"], "leave none to measure on"),
    ],
)
def test_bad_options_are_errors_before_anything_is_written(tickets, base, tmp_path, more, message):
    done = of_labels(tickets, base, tmp_path / "run", *more)
    assert done.exit_code == 1 and re.search(message, done.output), done.output
    assert "Traceback" not in done.output and not (tmp_path / "run").exists()


def test_a_base_that_cannot_be_used_is_an_error(tickets, base, tmp_path):
    without = tmp_path / "without"
    without.mkdir()
    for file in base.iterdir():
        if file.is_file() and file.name != "tokenizer.json":
            (without / file.name).write_bytes(file.read_bytes())
    done = of_labels(tickets, without, tmp_path / "run")
    assert done.exit_code == 1 and "has no tokenizer.json" in done.output
    done = of_labels(tickets, tmp_path / "nowhere", tmp_path / "run")
    assert done.exit_code == 1 and "there is no directory" in done.output
    done = run(tickets, "--text", "body", "--label", "queue", "--model", "no-such/model-here", "--out", tmp_path / "run")
    assert done.exit_code == 1 and "no-such/model-here is no directory here, and not to be had from the hub" in done.output
    assert "jina-jax demo-model DIR" in done.output
    assert not (tmp_path / "run").exists()


def test_a_name_that_the_base_has_is_refused(labelled, tickets, tmp_path):
    out, _ = labelled
    done = of_labels(tickets, out / "model", tmp_path / "run")
    assert done.exit_code == 1 and "has 'classification' already" in done.output and "another --name" in done.output

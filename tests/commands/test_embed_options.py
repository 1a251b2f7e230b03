"""Options of a model in the shell: `jina-jax embed` in both its forms, converters, programs of
train."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import huggingface_hub
import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("click")
pytest.importorskip("torch")
pytest.importorskip("bm25s")
pytest.importorskip("matplotlib")
import pyarrow.parquet as pq
from click.testing import CliRunner, Result
from sentence_transformers import SentenceTransformer

import train.evaluate
import train.mine
from convert.__main__ import main as convert
from helpers.training import compiled_once
from jina_jax import Embedder
from jina_jax.cli import main
from oracles import checkpoints

TEXTS = ["an image editor", "画像エディタ", "a game of chess with a long title, which is cut by a small limit"]
PROMPTS = {"query": "query: ", "passage": "passage: ", "note": "Note: "}
SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=66)


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def e5(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("options") / "e5"
    checkpoints.write_e5(directory, prompts=PROMPTS, **SMALL)
    return directory


@pytest.fixture(scope="module")
def theirs(e5) -> Callable[..., np.ndarray]:
    """sentence-transformers' embeddings of the texts by a method and its options."""
    model = SentenceTransformer(str(e5), prompts={"document": "passage: "}, device="cpu", local_files_only=True)
    return lambda method, **options: getattr(model, method)(TEXTS, normalize_embeddings=True, **options)


@pytest.fixture(scope="module")
def adapted(embedder, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("options") / "adapted"
    embedder.save(directory)
    return directory


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", "utf-8")
    return path


def embed(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["embed", *map(str, arguments)])


def embedded(file: Path, model: Path, *options: object) -> np.ndarray:
    """Embeddings of both forms, which must be the same."""
    lines, shards = file.parent / "out.npy", file.parent / "shards"
    shutil.rmtree(shards, ignore_errors=True)
    for output in (lines, f"{shards}/"):
        result = embed(file, "--model", model, *options, "--output", output)
        assert result.exit_code == 0, result.output
    found = np.load(lines)
    np.testing.assert_allclose(pq.read_table(shards)["embedding"].to_pylist(), found, atol=1e-6)
    return found


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "shards" / "_manifest.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("options", "method", "given", "recorded"),
    [
        (["--side", "query"], "encode_query", {}, (None, "query: ", "query")),
        (["--side", "document"], "encode_document", {}, (None, "passage: ", "document")),
        (["--prompt-name", "note"], "encode", {"prompt_name": "note"}, (None, "Note: ", None)),
        (["--prompt-name", "passage"], "encode", {"prompt_name": "passage"}, (None, "passage: ", "document")),
        (["--prompt", "Any: "], "encode", {"prompt": "Any: "}, (None, "Any: ", None)),
        (["--prompt", ""], "encode", {}, (None, "", None)),
        ([], "encode", {}, (None, "", None)),
    ],
    ids=str,
)
def test_prompts_and_sides_of_both_forms_are_sentence_transformers(e5, theirs, texts, options, method, given, recorded):
    np.testing.assert_allclose(embedded(texts, e5, *options), theirs(method, **given), atol=1e-5)
    assert manifest(texts.parent)["embedded"] == dict(zip(("task", "prompt", "side"), recorded, strict=True))


def test_sides_of_a_model_with_adapters_are_its_tasks(adapted, embedder, texts):
    for side, task in (("query", "retrieval.query"), ("document", "retrieval.passage")):
        expected = embedder.encode(TEXTS, task)
        for options in (["--side", side], ["--task", task]):
            np.testing.assert_allclose(embedded(texts, adapted, *options), expected, atol=1e-6)
            assert manifest(texts.parent)["embedded"] == {"task": task, "prompt": embedder.prompts[task], "side": side}
    with_prompt = embedded(texts, adapted, "--task", "classification", "--prompt", "Sort: ")
    np.testing.assert_allclose(with_prompt, embedder.encode(TEXTS, "classification", prompt="Sort: "), atol=1e-6)
    found = manifest(texts.parent)
    assert found["embedded"] == {"task": "classification", "prompt": "Sort: ", "side": None}
    assert {name: found["options"][name] for name in ("task", "prompt", "prompt_name", "side")} == {
        "task": "classification",
        "prompt": "Sort: ",
        "prompt_name": None,
        "side": None,
    }


@pytest.mark.filterwarnings("ignore:.*are longer than 8 tokens:UserWarning")
def test_max_length_and_dtype(e5, texts):
    model = Embedder.load(e5)
    np.testing.assert_allclose(embedded(texts, e5, "--max-length", 8), model.encode(TEXTS, max_length=8), atol=1e-6)
    assert np.abs(model.encode(TEXTS, max_length=8) - model.encode(TEXTS)).max() > 1e-3
    half = embedded(texts, e5, "--dtype", "bfloat16")
    np.testing.assert_array_equal(half, Embedder.load(e5, dtype="bfloat16").encode(TEXTS))
    assert manifest(texts.parent)["model"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("output", ["out.npy", "out/"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--side", "query", "--task", "classification"], "--side and --task exclude each other"),
        (["--side", "query", "--prompt", ""], "--side and --prompt exclude each other"),
        (["--side", "document", "--prompt-name", "note"], "--side and --prompt-name exclude each other"),
        (["--prompt", "x", "--prompt-name", "note"], "--prompt and --prompt-name exclude each other"),
        (["--side", "both"], "'both' is not one of 'query', 'document'"),
        (["--prompt-name", "title"], "unknown prompt_name 'title'; this model has ['query', 'passage', 'note']"),
        (["--prompt-name", ""], "unknown prompt_name ''"),
        (["--max-length", 65], "max_length must be an integer in 2..64, not 65"),
        (["--max-length", 0], "max_length must be an integer in 2..64, not 0"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--revision", "main"], "is a directory, which has no revision 'main'"),
    ],
    ids=str,
)
def test_a_mistake_is_one_message_and_leaves_nothing(e5, texts, monkeypatch, output, options, message):
    monkeypatch.chdir(texts.parent)
    result = embed(texts, "--model", e5, *options, "--output", output)
    assert result.exit_code != 0 and message in result.output
    assert result.output.startswith("Usage:") or result.output.count("\n") == 1
    assert isinstance(result.exception, SystemExit)
    assert [path.name for path in texts.parent.iterdir()] == ["texts.txt"]


# ---- wherever the shell names a model


@pytest.fixture
def revisions(e5, monkeypatch) -> list[tuple[str, str | None]]:
    """Models and revisions that the hub was asked for; it has one model."""
    asked = []

    def download(model: str, *, revision: str | None, **_: Any) -> str:
        asked.append((model, revision))
        return str(e5)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_every_command_asks_for_the_revision(revisions, texts, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"anchor": f"a{i}", "positive": f"p{i}"}) + "\n" for i in range(6)))
    small = ["--num-negatives", "1", "--range-min", "0", "--range-max", "3"]
    commands: list[tuple[click.Command, list[str]]] = [
        (main, ["embed", str(texts), "--model", "some/model", "--output", str(tmp_path / "out.npy")]),
        (main, ["embed", str(texts), "--model", "some/model", "--output", f"{tmp_path}/shards/"]),
        (main, ["info", "some/model"]),
        (convert, ["from_torch", "some/model", str(tmp_path / "native")]),
        (convert, ["to_torch", "some/model", str(tmp_path / "torch"), "--layout", "transformers"]),
        (convert, ["verify", "some/model", str(tmp_path / "native")]),
        (train.mine.main, [str(pairs), "--out", str(tmp_path / "mined.jsonl"), "--model", "some/model", *small]),
    ]
    for command, arguments in commands:
        result = CliRunner().invoke(command, [*arguments, "--revision", "v2"])
        assert result.exit_code == 0, (arguments, result.output)
        assert revisions.pop() == ("some/model", "v2") and not revisions, arguments


def test_mining_embeds_with_the_models_prompts_dtype_and_limit(e5, tmp_path, monkeypatch):
    pairs, calls, encode = tmp_path / "pairs.jsonl", [], Embedder.encode
    pairs.write_text("".join(json.dumps({"anchor": f"a{i}", "positive": f"p{i}"}) + "\n" for i in range(6)))

    def noted(self, sentences, **options):
        calls.append((str(self.encoder.dtype), sentences[0], options))
        return encode(self, sentences, **options)

    monkeypatch.setattr(Embedder, "encode", noted)
    arguments = [pairs, "--out", tmp_path / "mined.jsonl", "--num-negatives", 1, "--range-min", 0, "--range-max", 3]
    options = ["--model", e5, "--dtype", "bfloat16", "--max-length", 20]
    result = CliRunner().invoke(train.mine.main, [*map(str, arguments), *map(str, options)])
    assert result.exit_code == 0, result.output
    assert calls == [
        ("bfloat16", "p0", {"max_length": 20, "prompt_name": "passage"}),
        ("bfloat16", "a0", {"max_length": 20, "prompt_name": "query"}),
    ]
    for option in (["--dtype", "float32"], ["--revision", "v1"], ["--max-length", "20"]):
        result = CliRunner().invoke(train.mine.main, [*map(str, arguments), "--bm25", *option])
        assert result.exit_code == 1 and result.output == f"Error: {option[0]}: only with --model\n"


def test_evaluation_takes_dtype_revision_and_limit(revisions, tmp_path, monkeypatch):
    arguments = ["some/model", "--corpus", str(tmp_path / "corpus.jsonl"), "--split", "test", "--revision", "v2"]
    noted: dict[str, Any] = {}

    def evaluate(embedder: Embedder, *_: Any, **options: Any) -> list:
        noted.update(options, dtype=str(embedder.encoder.dtype))
        return []

    monkeypatch.setattr("train.evaluate.read_corpus", lambda *_: [])
    monkeypatch.setattr("train.evaluate.evaluate", evaluate)
    monkeypatch.setattr("train.evaluate.report.markdown", lambda scores: "done")
    result = CliRunner().invoke(train.evaluate.main, [*arguments, "--dtype", "bfloat16", "--max-length", "20"])
    assert result.exit_code == 0, result.output
    assert (noted["dtype"], noted["max_length"]) == ("bfloat16", 20) and revisions == [("some/model", "v2")]

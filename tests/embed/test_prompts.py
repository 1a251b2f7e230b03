"""Prompts: the published ones of models whose files lack them, a caller's, and through every
writer, against sentence-transformers."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

pytest.importorskip("click")
pytest.importorskip("torch")
from click.testing import CliRunner
from sentence_transformers import SentenceTransformer

from convert.__main__ import main as convert
from helpers.training import compiled_once
from jina_jax import Embedder
from jina_jax.checkpoints.load import load_encoder
from jina_jax.checkpoints.published_prompts import PUBLISHED_PROMPTS, _say_published
from jina_jax.checkpoints.torch_writer import write_sentence_transformers, write_transformers
from jina_jax.config import ModelConfig
from jina_jax.embed.sides import embedded_with, side_options
from jina_jax.errors import ConfigError
from oracles import bert, checkpoints
from train.config import DatasetConfig, InitialModel, Stage, TrainConfig
from train.run.initial_model import load_start

SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=66)
TEXTS = ["an image editor", "", "Bildbearbeitung für Straßen", "画像エディタ"]
E5 = {"query": "query: ", "document": "passage: "}
WEB_SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
MANY = {"query": "Query:\n ", "passage": "Passage: ", "note": "Note: "}


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    """Programs do not depend on prompts, which are a part of the configuration that jit goes by."""
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small multilingual-e5-large, whose files hold no prompts."""
    directory = tmp_path_factory.mktemp("base") / "model"
    checkpoints.write_e5(directory, **SMALL)
    return directory


@pytest.fixture
def copy(base, tmp_path) -> Callable[..., Path]:
    """Maker of copies of `base`, with prompts in their files if they are given."""

    def make(name: str, prompts: object = None) -> Path:
        directory = Path(shutil.copytree(base, tmp_path / name))
        if prompts is not None:
            checkpoints.write_json(directory / "config_sentence_transformers.json", {"prompts": prompts})
        return directory

    return make


@pytest.fixture
def hub(base, monkeypatch) -> Path:
    """A hub that has a copy of `base` under every name."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(base))
    _say_published.cache_clear()
    return base


def reference(directory: Path, prompts: dict[str, str] | None = None) -> SentenceTransformer:
    logging.disable(logging.WARNING)
    try:
        return SentenceTransformer(str(directory), prompts=prompts, device="cpu", local_files_only=True)
    finally:
        logging.disable(logging.NOTSET)


def assert_same_sides(model: Embedder, theirs: SentenceTransformer, *others: Embedder) -> None:
    """Queries, documents and plain texts embed as in sentence-transformers, and differ."""
    methods = ("encode_query", "encode_document", "encode")
    found = {method: getattr(model, method)(TEXTS) for method in methods}
    for method in methods:
        expected = getattr(theirs, method)(TEXTS, normalize_embeddings=True)
        np.testing.assert_allclose(found[method], expected, atol=1e-5, err_msg=method)
        for other in others:
            np.testing.assert_allclose(getattr(other, method)(TEXTS), found[method], atol=1e-5, err_msg=method)
    assert np.abs(found["encode_query"] - found["encode_document"]).max() > 1e-3


# ---- models known by their hub id


@pytest.mark.parametrize(
    ("model", "prompts"),
    [
        ("intfloat/multilingual-e5-small", E5),
        ("Intfloat/Multilingual-E5-Base", E5),
        ("intfloat/multilingual-e5-large-instruct", {"query": WEB_SEARCH, "document": ""}),
        ("intfloat/e5-small-v2", E5),
    ],
)
def test_a_model_that_needs_prompts_has_the_published_ones_and_says_so_once(hub, caplog, model, prompts):
    loaded = Embedder.load(model)
    assert loaded.prompts == prompts
    assert_same_sides(loaded, reference(hub, prompts))
    assert Embedder.load(model).prompts == prompts
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1 and model in said[0] and repr(prompts["query"]) in said[0]


def test_the_table_has_every_size_of_the_family():
    names = [name.removeprefix("intfloat/") for name in PUBLISHED_PROMPTS]
    english = {f"e5-{size}{kind}" for size in ("small", "base", "large") for kind in ("", "-v2", "-unsupervised")}
    assert set(names) == english | {f"multilingual-e5-{kind}" for kind in ("small", "base", "large", "large-instruct")}


def test_other_models_and_other_places_have_none(hub, copy, monkeypatch, tmp_path, caplog):
    assert Embedder.load("someone/multilingual-e5-small").prompts == {}
    copy("intfloat/multilingual-e5-small")
    monkeypatch.chdir(tmp_path)
    assert Embedder.load("intfloat/multilingual-e5-small").prompts == {}  # a directory is not the hub
    assert not caplog.records


def test_prompts_of_the_files_come_before_published_ones(copy, monkeypatch, caplog):
    directory = copy("model", {"query": "Q: "})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(directory))
    assert Embedder.load("intfloat/multilingual-e5-small").prompts == {"query": "Q: "}
    checkpoints.write_json(directory / "config_sentence_transformers.json", {"prompts": {"query": "", "document": None}})
    assert Embedder.load("intfloat/multilingual-e5-small").prompts == E5  # as sentence-transformers saves a model without any


def test_a_callers_prompts_come_before_published_ones_which_are_said_where_they_count(hub, caplog):
    given = {"query": "ask: ", "document": "tell: "}
    assert Embedder.load("intfloat/multilingual-e5-small", prompts=given).prompts == given and not caplog.records
    loaded = Embedder.load("intfloat/multilingual-e5-small", prompts={"query": "", "title": "Title: "})
    assert loaded.prompts == {"query": "", "document": "passage: ", "title": "Title: "}
    assert "passage: " in caplog.text and "'query'" not in caplog.text


@pytest.mark.parametrize("source", ["id", "place in the cache"])
def test_every_reader_takes_the_published_prompts(base, hub, tmp_path, monkeypatch, source):
    """Converters and training too; a directory in the hub's cache is known by its place."""
    model: str | Path = "intfloat/multilingual-e5-small"
    if source != "id":
        model = tmp_path / "models--intfloat--multilingual-e5-small" / "snapshots" / "0123abc"
        shutil.copytree(base, model)
        # By the id, too: it looks for the model, and then reads what was found.
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(model))
        result = CliRunner().invoke(convert, ["from_torch", "intfloat/multilingual-e5-small", str(tmp_path / "native")])
        assert result.exit_code == 0, result.output
        assert Embedder.load(tmp_path / "native").prompts == E5
    arguments = ["to_torch", str(model), str(tmp_path / "torch"), "--layout", "sentence-transformers"]
    result = CliRunner().invoke(convert, arguments)
    assert result.exit_code == 0, result.output
    assert Embedder.load(tmp_path / "torch").prompts == E5
    assert_same_sides(Embedder.load(model), reference(tmp_path / "torch"))
    stage = Stage(
        name="s", objective="pairs", datasets=(DatasetConfig("x.jsonl", "pair"),), steps=1, batch_size=2, max_length=16,
        row_length=16, learning_rate=1e-3,
    )  # fmt: skip
    encoder, _ = load_start(TrainConfig(stages=(stage,), start=InitialModel(str(model))))
    assert dict(encoder.config.prompts) == E5


# ---- a caller's prompts


def test_prompts_are_laid_over_the_models_own(copy):
    directory = copy("model", MANY)
    model = Embedder.load(directory, prompts={"query": "ask: ", "title": ""})
    assert model.prompts == MANY | {"query": "ask: ", "title": ""}
    theirs = reference(directory, {"query": "ask: ", "document": "Passage: "})
    assert_same_sides(model, theirs)
    np.testing.assert_allclose(model.encode(TEXTS, prompt_name="note"), model.encode([f"Note: {text}" for text in TEXTS]))
    assert Embedder.load(directory).prompts == MANY


def test_a_prompt_named_like_a_task_is_its_instruction(embedder, tmp_path):
    embedder.save(tmp_path / "model")
    model = Embedder.load(tmp_path / "model", prompts={"retrieval.query": "Ask: "})
    assert model.prompts == embedder.prompts | {"retrieval.query": "Ask: "}
    np.testing.assert_allclose(model.encode_query(TEXTS), embedder.encode_query(TEXTS, prompt="Ask: "), atol=1e-6)
    model.save(tmp_path / "again")
    assert Embedder.load(tmp_path / "again").prompts == model.prompts


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"query": 5}, "the one of 'query' is 5, no string"),
        ({"query": None}, "the one of 'query' is None, no string"),
        ({"query": {"en": "x"}}, "the one of 'query' is {'en': 'x'}, no string"),
        ({3: "x"}, "the name 3 is no string"),
        (["query: "], "texts by name, not ['query: ']"),
    ],
)
def test_what_is_no_prompt_is_named_before_anything_is_read(prompts, message, unchecked):
    with pytest.raises(ValueError) as error:
        load_encoder("/no/such/model", prompts=prompts)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"query": "q: ", "document": 5}, r"those of \['document'\] are \[5\]"),
        ({"query": {"en": "q: "}}, r"those of \['query'\] are \[\{'en': 'q: '\}\]"),
        ({"query": ["q: "]}, r"those of \['query'\] are \[\['q: '\]\]"),
        ({"query": True}, r"those of \['query'\] are \[True\]"),
        (["query: "], r"not \['query: '\]"),
        ("query: ", "not 'query: '"),
        (0, "not 0"),
        (False, "not False"),
        ([], r"not \[\]"),
    ],
)
def test_prompts_of_a_file_that_are_no_strings_are_named_with_it(copy, prompts, message):
    directory = copy("model", prompts)
    with pytest.raises(ConfigError, match=rf"config_sentence_transformers\.json: prompts must be texts by name, .*{message}"):
        Embedder.load(directory)


@pytest.mark.parametrize("prompts", [None, {}])
def test_null_and_nothing_are_no_prompts(copy, prompts):
    directory = copy("model")
    checkpoints.write_json(directory / "config_sentence_transformers.json", {"prompts": prompts})
    assert Embedder.load(directory).prompts == {}


@pytest.mark.parametrize("name", [["query"], 5, {}])
def test_a_default_prompt_that_is_no_name(copy, name):
    directory = copy("model")
    checkpoints.write_json(directory / "config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": name})
    with pytest.raises(ConfigError, match=r"config_sentence_transformers\.json: default_prompt_name must be a string"):
        Embedder.load(directory)


# ---- every writer


@pytest.mark.parametrize(
    ("family", "prompts"),
    [
        ("XLM-RoBERTa", E5),
        ("XLM-RoBERTa", MANY),
        ("XLM-RoBERTa", {"query": WEB_SEARCH, "document": ""}),
        ("BERT", {"corpus": "c: "}),
    ],
    ids=str,
)
def test_every_writer_writes_the_prompts(copy, tmp_path, family, prompts):
    if family == "BERT":
        directory = tmp_path / "model"
        bert.write_bert(directory, pieces="sentences", hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    else:
        directory = copy("model")
    model = Embedder.load(directory, prompts=prompts)
    model.save(tmp_path / "native")
    write_transformers(tmp_path / "transformers", model.encoder, model.tokenizer)
    write_sentence_transformers(tmp_path / "st", model.encoder, model.tokenizer, max_length=model.max_length)
    again = [Embedder.load(tmp_path / name) for name in ("native", "transformers", "st")]
    for loaded in again:
        assert prompts.items() <= loaded.prompts.items() <= (prompts | {"document": loaded.prompts.get("document")}).items()
    assert_same_sides(model, reference(tmp_path / "st"), *again)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Embedder:
    directory = tmp_path_factory.mktemp("adapted") / "model"
    checkpoints.write_original(directory, **SMALL)
    return Embedder.load(directory, prompts={"text-matching": "Compare: ", "note": "Note: "})


@pytest.mark.parametrize("task", ["retrieval.query", "retrieval.passage", "text-matching", None])
def test_a_merged_task_has_its_instruction_on_its_side(adapted, tmp_path, task):
    write_sentence_transformers(tmp_path / "st", adapted.encoder, adapted.tokenizer, task=task, max_length=64)
    theirs, ours = reference(tmp_path / "st"), Embedder.load(tmp_path / "st")
    expected, plain = adapted.encode(TEXTS, task), adapted.encode(TEXTS, task, prompt="")
    sides = {
        "encode": expected,
        "encode_query": plain if task == "retrieval.passage" else expected,
        "encode_document": plain if task == "retrieval.query" else expected,
    }
    for method, embeddings in sides.items():
        for model in (theirs, ours):
            np.testing.assert_allclose(getattr(model, method)(TEXTS), embeddings, atol=1e-5, err_msg=method)
    assert ours.prompts["note"] == "Note: "


# ---- sides

BOTH_TASKS = ("retrieval.query", "retrieval.passage", "classification")
PROMPTED = ModelConfig(prompts=(*E5.items(), ("corpus", "c: "), ("note", "n: ")), default_prompt="note")
ADAPTED = replace(PROMPTED, tasks=BOTH_TASKS, prompts=(*PROMPTED.prompts, ("retrieval.query", "Q: ")))


def test_a_side_is_its_task_else_its_prompt_else_none(unchecked):
    assert side_options(ADAPTED, "query") == {"task": "retrieval.query"}
    assert side_options(ADAPTED, "document") == {"task": "retrieval.passage"}
    assert side_options(PROMPTED, "query") == {"prompt_name": "query"}
    older = replace(PROMPTED, prompts=(("corpus", "c"), ("passage", "p")))
    assert side_options(older, "document") == {"prompt_name": "passage"}
    assert side_options(replace(PROMPTED, prompts=(("note", "n: "),)), "query") == {"prompt": ""}
    with pytest.raises(ValueError, match=r"unknown side 'both'; use one of \['query', 'document'\]"):
        side_options(PROMPTED, "both")


@pytest.mark.parametrize(
    ("config", "asked", "expected"),
    [
        (PROMPTED, {}, (None, "n: ", None)),
        (PROMPTED, {"prompt": "x"}, (None, "x", None)),
        (PROMPTED, {"prompt": ""}, (None, "", None)),
        (PROMPTED, {"prompt_name": "note"}, (None, "n: ", None)),
        (PROMPTED, {"prompt_name": "query"}, (None, "query: ", "query")),
        (PROMPTED, {"prompt_name": "corpus"}, (None, "c: ", "document")),
        (PROMPTED, {"side": "query"}, (None, "query: ", "query")),
        (PROMPTED, {"side": "document"}, (None, "passage: ", "document")),
        (replace(PROMPTED, prompts=(("note", "n: "),)), {"side": "document"}, (None, "", "document")),
        (ADAPTED, {"side": "query"}, ("retrieval.query", "Q: ", "query")),
        (ADAPTED, {"side": "document"}, ("retrieval.passage", "", "document")),
        (ADAPTED, {"task": "retrieval.query"}, ("retrieval.query", "Q: ", "query")),
        (ADAPTED, {"task": "retrieval.passage", "prompt": "x"}, ("retrieval.passage", "x", "document")),
        (ADAPTED, {"task": "classification"}, ("classification", "", None)),
        (ADAPTED, {"task": "classification", "prompt_name": "query"}, ("classification", "query: ", None)),
        (ADAPTED, {"task": "retrieval.query", "prompt_name": "document"}, ("retrieval.query", "passage: ", None)),
        (ADAPTED, {"prompt_name": "query"}, (None, "query: ", None)),  # the other side's pair would be an adapter's
    ],
)
def test_what_texts_are_embedded_with(config, asked, expected):
    choice = dict.fromkeys(("task", "prompt", "prompt_name", "side")) | asked
    assert tuple(embedded_with(config, **choice).values()) == expected


def test_names_of_prompts_that_there_are_not(embedder, unchecked):
    for name in ("", "no", 5, ["note"]):
        with pytest.raises(ValueError, match=r"unknown prompt_name .*note"):
            embedder.encode("x", prompt_name=name)

"""`jina-jax info`: what a model is, against the torch model, its files and what `Embedder` has."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

pytest.importorskip("click")
pytest.importorskip("torch")
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from transformers import BertForMaskedLM, XLMRobertaModel

from jina_jax import Embedder
from jina_jax.checkpoints.settings import list_settings
from jina_jax.checkpoints.torch_writer import write_sentence_transformers
from jina_jax.cli import main
from oracles import bert, checkpoints
from oracles.checkpoints import INSTRUCTIONS, TASKS, write_json

SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
E5 = {"query": "query: ", "document": "passage: "}
KEYS = (
    "model directory layout family sizes parameters dtype positions limit dims tasks prompts prompts_are_published "
    "default_prompt mlm_head pooler settings refused"
).split()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A small model in every layout."""
    root = tmp_path_factory.mktemp("models")
    checkpoints.write_original(root / "original", **SMALL)
    checkpoints.write_transformers(root / "transformers", spelling="peft", dtype=torch.bfloat16, **SMALL)
    checkpoints.write_xlmr(root / "XLM-RoBERTa", **SMALL)
    checkpoints.write_e5(root / "sentence-transformers", prompts=E5, max_position_embeddings=66, **SMALL)
    bert.write_bert(root / "BERT", head="mlm")
    for name in ("modules.json", "1_Pooling"):
        path = root / "BERT" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    embedder = Embedder.load(root / "original")
    embedder.save(root / "native")
    write_sentence_transformers(root / "merged", embedder.encoder, embedder.tokenizer, task=TASKS[0], max_length=99)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def copy(models, tmp_path) -> Callable[..., Path]:
    """Maker of copies of a model with other fields in some of its files."""

    def make(layout: str, **files: dict[str, Any]) -> Path:
        directory = Path(shutil.copytree(models[layout], tmp_path / "model"))
        for name, fields in files.items():
            path = directory / f"{name}.json"
            write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | fields)
        return directory

    return make


def info(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["info", *map(str, arguments)])


def described(model: object, exit_code: int = 0) -> dict[str, Any]:
    result = info(model, "--json")
    assert result.exit_code == exit_code, result.output
    found = json.loads(result.stdout)
    assert list(found) == KEYS
    return found


@pytest.mark.parametrize(
    "layout", ["native", "original", "transformers", "sentence-transformers", "XLM-RoBERTa", "BERT", "merged"]
)
def test_a_model_in_every_layout_is_what_the_embedder_has(models, layout):
    found, config = described(models[layout]), Embedder.load(models[layout]).config
    assert found["layout"] == (layout if layout != "merged" else "sentence-transformers")
    families = {"sentence-transformers": "XLM-RoBERTa", "XLM-RoBERTa": "XLM-RoBERTa", "BERT": "BERT"}
    assert found["family"] == families.get(layout, "jina-embeddings-v3")
    rank = found["sizes"].pop("lora_rank")
    assert rank == (config.lora_rank if config.tasks else None)
    assert {name: getattr(config, name) for name in found["sizes"]} == found["sizes"]
    assert found["tasks"] == {task: config.prompt(task) for task in config.tasks}
    assert found["tasks"] == ({task: INSTRUCTIONS.get(task, "") for task in TASKS} if config.tasks else {})
    assert found["tasks"] | found["prompts"] == dict(config.prompts) and found["default_prompt"] == config.default_prompt
    assert (found["mlm_head"], found["pooler"]) == (config.mlm_head, config.pooler)
    assert found["dims"] == {"matryoshka": list(config.matryoshka_dims), "truncate_dim": None}
    assert found["directory"] == found["model"] == str(models[layout])
    assert found["refused"] == [] and not found["prompts_are_published"]


def test_parameters_are_counted_as_torch_counts_them(models):
    for layout, kind in (("sentence-transformers", XLMRobertaModel), ("BERT", BertForMaskedLM)):
        counted = sum(parameter.numel() for parameter in kind.from_pretrained(models[layout]).parameters())
        assert described(models[layout])["parameters"] == {"base": counted, "adapters": {}}
    state = load_file(models["original"] / "model.safetensors")
    of_adapters = sum(tensor.numel() for name, tensor in state.items() if "lora_" in name)
    counted = {"base": sum(map(torch.numel, state.values())) - of_adapters, "adapters": dict.fromkeys(TASKS, of_adapters // 5)}
    for layout in ("original", "native"):
        assert described(models[layout])["parameters"] == counted
    base = load_file(models["transformers"] / "model.safetensors")
    one = load_file(models["transformers"] / "classification" / "adapter_model.safetensors")
    found = described(models["transformers"])
    assert found["parameters"]["base"] == sum(map(torch.numel, base.values()))
    assert found["parameters"]["adapters"] == dict.fromkeys(TASKS, sum(map(torch.numel, one.values())))
    assert found["dtype"] == {"base": ["bfloat16"], "adapters": ["bfloat16"]}


def test_positions_and_what_sets_the_limit(models, copy):
    rope = {"type": "rope", "count": 8194, "first": 0, "rope_theta": 20000.0}
    assert described(models["original"])["positions"] == described(models["native"])["positions"] == rope
    absolute = {"type": "absolute", "count": 66, "first": 2, "rope_theta": None}
    assert described(models["sentence-transformers"])["positions"] == absolute
    assert described(models["BERT"])["positions"] == absolute | {"count": 72, "first": 0}
    both = {"tokens": 64, "set_by": ["positions", "sentence_bert_config.json: max_seq_length"]}
    assert described(models["sentence-transformers"])["limit"] == both
    directory = copy("sentence-transformers", sentence_bert_config={"max_seq_length": 32})
    assert described(directory)["limit"] == {"tokens": 32, "set_by": ["sentence_bert_config.json: max_seq_length"]}
    write_json(directory / "tokenizer_config.json", {"model_max_length": 16})
    assert described(directory)["limit"] == {"tokens": 16, "set_by": ["tokenizer_config.json: model_max_length"]}


def test_every_setting_stands_in_the_json_with_its_verdict(models):
    for layout in ("transformers", "sentence-transformers", "native"):
        listed = [(s.file, s.field, s.verdict, s.why) for s in list_settings(models[layout])]
        found = described(models[layout])["settings"]
        shown = [(s["file"], s["field"], verdict, s["why"]) for verdict, settings in found.items() for s in settings]
        assert sorted(shown) == sorted(listed) and list(found) == ["obeyed", "inert", "refused", "unknown"]
    values = {(s["file"], s["field"]): s["value"] for s in found["obeyed"]}
    assert values["tokenizer_config.json", "model_max_length"] == 8194
    assert values["tokenizer.json", "model"].startswith('{"type": "Unigram"')
    assert len(values["tokenizer.json", "model"]) == 200


def test_the_weights_are_not_read(models, monkeypatch):
    monkeypatch.setattr("jina_jax.checkpoints.native.load_arrays", lambda *_: pytest.fail("read"))
    monkeypatch.setattr("jina_jax.checkpoints.torch_reader._fill", lambda *_: pytest.fail("read"))
    for directory in models.values():
        assert info(directory).exit_code == 0


def test_lines_are_aligned_and_say_what_matters(models, copy):
    lines = info(models["original"]).stdout.splitlines()
    assert "layout      original, jina-embeddings-v3" in lines
    assert "sizes       1 layers of 16, 2 heads, MLP 16, vocabulary 16,000" in lines
    assert "positions   8,194 rotary, base 20,000" in lines
    assert 'tasks       retrieval.query    "Represent the query for retrieving evidence documents: "' in lines
    assert '            separation         ""' in lines
    assert all(line[:12].strip() == "" or line[11] == " " for line in lines) and len(lines) < 40
    directory = copy("sentence-transformers", config_sentence_transformers={"default_prompt_name": "query", "odd": 1})
    lines = info(directory).stdout.splitlines()
    assert "layout      sentence-transformers, XLM-RoBERTa" in lines and "MLM head    no" in lines
    assert 'prompts     query     "query: "' in lines and "            default: query" in lines
    assert "unknown     config_sentence_transformers.json: odd" in lines
    assert any(line.endswith("0 refused, 1 unknown") for line in lines)
    assert any(line.strip().startswith("no dropout: ") for line in lines)


def test_a_hub_id_has_its_published_prompts(models, copy, monkeypatch):
    directory = copy("sentence-transformers")
    (directory / "config_sentence_transformers.json").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda model, revision, **_: f"{directory}")
    found = described("intfloat/multilingual-e5-small")
    assert found["prompts"] == E5 and found["prompts_are_published"]
    assert (found["model"], found["directory"]) == ("intfloat/multilingual-e5-small", str(directory))
    assert "            published ones: the files have none" in info("intfloat/multilingual-e5-small").stdout.splitlines()
    assert described(directory)["prompts"] == {}


def test_a_revision_is_asked_of_the_hub(models, monkeypatch):
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda model, revision, **_: asked.append(revision) or str(models["BERT"])
    )
    assert info("some/model", "--revision", "v2").exit_code == 0 and asked == ["v2"]
    result = info(models["BERT"], "--revision", "v2")
    assert result.exit_code == 1 and result.output == (
        f"Error: {models['BERT']} is a directory, which has no revision 'v2'; a model on the hub has\n"
    )


# ---- refused


@pytest.mark.parametrize(
    ("layout", "files", "message", "is_open"),
    [
        ("sentence-transformers", {"1_Pooling/config": {"pooling_mode_cls_token": True}}, "pooling_mode_cls_token True", True),
        ("BERT", {"config": {"hidden_act": "relu"}}, "config.json: hidden_act 'relu' is not supported", False),
        ("BERT", {"config": {"position_embedding_type": "relative_key"}}, "position_embedding_type 'relative_key'", False),
        ("BERT", {"config": {"hidden_act": "silu", "is_decoder": True}}, "config.json: hidden_act 'silu'", False),
        ("BERT", {"config": {"num_hidden_layers": 3}}, "num_hidden_layers is 3, in the tensors 2", False),
        ("XLM-RoBERTa", {"config": {"is_decoder": True}}, "config.json: is_decoder True", True),
        ("transformers", {"separation/adapter_config": {"use_dora": True}}, "separation/adapter_config.json: use_dora", False),
        ("native", {"tokenizer_config": {"truncation_side": "left"}}, "tokenizer_config.json: truncation_side 'left'", True),
    ],
    ids=str,
)
def test_a_model_that_is_refused_is_described_with_the_reasons(copy, layout, files, message, is_open):
    directory = copy(layout, **files)
    found = described(directory, exit_code=1)
    assert message in found["refused"][0] and found["layout"] == layout
    assert (found["sizes"] is not None) == is_open and found["settings"]["obeyed"]
    result = info(directory)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert any(line.startswith("refused     ") and message in line for line in result.stdout.splitlines())
    with pytest.raises(ValueError):
        Embedder.load(directory)


def test_a_model_of_another_kind_is_not_called_a_kind_of_ours(copy):
    found = described(copy("BERT", config={"model_type": "roberta"}), exit_code=1)
    assert found["layout"] is found["family"] is None and "model_type 'roberta' is not supported" in found["refused"][0]


def test_a_pipeline_that_is_not_built(copy):
    directory = copy("sentence-transformers")
    modules = json.loads((directory / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Dense"
    write_json(directory / "modules.json", modules)
    found = described(directory, exit_code=1)
    assert "has the modules ['Dense'], which this library does not build" in found["refused"][0]
    assert found["layout"] is None and found["settings"]["obeyed"] == []
    assert info(directory).stdout.startswith("layout      unknown\n")


# ---- what is no model


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_what_is_no_model_is_one_line(copy, tmp_path, options):
    def damage(name: str, content: str | None) -> Path:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        directory = copy("BERT")
        (directory / name).unlink() if content is None else (directory / name).write_text(content)
        return directory

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: "nowhere/at/all", "there is no directory nowhere/at/all"),
        (lambda: tmp_path / "file", "file is a file; a model is a directory"),
        (lambda: tmp_path / "empty", "empty is of an unknown kind"),
        (lambda: damage("config.json", "{"), "config.json is not JSON"),
        (lambda: damage("config.json", "[]"), "config.json holds a list, not a dict"),
        (lambda: damage("config.json", None), "has no config.json"),
        (lambda: damage("tokenizer.json", None), "has no tokenizer.json"),
        (lambda: damage("model.safetensors", "x" * 99), "model.safetensors is damaged or not a safetensors file"),
    ]
    for model, message in cases:
        result = info(model(), *options)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), message
        assert message in result.output and result.output.startswith("Error: ") and result.output.count("\n") == 1, (
            result.output
        )

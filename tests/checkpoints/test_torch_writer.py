"""What is exported loads in transformers, PEFT and sentence-transformers, and agrees there."""

import json
import warnings

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("sentence_transformers")
import torch
from click.testing import CliRunner
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from transformers import JinaEmbeddingsV3Model

from convert.__main__ import main as convert
from jina_jax import Embedder
from jina_jax.checkpoints import native
from jina_jax.checkpoints.torch_writer import write_sentence_transformers, write_transformers
from jina_jax.errors import ConfigError
from jina_jax.model.adapters import add_adapter, drop_adapter, extract_adapter
from jina_jax.model.parameters import from_arrays, variables
from oracles import checkpoints

TEXTS = ["an image editor", "", "Bildbearbeitung für Fotos", "画像エディタ 🎨"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Embedder:
    directory = tmp_path_factory.mktemp("export") / "original"
    checkpoints.write_original(directory)
    return Embedder.load(directory)


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "transformers"
    write_transformers(directory, source.encoder, source.tokenizer)
    return directory


def folder(task: str) -> str:
    return task.replace(".", "_").replace("-", "_")


def inputs(model: Embedder, task: str | None):
    """Padded ids and mask, with the instruction, and our token states."""
    prompt = (model.config.prompt(task) or "") if task else ""
    ours = model.encode(TEXTS, task, output_value="token_embeddings")
    batch = model.tokenizer([prompt + text for text in TEXTS], padding=True, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"], ours


def test_transformers_loads_the_base_and_every_adapter(source, exported):
    for task in (None, *source.config.tasks):
        ids, mask, ours = inputs(source, task)
        theirs = checkpoints.transformers_states(exported, ids, mask, folder(task) if task else None)[-1]
        for row, states in enumerate(ours):
            np.testing.assert_allclose(states, theirs[row, : len(states)].numpy(), atol=1e-4)


def test_weights_may_be_read_by_whom_the_other_files_may(exported):
    modes = {path.name: path.stat().st_mode for path in exported.rglob("*") if path.is_file()}
    assert {"model.safetensors", "adapter_model.safetensors", "config.json"} <= modes.keys()
    assert len(set(modes.values())) == 1


def test_peft_loads_every_adapter(source, exported):
    for task in source.config.tasks:
        base = JinaEmbeddingsV3Model.from_pretrained(exported).eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(base, str(exported / folder(task))).eval()
        assert not [w for w in caught if "missing" in str(w.message)], "PEFT only warns of keys that it does not find"
        ids, mask, ours = inputs(source, task)
        with torch.no_grad():
            theirs = model(input_ids=ids, attention_mask=mask).last_hidden_state
        for row, states in enumerate(ours):
            np.testing.assert_allclose(states, theirs[row, : len(states)].numpy(), atol=1e-4)


def test_what_is_exported_is_read_back_the_same(source, exported):
    again = Embedder.load(exported)
    assert again.config.tasks == source.config.tasks and again.config.matryoshka_dims == source.config.matryoshka_dims
    assert not again.config.separate_qkv_adapters
    for path, variable in variables(source.encoder).items():
        np.testing.assert_array_equal(variables(again.encoder)[path].get_value(), variable.get_value(), err_msg=path)


@pytest.mark.parametrize(
    "task", [None, "retrieval.query", "retrieval.passage", "separation", "classification", "text-matching"]
)
def test_sentence_transformers_runs_the_base_or_one_merged_task(source, tmp_path, task):
    target = tmp_path / "st"
    write_sentence_transformers(target, source.encoder, source.tokenizer, task=task, max_length=source.max_length)
    peer = SentenceTransformer(str(target), device="cpu", trust_remote_code=False)
    assert peer.max_seq_length == 8194
    np.testing.assert_allclose(peer.encode(TEXTS), source.encode(TEXTS, task), atol=1e-5)
    again = Embedder.load(target)
    np.testing.assert_allclose(again.encode(TEXTS), source.encode(TEXTS, task), atol=1e-5)


@pytest.mark.parametrize("mlm_head", [False, True])
def test_xlm_roberta_is_exported_as_itself(tmp_path, mlm_head):
    checkpoints.write_xlmr(tmp_path / "xlmr", mlm_head=mlm_head, prefix="roberta." if mlm_head else "")
    source = Embedder.load(tmp_path / "xlmr")
    write_transformers(tmp_path / "back", source.encoder, source.tokenizer)
    ids, mask, ours = inputs(source, None)
    theirs = checkpoints.xlmr_states(tmp_path / "back", ids, mask)[-1]
    for row, states in enumerate(ours):
        np.testing.assert_allclose(states, theirs[row, : len(states)].numpy(), atol=1e-4)
    write_sentence_transformers(tmp_path / "st", source.encoder, source.tokenizer, max_length=source.max_length)
    peer = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    np.testing.assert_allclose(peer.encode(TEXTS), source.encode(TEXTS), atol=1e-5)


def test_absolute_positions_do_not_fit_the_original_layout(tmp_path):
    from jina_jax.checkpoints.torch_writer import write_original

    checkpoints.write_e5(tmp_path / "e5")
    source = Embedder.load(tmp_path / "e5")
    with pytest.raises(ConfigError, match="original layout has rotary positions"):
        write_original(tmp_path / "out", source.encoder, source.tokenizer)
    assert not (tmp_path / "out").exists()


def verify(*arguments: object):
    return CliRunner().invoke(convert, ["verify", *map(str, arguments)], catch_exceptions=False)


def test_verify_reports_agreement_and_a_changed_weight(tmp_path):
    checkpoints.write_original(tmp_path / "original")
    model = Embedder.load(tmp_path / "original")
    model.save(tmp_path / "native")
    result = verify(tmp_path / "original", tmp_path / "native")
    report = json.loads(result.output[result.output.index("{") :])
    assert result.exit_code == 0 and report["ok"]
    assert [system["task"] for system in report["systems"]] == [None, *model.config.tasks]
    assert all(len(system["layers"]) == 4 for system in report["systems"])

    arrays = {path: variable.get_value() for path, variable in variables(model.encoder).items()}
    arrays["layers.up.kernel"] = arrays["layers.up.kernel"].at[1, 0, 0].add(1e-2)
    changed = from_arrays(model.config, arrays, dtype=np.float32)
    native.save_checkpoint(tmp_path / "changed", changed, model.tokenizer)
    result = verify(tmp_path / "original", tmp_path / "changed", "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    layers = report["systems"][0]["layers"]
    assert result.exit_code == 1 and not report["ok"]
    assert layers[2] > 1e-5 and max(layers[:2] + layers[3:]) < 1e-5, "the report names the layer"


def test_verify_compares_tasks_by_name_in_whatever_order(source, tmp_path):
    """Adapter folders are found in another order than the tasks had that wrote them."""
    encoder = source.encoder
    for task in ("classification", "alpha"):
        adapter = extract_adapter(source.encoder, "classification")
        encoder = add_adapter(drop_adapter(encoder, task) if task in encoder.config.tasks else encoder, task, adapter)
    write_transformers(tmp_path / "torch", encoder, source.tokenizer)
    native.save_checkpoint(tmp_path / "native", encoder, source.tokenizer)
    assert Embedder.load(tmp_path / "torch").config.tasks != encoder.config.tasks
    result = verify(tmp_path / "torch", tmp_path / "native")
    assert result.exit_code == 0, result.output

    native.save_checkpoint(tmp_path / "fewer", drop_adapter(encoder, "alpha"), source.tokenizer)
    result = verify(tmp_path / "torch", tmp_path / "fewer")
    assert result.exit_code == 1 and "alpha" in result.output


def test_a_checkpoint_is_not_compared_with_itself(tmp_path):
    checkpoints.write_original(tmp_path / "original")
    (tmp_path / "link").symlink_to("original")
    result = verify(tmp_path / "original", tmp_path / "link")
    assert result.exit_code == 1 and "source and target are the same directory" in result.output


def test_tasks_that_would_share_a_folder_are_refused(source, tmp_path):
    adapter = extract_adapter(source.encoder, "separation")
    encoder = add_adapter(add_adapter(source.encoder, "legal-de", adapter), "legal.de", adapter)
    with pytest.raises(ValueError, match="would share a folder"):
        write_transformers(tmp_path / "out", encoder, source.tokenizer)
    assert not any(tmp_path.iterdir())


def test_verify_reads_peft_and_xlm_roberta_sources(tmp_path):
    checkpoints.write_transformers(tmp_path / "peft", spelling="published")
    (tmp_path / "peft" / "separation").rename(tmp_path / "peft" / "legal-de")
    checkpoints.write_xlmr(tmp_path / "xlmr", mlm_head=True, prefix="roberta.")
    for name in ("peft", "xlmr"):
        Embedder.load(tmp_path / name).save(tmp_path / f"{name}-native")
        assert verify(tmp_path / name, tmp_path / f"{name}-native").exit_code == 0

"""Runs above models with absolute positions and prompts, as the E5 models are."""

import warnings
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
pytest.importorskip("torch")
import torch
from peft import PeftModel
from transformers import AutoTokenizer, BertModel

from helpers.training import assert_identical, compiled_once, run_config, stages, write_datasets
from jina_jax import Embedder
from jina_jax.checkpoints.torch_writer import write_transformers
from jina_jax.model.adapters import base_arrays, extract_adapter
from oracles import bert, checkpoints
from train.config import InitialModel
from train.run.loop import train

ADAPTERS = ("retrieval", "text_matching", "classification", "separation")
INSTRUCTIONS = {
    "retrieval.query": "query: ",
    "retrieval.passage": "passage: ",
    "text-matching": "query: ",
    "classification": "query: ",
    "separation": "query: ",
}
TEXTS = ["alpha", "an editor of images, and <pad> spelled out", "日本語の文", "the beta gamma delta " * 5]


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def e5_small(tmp_path_factory) -> Path:
    """BERT's class and settings with XLM-R's kind of tokenizer, small."""
    directory = tmp_path_factory.mktemp("e5") / "model"
    bert.write_bert(directory, pieces="sentences")
    library = {"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": None}
    checkpoints.write_json(directory / "config_sentence_transformers.json", library)
    return directory


@pytest.fixture(scope="module")
def finished(e5_small, datasets, tmp_path_factory) -> Embedder:
    """The model after two steps of each of the four adapter stages."""
    of_run = [stages(datasets, steps=2)[name] for name in ADAPTERS]
    of_run = [replace(stage, datasets=stage.datasets[:1]) for stage in of_run]  # each kind is another program
    start = InitialModel(source=str(e5_small), lora_rank=4, lora_alpha=8.0)
    workdir = tmp_path_factory.mktemp("run")
    train(run_config(*of_run, start=start), workdir, progress=False)
    return Embedder.load(workdir / "model", strict=True)


def test_adapters_are_trained_above_the_base_as_it_is(e5_small, finished):
    before, after = Embedder.load(e5_small), finished
    assert_identical(base_arrays(after.encoder), base_arrays(before.encoder))
    assert (after.config.position_type, after.config.position_offset) == ("absolute", 0)
    assert after.max_length == before.max_length == bert.SIZES["max_position_embeddings"]
    for task in INSTRUCTIONS:
        assert jnp.abs(extract_adapter(after.encoder, task)["layers.qkv.b"]).max() > 0, task
    np.testing.assert_array_equal(after.encode(TEXTS), before.encode(TEXTS))


def test_adapters_have_the_prompts_of_the_base(finished):
    assert {task: finished.config.prompt(task) for task in finished.config.tasks} == INSTRUCTIONS
    for task, encode in (("retrieval.query", finished.encode_query), ("retrieval.passage", finished.encode_document)):
        np.testing.assert_array_equal(encode(TEXTS), finished.encode(TEXTS, task, prompt=INSTRUCTIONS[task]))


def test_the_finished_model_is_transformers_with_peft(finished, tmp_path):
    write_transformers(tmp_path / "model", finished.encoder, finished.tokenizer)
    assert checkpoints.read_json(tmp_path / "model" / "config.json")["task_instructions"] == INSTRUCTIONS
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for task, instruction in INSTRUCTIONS.items():
        folder = tmp_path / "model" / task.replace(".", "_").replace("-", "_")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(checkpoints.load(BertModel, tmp_path / "model"), str(folder)).eval()
        assert not [w for w in caught if "missing" in str(w.message)], "PEFT only warns of keys that it does not find"
        batch = tokenizer([instruction + text for text in TEXTS], padding=True, return_tensors="pt")
        mask = batch["attention_mask"]
        with torch.no_grad():
            states = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        np.testing.assert_allclose(
            finished.encode(TEXTS, task), torch.nn.functional.normalize(means), rtol=0, atol=1e-5, err_msg=task
        )
    again = Embedder.load(tmp_path / "model", strict=True)
    assert dict(again.config.prompts) == dict(finished.config.prompts) and {*again.config.tasks} == {*INSTRUCTIONS}
    np.testing.assert_array_equal(again.encode(TEXTS, "separation"), finished.encode(TEXTS, "separation"))


@pytest.mark.parametrize("name", ["mlm", "pairs"])
def test_a_base_is_trained_under_the_positions_that_it_has(name, datasets, tmp_path):
    checkpoints.write_e5(tmp_path / "e5", **bert.SIZES)
    prompts = ("query: ", "passage: ") if name == "pairs" else ("", "")
    stage = replace(stages(datasets, steps=2)[name], prompts=prompts)
    train(run_config(stage, start=InitialModel(source=str(tmp_path / "e5"))), tmp_path / "run", progress=False)
    before, after = Embedder.load(tmp_path / "e5"), Embedder.load(tmp_path / "run" / "model")
    assert after.config.position_type == "absolute" and after.max_length == before.max_length
    tables = [base_arrays(model.encoder)["positions.table"] for model in (before, after)]
    assert (jnp.abs(tables[1] - tables[0]).max(1) > 1e-3)[2:20].all()
    assert dict(after.config.prompts) == ({"query": "query: ", "document": "passage: "} if name == "pairs" else {})
    queries = after.encode([prompts[0] + text for text in TEXTS])
    np.testing.assert_array_equal(after.encode_query(TEXTS), queries)

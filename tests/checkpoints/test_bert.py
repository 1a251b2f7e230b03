"""BERT beside XLM-RoBERTa: positions, heads, names, tokenizers and what a config leaves out."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    JinaEmbeddingsV3Config,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
)

from convert.__main__ import main as convert
from jina_jax import Embedder, ModelConfig
from jina_jax.checkpoints.hf_config import from_hf, to_hf
from jina_jax.checkpoints.torch_reader import read_torch_checkpoint
from jina_jax.embed.forward import token_states
from jina_jax.errors import CheckpointError, ConfigError
from jina_jax.model.parameters import variables
from jina_jax.text import packing
from jina_jax.text.tokenizer import load_tokenizer
from oracles import bert, checkpoints

PUBLISHED = Path(__file__).resolve().parents[1] / "fixtures" / "published_settings"
TEXTS = [
    "",
    "An editor for images, and other texts",
    "<pad> spelled [PAD] out </s> in [SEP] a <pad><pad> text [MASK] <mask> <pad>",
    "words of a longer text " * 3,
]
KINDS: dict[str, dict[str, Any]] = {
    "E5-small": {"pieces": "sentences"},
    "MiniLM": {"prefix": "bert.", "type_vocab_size": 1, "layer_norm_eps": 1e-3},
    "MLM head": {"head": "mlm"},
    "heads of pretraining, no prefix": {"head": "pretraining", "prefix": ""},
}
LONGEST = bert.SIZES["max_position_embeddings"]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[str], Path]:
    """Directory of a kind, written when it is first asked for."""
    made: dict[str, Path] = {}

    def write(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("bert") / "model"
            bert.write_bert(made[kind], **KINDS[kind])
        return made[kind]

    return write


@pytest.fixture(scope="module")
def loaded(written) -> Callable[[str], Embedder]:
    return cache(lambda kind: Embedder.load(written(kind), strict=True))


def sentence_embeddings(directory: Path, texts: list[str]) -> np.ndarray:
    logging.disable(logging.WARNING)
    try:
        model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
        return model.encode(texts, normalize_embeddings=True)
    finally:
        logging.disable(logging.NOTSET)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(convert, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


# ---- a text that spells special tokens ----

SPELLED = [
    "<pad>at the start",
    "in <pad> the middle",
    "<pad> often <pad><pad> spelled <pad>",
    "none",
    "<pad><pad>",
    "</s> <mask>",
]


def test_a_text_that_spells_padding_embeds_as_in_sentence_transformers(tmp_path):
    checkpoints.write_e5(tmp_path, **bert.SIZES)
    model = Embedder.load(tmp_path)
    expected = sentence_embeddings(tmp_path, SPELLED)
    np.testing.assert_allclose(model.encode(SPELLED), expected, atol=1e-5)
    np.testing.assert_allclose([model.encode(text) for text in SPELLED[:3]], expected[:3], atol=1e-5)


# ---- reading ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_bert_equals_torch(written, loaded, kind):
    directory, model = written(kind), loaded(kind)
    assert model.config.position_offset == 0 and model.max_length == model.config.max_tokens == LONGEST
    np.testing.assert_allclose(model.encode(TEXTS), sentence_embeddings(directory, TEXTS), atol=1e-5)

    batch = AutoTokenizer.from_pretrained(directory)(TEXTS, padding=True, return_tensors="pt")
    states = checkpoints.states(checkpoints.load(BertModel, directory), **pick(batch))[-1]
    for ours, theirs, mask in zip(
        model.encode(TEXTS, output_value="token_embeddings"), states, batch["attention_mask"], strict=True
    ):
        np.testing.assert_allclose(ours, theirs[mask.bool()].detach(), atol=1e-4)


def pick(batch: Any) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("kind", ["E5-small", "MiniLM"])
def test_every_length_equals_sentence_transformers(written, loaded, kind):
    letter = "Z" if kind == "MiniLM" else "▁Z"
    assert loaded(kind).tokenizer.tokenize("Z Z") == [letter.replace("Z", "z" if kind == "MiniLM" else "Z")] * 2
    texts = ["Z " * letters for letters in (1, 30, LONGEST - 3, LONGEST - 2, LONGEST - 1, 400)]
    with pytest.warns(UserWarning, match=f"2 of 6 texts are longer than {LONGEST} tokens"):
        got = loaded(kind).encode(texts)
    np.testing.assert_allclose(got, sentence_embeddings(written(kind), texts), atol=1e-5)


def test_logits_of_the_mlm_head_equal_torch(written):
    directory = written("heads of pretraining, no prefix")
    encoder, tokenizer = read_torch_checkpoint(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    reference = BertForMaskedLM.from_pretrained(directory)
    ids = tokenizer("an [MASK] editor")["input_ids"]
    rows = packing.lay_out([ids], packing.BatchPlan([[0]], (1, 16)), pad_id=0)
    states = token_states(encoder, rows.tokens, rows.segment_ids, rows.positions, None)
    assert encoder.mlm_head is not None
    logits = np.asarray(encoder.mlm_head(states, encoder.tokens.table[...]))[0, : len(ids)]
    with torch.no_grad():
        np.testing.assert_allclose(logits, reference(torch.tensor([ids])).logits[0], atol=1e-4)


def test_the_padding_id_is_the_tokenizers(written, loaded, tmp_path):
    model = loaded("E5-small")
    assert checkpoints.read_json(written("E5-small") / "config.json")["pad_token_id"] == 0
    assert model.config.pad_id == model.tokenizer.pad_token_id == 1
    model.save(tmp_path / "native")
    assert Embedder.load(tmp_path / "native").config == model.config
    checkpoints.write_xlmr(tmp_path / "xlmr", **bert.SIZES)
    hf = checkpoints.read_json(tmp_path / "xlmr" / "config.json")
    checkpoints.write_json(tmp_path / "xlmr" / "config.json", hf | {"pad_token_id": 0})
    with pytest.raises(CheckpointError, match="pads with id 1, the model with 0"):
        Embedder.load(tmp_path / "xlmr")


def test_the_first_names_of_layer_norms_are_read(loaded, tmp_path):
    state, _ = bert.write_bert(tmp_path, head="mlm")
    ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {name: next((name.replace(a, b) for a, b in ends.items() if a in name), name) for name in state}
    assert sum(name != was for name, was in old.items()) == 12
    checkpoints.replace(tmp_path / "model.safetensors", {old[name]: tensor for name, tensor in state.items()})
    got, expected = variables(read_torch_checkpoint(tmp_path)), variables(loaded("MLM head").encoder)
    for path, variable in expected.items():
        np.testing.assert_array_equal(got[path].get_value(), variable.get_value())


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("MLM head", {"model_type": "xlm-roberta"}, "model_type is 'xlm-roberta', and bert.embeddings.* is a name of 'bert'"),
        ("MLM head", {"model_type": None}, "model_type is None, and bert.embeddings.* is a name of 'bert'"),
        ("MiniLM", {"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not supported"),
        ("MiniLM", {"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ("MiniLM", {"position_embedding_type": "rotary"}, "position_embedding_type is 'rotary', in the tensors absolute"),
        ("MiniLM", {"max_position_embeddings": 74}, "max_position_embeddings is 74, in the tensors 72"),
    ],
)
def test_a_config_that_contradicts_the_tensors_or_asks_for_more_is_refused(written, tmp_path, kind, fields, message):
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(written(kind) / name)
    checkpoints.write_json(tmp_path / "config.json", checkpoints.read_json(written(kind) / "config.json") | fields)
    with pytest.raises(ConfigError, match=message):
        Embedder.load(tmp_path)


def test_names_of_xlm_roberta_are_no_bert(tmp_path):
    checkpoints.write_xlmr(tmp_path, **bert.SIZES)
    hf = checkpoints.read_json(tmp_path / "config.json")
    checkpoints.write_json(tmp_path / "config.json", hf | {"model_type": "bert"})
    with pytest.raises(ConfigError, match="model_type is 'bert', and .* is a name of 'xlm-roberta'"):
        Embedder.load(tmp_path)


def test_nothing_is_added_to_a_tokenizer(tmp_path):
    directory, size = tmp_path / "model", bert.word_pieces(tmp_path / "model", mask=False)
    tokenizer = load_tokenizer(directory, ModelConfig(vocab_size=size, pad_id=0))
    assert len(tokenizer) == size == max(tokenizer.get_vocab().values()) + 1
    named = (tokenizer.cls_token, tokenizer.sep_token, tokenizer.pad_token, tokenizer.mask_token, tokenizer.bos_token)
    assert named == ("[CLS]", "[SEP]", "[PAD]", None, None)
    for text in ("", "An editor for images [SEP] [PAD] <mask> <pad>"):
        assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(directory)(text)["input_ids"]


# ---- writing ----


@pytest.mark.parametrize("kind", ["E5-small", "MLM head"])
def test_a_bert_goes_to_native_and_back_equal_bit_for_bit(written, tmp_path, kind):
    source = written(kind)
    run("from_torch", source, tmp_path / "native")
    run("to_torch", tmp_path / "native", tmp_path / "back", "--layout", "transformers")
    before, after = (load_file(directory / "model.safetensors") for directory in (source, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    hf, back = (checkpoints.read_json(directory / "config.json") for directory in (source, tmp_path / "back"))
    assert back["pad_token_id"] == load_tokenizer(source, from_hf(hf)).pad_token_id
    for field in ("architectures", "model_type", "layer_norm_eps", "type_vocab_size", "max_position_embeddings", *bert.SIZES):
        assert back[field] == hf[field], field
    batch = pick(AutoTokenizer.from_pretrained(source)(TEXTS, padding=True, return_tensors="pt"))
    want, got = (checkpoints.states(checkpoints.load(BertModel, d), **batch)[-1] for d in (source, tmp_path / "back"))
    assert torch.equal(want, got)


@pytest.mark.parametrize("kind", ["E5-small", "heads of pretraining, no prefix"])
def test_a_bert_is_verified_and_exported_to_sentence_transformers(written, tmp_path, kind):
    source = written(kind)
    run("to_torch", source, tmp_path / "st", "--layout", "sentence-transformers")
    assert checkpoints.read_json(tmp_path / "st" / "sentence_bert_config.json")["max_seq_length"] == LONGEST
    expected = sentence_embeddings(source, TEXTS)
    np.testing.assert_allclose(sentence_embeddings(tmp_path / "st", TEXTS), expected, atol=1e-6)
    np.testing.assert_allclose(Embedder.load(tmp_path / "st").encode(TEXTS), expected, atol=1e-5)
    run("verify", source, tmp_path / "st", "--json", tmp_path / "report.json")
    assert checkpoints.read_json(tmp_path / "report.json")["ok"]


# ---- what a config leaves out ----

FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (BertConfig, {"model_type": "bert"}),
    "xlm-roberta": (XLMRobertaConfig, {"model_type": "xlm-roberta"}),
    "jina_embeddings_v3": (JinaEmbeddingsV3Config, {"model_type": "jina_embeddings_v3"}),
}
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_size",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
    "pad_token_id": "pad_id",
}
GIVEN = dict(
    vocab_size=50_000, hidden_size=1920, num_hidden_layers=5, num_attention_heads=32, intermediate_size=80, layer_norm_eps=1e-3,
    max_position_embeddings=99, type_vocab_size=3, initializer_range=0.5, pad_token_id=7,
)  # fmt: skip
"""Values that are no family's default; the width divides by every default number of heads."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("left_out", [None, "all", *FIELDS])
def test_a_field_that_is_left_out_has_transformers_default(family, left_out):
    kind, marks = FAMILIES[family]
    fields = {name: value for name, value in GIVEN.items() if left_out not in (name, "all")}
    expected = kind.from_dict({**fields, **marks})
    got = from_hf({**fields, **marks})
    for field, name in FIELDS.items():
        assert getattr(got, name) == getattr(expected, field), field
    assert got.position_type == ("rope" if family == "jina_embeddings_v3" else "absolute")
    if got.position_type == "rope":
        assert got.rope_theta == expected.rope_parameters["rope_theta"]


FLASH = {"auto_map": {"AutoConfig": "jinaai/xlm-roberta-flash-implementation--configuration_xlm_roberta.XLMRobertaFlashConfig"}}


@pytest.mark.parametrize("marks", [FLASH, {"position_embedding_type": "rotary"}, {"lora_adaptations": ["a"]}], ids=str)
@pytest.mark.parametrize("model_type", [{}, {"model_type": "xlm-roberta"}], ids=str)
def test_the_original_s_class_has_its_own_defaults(marks, model_type):
    """XLMRobertaFlashConfig: jina-embeddings-v3's sizes, and the rotary base of its training."""
    config = from_hf(marks | model_type)
    assert replace(config, tasks=()) == ModelConfig(rope_theta=10_000.0)


@pytest.mark.parametrize(
    ("name", "tokens", "offset", "eps", "types"),
    [
        ("multilingual-e5-small", 512, 0, 1e-12, 2),
        ("all-MiniLM-L6-v2", 512, 0, 1e-12, 2),
        ("paraphrase-multilingual-MiniLM-L12-v2", 512, 0, 1e-12, 2),
        ("multilingual-e5-base", 512, None, 1e-5, 1),
        ("multilingual-e5-large", 512, None, 1e-5, 1),
        ("multilingual-e5-large-instruct", 512, None, 1e-5, 1),
        ("xlm-roberta-base", 512, None, 1e-5, 1),
        ("xlm-roberta-large", 512, None, 1e-5, 1),
        ("jina-embeddings-v3", 8194, None, 1e-5, 1),
        ("jina-embeddings-v3-hf", 8194, None, 1e-5, 1),
    ],
)
def test_published_configs_are_read(name, tokens, offset, eps, types):
    hf = json.loads((PUBLISHED / f"{name}.json").read_text("utf-8"))["config.json"]
    config = from_hf(hf)
    assert (config.max_tokens, config.position_offset, config.layer_norm_eps, config.type_vocab_size) == (
        tokens, offset, eps, types,
    )  # fmt: skip
    for field in FIELDS.keys() & hf.keys():
        assert getattr(config, FIELDS[field]) == hf[field], field
    without_adapters = replace(config, tasks=(), prompts=())
    assert from_hf(to_hf(without_adapters, "transformers", "float32")) == without_adapters


def test_a_native_config_of_before_is_the_same_and_stays_it():
    old = ModelConfig(position_type="absolute", max_position_embeddings=514).to_dict()
    old.pop("position_offset")
    config = ModelConfig.from_dict(old)
    assert config.max_tokens == 512 and config.to_dict() == old | {"position_offset": None}
    assert ModelConfig(position_type="absolute", position_offset=2, max_position_embeddings=514).max_tokens == 512
    with pytest.raises(ConfigError, match="position_offset must be 0 .BERT. or pad_id . 1 = 2"):
        ModelConfig(position_offset=1)

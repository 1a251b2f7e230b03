"""A checkpoint that is damaged, contradictory, ambiguous or unknown gives one clear error.

The error names what is wrong.
"""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
import torch
from safetensors.torch import load_file, save_file

from jina_jax import Embedder
from jina_jax.checkpoints.torch_reader import read_torch_checkpoint
from jina_jax.errors import CheckpointError, ConfigError
from oracles import checkpoints

Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("written")
    checkpoints.write_original(root / "original")
    checkpoints.write_transformers(root / "peft", spelling="peft")
    checkpoints.write_e5(root / "e5")
    checkpoints.write_xlmr(root / "xlmr", mlm_head=True, prefix="roberta.")
    checkpoints.write_original(root / "shards", shards=3)
    Embedder.load(root / "original").save(root / "native")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def copy(written, tmp_path) -> Callable[[str], Path]:
    def of(name: str) -> Path:
        return Path(shutil.copytree(written[name], tmp_path / name))

    return of


def edit_json(path: Path, **fields) -> None:
    """Sets fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


HEADER = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,99]}}'


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:300],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"PK\x03\x04 not safetensors at all" * 10,
        lambda data: data[:8] + b"\xff" + data[9:],
        lambda data: struct.pack("<Q", 2**62) + data[8:],
        lambda data: struct.pack("<Q", len(HEADER)) + HEADER + b"\0" * 8,
    ],
    ids=["empty", "length cut", "header cut", "data cut", "data added", "no safetensors", "no JSON", "huge header", "offsets"],
)
def test_a_damaged_safetensors_file(copy, damage):
    directory = copy("original")
    file = directory / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or not a safetensors file"):
        Embedder.load(directory)


def test_all_tensors_that_do_not_fit_are_in_one_error(copy):
    directory = copy("original")

    def change(tensors):
        del tensors["roberta.encoder.layers.1.norm1.weight"]
        del tensors["roberta.encoder.layers.0.mlp.fc1.parametrizations.weight.0.lora_B"]
        tensors["roberta.encoder.layers.0.extra"] = torch.zeros(3)
        tensors["roberta.emb_ln.bias"] = torch.zeros(5)
        tensors["roberta.encoder.layers.2.norm2.bias"] = torch.zeros(64, dtype=torch.int64)

    edit_tensors(directory / "model.safetensors", change)
    with pytest.raises(CheckpointError) as error:
        Embedder.load(directory)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert sorted(lines) == sorted(
        [
            "missing: encoder.layers.1.norm1.weight",
            "missing: encoder.layers.0.mlp.fc1.parametrizations.weight.0.lora_B",
            "unexpected: encoder.layers.0.extra",
            "wrong shape: emb_ln.bias is (5,), should be (64,)",
            "wrong dtype: encoder.layers.2.norm2.bias is int64, should be one of ['float32', 'bfloat16', 'float16']",
        ]
    )


@pytest.mark.parametrize(
    ("name", "fields", "messages"),
    [
        ("original", {"hidden_size": 128}, ["hidden_size is 128, in the tensors 64"]),
        ("original", {"num_hidden_layers": 4, "intermediate_size": 7}, ["num_hidden_layers is 4", "intermediate_size is 7"]),
        ("original", {"vocab_size": 5, "type_vocab_size": 2}, ["vocab_size is 5", "type_vocab_size is 2"]),
        ("original", {"lora_rank": 8}, ["lora_rank is 8, in the tensors 4"]),
        ("original", {"lora_adaptations": ["a", "b"], "task_instructions": None}, ["number of lora_adaptations is 2"]),
        ("original", {"position_embedding_type": "absolute"}, ["position_embedding_type is 'absolute', in the tensors rope"]),
        ("e5", {"position_embedding_type": "rotary"}, ["position_embedding_type is 'rotary', in the tensors absolute"]),
        ("e5", {"max_position_embeddings": 8194}, ["max_position_embeddings is 8194, in the tensors 514"]),
        ("original", {"position_embedding_type": "alibi"}, ["position_embedding_type 'alibi' is not supported"]),
        ("original", {"hidden_act": "gelu_new"}, ["hidden_act 'gelu_new' is not supported"]),
        ("original", {"emb_pooler": "cls"}, ["emb_pooler 'cls' is not supported"]),
        ("original", {"model_type": "bert"}, ["model_type is 'bert', and roberta.", "is a name of 'xlm-roberta'"]),
        ("original", {"model_type": "deberta"}, ["model_type 'deberta' is not supported"]),
        ("original", {"rope_parameters": {"rope_type": "yarn"}}, ["rope_type 'yarn' is not supported"]),
        ("original", {"hidden_size": None}, ["hidden_size is 1024 by default, in the tensors 64"]),
        ("original", {"num_attention_heads": 5}, ["hidden_size 64 is not divisible by num_heads 5"]),
        ("original", {"task_instructions": {"separation": ""}}, ["task_instructions has no entry for"]),
        ("original", {"hidden_size": "64"}, ["hidden_size is '64', should be int"]),
        ("original", {"hidden_size": 64.0, "num_attention_heads": True}, ["hidden_size is 64.0", "num_heads is True"]),
        (
            "original",
            {"layer_norm_eps": "1e-5", "lora_alpha": "x"},
            ["layer_norm_eps is '1e-5', should be float", "lora_alpha"],
        ),
        ("original", {"rotary_emb_base": 0}, ["rope_theta must be above 0"]),
        ("original", {"rotary_emb_base": "high"}, ["rope_theta is 'high', should be float"]),
        ("original", {"matryoshka_dimensions": ["8"]}, ["matryoshka_dims is ('8',), should be tuple[int, ...]"]),
        ("original", {"rope_parameters": 5}, ["rope_parameters must be a dict"]),
        ("original", {"rope_scaling": {"type": "linear", "factor": 4.0}}, ["type 'linear' is not supported"]),
        ("original", {"lora_adaptations": "abcde", "task_instructions": None}, ["lora_adaptations must be a list"]),
        ("original", {"lora_adaptations": ["a", "b", "c", "d", ""], "task_instructions": None}, ["a task needs a name"]),
        ("e5", {"task_instructions": {"query": 5}}, ["prompts is (('query', 5),)"]),
        ("original", {"truncate_dim": 65}, ["truncate_dim 65 is outside 1..64"]),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_names_its_fields(copy, name, fields, messages):
    directory = copy(name)
    edit_json(directory / "config.json", **fields)
    with pytest.raises(ConfigError) as error:
        Embedder.load(directory)
    for message in messages:
        assert message in str(error.value)


def beside_native(directory: Path) -> None:
    shutil.copy(directory.parent / "native" / "manifest.json", directory)


def with_peft_folder(directory: Path) -> None:
    shutil.copytree(directory.parent / "peft" / "separation", directory / "separation")


def both_prefixes(directory: Path) -> None:
    edit_tensors(directory / "model.safetensors", lambda t: t.update({"emb_ln.bias": t["roberta.emb_ln.bias"].clone()}))


def mixed_layouts(directory: Path) -> None:
    name = "encoder.layer.0.attention.self.query.bias"
    edit_tensors(directory / "model.safetensors", lambda t: t.update({name: torch.zeros(64)}))


@pytest.mark.parametrize("edit", [beside_native, with_peft_folder, both_prefixes, mixed_layouts])
def test_an_ambiguous_directory_is_refused(copy, edit):
    directory = copy("original")
    for other in ("native", "peft"):
        copy(other)
    edit(directory)
    with pytest.raises(CheckpointError, match="is ambiguous"):
        Embedder.load(directory)


def test_an_unknown_kind_of_model(copy, tmp_path):
    directory = copy("original")
    save_file({"bert.encoder.layer.0.x": torch.zeros(1)}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="unknown kind.*encoder.layer.0.x.*supported are jina-embeddings-v3"):
        Embedder.load(directory)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="unknown kind"):
        Embedder.load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no directory"):
        Embedder.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file"):
        Embedder.load(directory / "config.json")


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json"])
def test_a_missing_file_is_named(copy, file):
    directory = copy("original")
    (directory / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {file}"):
        Embedder.load(directory)


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_file_that_is_no_json_object(copy, content):
    directory = copy("original")
    (directory / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json (is not JSON|holds a list)"):
        Embedder.load(directory)


def test_another_models_tokenizer(copy, written, tmp_path):
    checkpoints.write_original(tmp_path / "small", tokenizer=None, vocab_size=100)
    shutil.copy(written["original"] / "tokenizer.json", tmp_path / "small")
    with pytest.raises(CheckpointError, match="has 16000 pieces, the model 100"):
        Embedder.load(tmp_path / "small")
    directory = copy("original")
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged or not a tokenizer"):
        Embedder.load(directory)


@pytest.mark.parametrize("limit", ["long", 0, True])
def test_a_limit_that_is_no_number_of_tokens(copy, limit):
    directory = copy("original")
    edit_json(directory / "tokenizer_config.json", model_max_length=limit)
    with pytest.raises(CheckpointError, match="model_max_length must be a number of at least 2"):
        Embedder.load(directory)


def test_prompts_that_are_no_texts_by_name(copy):
    directory = copy("e5")
    for prompts in (["query: "], {"query": 5}):
        (directory / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
        with pytest.raises(ConfigError, match="prompts must be texts by name"):
            Embedder.load(directory)


def test_other_formats_beside_safetensors_are_ignored(copy, written):
    directory = copy("original")
    (directory / "onnx").mkdir()
    for name in ("pytorch_model.bin", "flax_model.msgpack", "onnx/model.onnx"):
        (directory / name).write_bytes(b"not read")
    want = Embedder.load(written["original"]).encode("a text")
    np.testing.assert_array_equal(Embedder.load(directory).encode("a text"), want)


def test_a_directory_in_place_of_the_weights(copy):
    directory = copy("original")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or not a safetensors file"):
        Embedder.load(directory)


def test_shards_that_are_missing_or_lie(copy):
    directory = copy("shards")
    index = directory / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    (directory / places["roberta.emb_ln.bias"]).rename(directory / "hidden")
    with pytest.raises(FileNotFoundError, match="lacks the shards.*safetensors"):
        Embedder.load(directory)
    (directory / "hidden").rename(directory / places["roberta.emb_ln.bias"])
    edit_json(index, weight_map=places | {"roberta.invented": places["roberta.emb_ln.bias"]})
    with pytest.raises(CheckpointError, match=r"do not hold: \['roberta.invented'\]"):
        Embedder.load(directory)
    edit_json(index, weight_map=places | {"roberta.emb_ln.bias": "../model.safetensors"})
    with pytest.raises(CheckpointError, match="outside its directory"):
        Embedder.load(directory)
    index.write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="not an index of shards"):
        Embedder.load(directory)


def test_not_finite_weights_are_named(copy):
    directory = copy("original")

    def change(tensors):
        tensors["roberta.encoder.layers.2.norm1.bias"][3] = torch.nan
        tensors["roberta.encoder.layers.0.mixer.Wqkv.parametrizations.weight.0.lora_A"][1, 0, 0] = torch.inf

    edit_tensors(directory / "model.safetensors", change)
    with pytest.raises(CheckpointError, match="2 tensors hold NaN or infinity") as error:
        Embedder.load(directory)
    assert "encoder.layers.2.norm1.bias" in str(error.value) and "Wqkv.parametrizations.weight.0.lora_A" in str(error.value)


def test_not_finite_bfloat16_weights_are_found(tmp_path):
    checkpoints.write_original(tmp_path / "low", dtype=torch.bfloat16)
    edit_tensors(tmp_path / "low" / "model.safetensors", lambda t: t["roberta.emb_ln.bias"].__setitem__(0, -torch.inf))
    with pytest.raises(CheckpointError, match=r"1 tensors hold NaN or infinity: \['emb_ln.bias'\]"):
        read_torch_checkpoint(tmp_path / "low")


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_pickles_are_read_only_when_allowed_and_never_run(tmp_path):
    directory = tmp_path / "pickled"
    checkpoints.write_original(directory, pickle=True)
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        Embedder.load(directory)
    torch.save({"arguments": Payload(tmp_path / "ran")}, directory / "training_args.bin")  # trainers leave this behind
    assert read_torch_checkpoint(directory, allow_pickle=True).config.tasks
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Payload(tmp_path / "ran")}))
    with pytest.raises(CheckpointError, match="damaged or holds more than tensors"):
        read_torch_checkpoint(directory, allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    torch.save({"step": 3}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a tensor"):
        read_torch_checkpoint(directory, allow_pickle=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"modules_to_save": ["pooler"]},
        {"bias": "all"},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"alora_invocation_tokens": [5, 6]},
        {"use_bdlora": {"target_modules_bd_a": ["fc1"]}},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_kinds_of_adapters_that_are_not_built_are_refused_by_name(copy, fields):
    directory = copy("peft")
    edit_json(directory / "separation" / "adapter_config.json", **fields)
    with pytest.raises(CheckpointError, match=f"separation.*{next(iter(fields))}"):
        Embedder.load(directory)
    edit_json(directory / "separation" / "adapter_config.json", **dict.fromkeys(fields), peft_type="LOHA")
    with pytest.raises(CheckpointError, match="peft_type 'LOHA'"):
        Embedder.load(directory)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 8}, r"wrong rank: layers\.0\.mlp\.fc1\.lora_A\.weight has 4, adapter_config\.json says 8"),
        ({"rank_pattern": {"o_proj": 2}}, "wrong rank: .*o_proj.* has 4, adapter_config.json says 2"),
        ({"lora_alpha": "high"}, "ranks or alphas that are no numbers"),
        ({"alpha_pattern": {"(": 1}}, "ranks or alphas that are no numbers"),
        ({"alpha_pattern": ["fc1"]}, "ranks or alphas that are no numbers"),
    ],
    ids=str,
)
def test_settings_of_an_adapter_that_cannot_be(copy, fields, message):
    directory = copy("peft")
    edit_json(directory / "separation" / "adapter_config.json", **fields)
    with pytest.raises(CheckpointError, match=f"separation[^$]*{message}"):
        Embedder.load(directory)


def test_an_adapter_with_one_tensor_under_two_names(copy):
    directory = copy("peft")
    name = "layers.0.self_attn.o_proj.lora_A.weight"
    again = "roberta.encoder.layers.0.mixer.out_proj.lora_A.weight"
    file = directory / "separation" / "adapter_model.safetensors"
    edit_tensors(file, lambda t: t.update({again: t[f"base_model.model.{name}"].clone()}))
    with pytest.raises(CheckpointError, match=f"separation is ambiguous: it holds {name} under two names"):
        Embedder.load(directory)


def test_adapters_in_pickles_are_read_where_allowed(copy):
    directory = copy("peft")
    file = directory / "separation" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(CheckpointError, match="separation has its weights only as a pickle"):
        Embedder.load(directory)
    assert "separation" in read_torch_checkpoint(directory, allow_pickle=True).config.tasks


def test_adapters_whose_tensors_do_not_fit(copy):
    directory = copy("peft")
    file = directory / "separation" / "adapter_model.safetensors"
    name = "base_model.model.layers.1.mlp.fc1.lora_{}.weight"

    def change(tensors):
        del tensors[name.format("B")]
        tensors["base_model.model.layers.9.mlp.fc1.lora_A.weight"] = torch.zeros(4, 64)
        tensors["base_model.model.layers.0.mlp.fc2.lora_A.weight"] = torch.zeros(4, 63)

    edit_tensors(file, change)
    with pytest.raises(CheckpointError) as error:
        Embedder.load(directory)
    for message in (
        "missing: layers.1.mlp.fc1.lora_B.weight",
        "unexpected: layers.9.mlp.fc1.lora_A.weight",
        "wrong shape: layers.0.mlp.fc2.lora_A.weight is (4, 63), should be (4, 128)",
    ):
        assert message in str(error.value)
    edit_tensors(file, lambda t: t.update({name.format("magnitude_vector"): torch.zeros(3)}))
    with pytest.raises(CheckpointError, match="magnitude_vector.*not part of a plain LoRA adapter"):
        Embedder.load(directory)


def test_an_untied_mlm_head_is_refused(copy):
    directory = copy("xlmr")
    edit_tensors(
        directory / "model.safetensors",
        lambda t: t.update({"lm_head.decoder.weight": t["roberta.embeddings.word_embeddings.weight"] + 1}),
    )
    with pytest.raises(CheckpointError, match="lm_head.decoder.weight differs.*untied"):
        Embedder.load(directory)


def test_pipelines_that_would_silently_run_as_something_else(copy):
    directory = copy("e5")
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    with pytest.raises(ConfigError, match=r"1_Pooling.*supported is the mean"):
        Embedder.load(directory)
    modules = json.loads((directory / "modules.json").read_text())
    (directory / "1_Pooling").rename(directory / "elsewhere")
    modules[1]["path"] = "elsewhere"
    (directory / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match=r"elsewhere.*supported is the mean"):
        Embedder.load(directory)
    (directory / "modules.json").write_text('["Transformer"]')
    with pytest.raises(CheckpointError, match=r"modules\.json is not a list of modules"):
        Embedder.load(directory)
    (directory / "modules.json").write_text(json.dumps([*modules, {"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(ConfigError, match=r"modules \['Dense'\]"):
        Embedder.load(directory)


def test_a_flipped_bit_in_any_file_of_a_native_checkpoint_is_found(copy):
    directory = copy("native")
    rng = np.random.default_rng(0)
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) > 8
    for file in files:
        data = file.read_bytes()
        place = int(rng.integers(len(data)))
        file.write_bytes(data[:place] + bytes([data[place] ^ (1 << int(rng.integers(8)))]) + data[place + 1 :])
        with pytest.raises(ValueError, match="damaged or edited|manifest|not JSON|is not as it was written|unknown kind"):
            Embedder.load(directory)
        file.write_bytes(data)
        file.rename(directory / "moved")
        with pytest.raises((ValueError, FileNotFoundError), match="missing|manifest|unknown kind"):
            Embedder.load(directory)
        (directory / "moved").rename(file)
    assert Embedder.load(directory).config.tasks


def test_weights_that_overflow_the_dtype_asked_for_are_named(copy):
    directory = copy("e5")
    name = "encoder.layer.1.output.dense.weight"
    edit_tensors(directory / "model.safetensors", lambda tensors: tensors[name].mul_(1e8))
    with pytest.raises(CheckpointError, match=rf"NaN or infinity: \['{name}, in float16'\]"):
        read_torch_checkpoint(directory, param_dtype=np.float16)
    read_torch_checkpoint(directory, param_dtype=np.float32)

"""Conversion loses nothing: original -> native -> original is equal bit for bit."""

import math
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from convert.__main__ import main as convert
from jina_jax import Embedder, ModelConfig
from jina_jax.checkpoints import torch_names
from jina_jax.checkpoints.native import load_checkpoint, save_checkpoint
from jina_jax.checkpoints.peft import adapter_folder
from jina_jax.checkpoints.torch_reader import read_torch_checkpoint
from jina_jax.checkpoints.torch_writer import write_original, write_transformers
from jina_jax.model.parameters import abstract_variables, variables
from jina_jax.text.tokenizer import load_tokenizer
from oracles import checkpoints


def run(*arguments: object) -> str:
    result = CliRunner().invoke(convert, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def assert_equal_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert torch.equal(got[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16}, {"rank": 3, "alpha": 2, "tasks": ("a", "b")}, {"tasks": ()}],
    ids=["published", "bfloat16", "other rank and tasks", "no adapters"],
)
def test_original_to_native_and_back_is_equal_bit_for_bit(tmp_path, options):
    state, hf = checkpoints.write_original(tmp_path / "original", **options)
    run("from_torch", tmp_path / "original", tmp_path / "native")
    run("to_torch", tmp_path / "native", tmp_path / "back", "--layout", "original")
    assert_equal_bits(load_file(tmp_path / "back" / "model.safetensors"), state)
    back = checkpoints.read_json(tmp_path / "back" / "config.json")
    kept = ("hidden_size", "num_hidden_layers", "rotary_emb_base", "matryoshka_dimensions", "layer_norm_eps")
    adapters = ("lora_adaptations", "lora_rank", "lora_alpha", "task_instructions")
    for field in kept + (adapters if options.get("tasks") != () else ()):
        assert back[field] == hf[field], field


def test_a_native_checkpoint_is_read_back_equal_bit_for_bit(tmp_path, make_encoder, tokenizer):
    encoder = make_encoder(vocab_size=16_000, tasks=("a", "b"), pooler=True, mlm_head=True)
    save_checkpoint(tmp_path / "model", encoder, tokenizer)
    got = load_checkpoint(tmp_path / "model")
    assert got.config == encoder.config
    for path, variable in variables(encoder).items():
        np.testing.assert_array_equal(variables(got)[path].get_value(), variable.get_value())


def test_separate_down_projections_become_shared_ones_of_three_times_the_rank(tmp_path):
    checkpoints.write_transformers(tmp_path / "peft", spelling="peft")
    source = Embedder.load(tmp_path / "peft")
    assert source.config.separate_qkv_adapters
    write_original(tmp_path / "original", source.encoder, source.tokenizer)
    target = Embedder.load(tmp_path / "original")
    assert not target.config.separate_qkv_adapters and target.config.lora_rank == 3 * source.config.lora_rank
    for task in (None, *source.config.tasks):
        np.testing.assert_allclose(target.encode(["a", "日本語"], task), source.encode(["a", "日本語"], task), atol=1e-5)


def test_adapters_of_different_scales_are_written_with_one(tmp_path):
    adapters = {
        "first": {"r": 2, "lora_alpha": 8},
        "second": {"r": 4, "lora_alpha": 1, "use_rslora": True, "alpha_pattern": {"q_proj": 3, "v_proj": -2}},
    }
    checkpoints.write_transformers(tmp_path / "peft", spelling="peft", adapters=adapters)
    source = Embedder.load(tmp_path / "peft")
    write_original(tmp_path / "original", source.encoder, source.tokenizer)
    target = Embedder.load(tmp_path / "original")
    for task in (None, "first", "second"):
        np.testing.assert_allclose(target.encode(["a", "日本語"], task), source.encode(["a", "日本語"], task), atol=1e-5)


def test_the_rotary_base_is_written_as_asked(tmp_path):
    checkpoints.write_original(tmp_path / "original", rotary_emb_base=10_000.0)
    run("from_torch", tmp_path / "original", tmp_path / "native")
    output = run("to_torch", tmp_path / "native", tmp_path / "served", "--layout", "original")
    assert "10000" in output and "20000" in output
    assert checkpoints.read_json(tmp_path / "served" / "config.json")["rotary_emb_base"] == 20_000
    run("to_torch", tmp_path / "native", tmp_path / "same", "--layout", "original", "--rope-theta", 10_000)
    assert checkpoints.read_json(tmp_path / "same" / "config.json")["rotary_emb_base"] == 10_000


def test_dtype_is_the_files_unless_told(tmp_path):
    checkpoints.write_original(tmp_path / "original", dtype=torch.bfloat16)
    encoder = read_torch_checkpoint(tmp_path / "original")
    assert encoder.dtype == "bfloat16"
    run("from_torch", tmp_path / "original", tmp_path / "native", "--dtype", "float32")
    assert load_checkpoint(tmp_path / "native").dtype == "float32"


def test_the_table_has_the_published_tensors_and_parameters():
    config = ModelConfig(pooler=True, tasks=("a", "b", "c", "d", "e"))
    arrays = {path: variable.shape for path, variable in abstract_variables(config).items()}
    base = torch_names.base_mappings(config, "fused", parametrized=True)
    adapters = torch_names.stacked_adapter_mappings(config)
    shapes = {name: entry.tensor_shape(arrays[entry.path]) for name, entry in (base | adapters).items()}
    assert (len(base), len(adapters)) == (294, 198)
    assert sum(map(math.prod, shapes.values())) == 572_310_396
    assert shapes["embeddings.word_embeddings.parametrizations.weight.0.lora_A"] == (5, 250_002, 4)
    assert shapes["embeddings.word_embeddings.parametrizations.weight.0.lora_B"] == (5, 4, 1024)
    assert shapes["encoder.layers.23.mixer.Wqkv.parametrizations.weight.0.lora_A"] == (5, 4, 1024)
    assert shapes["encoder.layers.23.mixer.Wqkv.parametrizations.weight.0.lora_B"] == (5, 3072, 4)
    assert shapes["encoder.layers.0.mlp.fc2.parametrizations.weight.original"] == (1024, 4096)


@pytest.mark.parametrize("scheme", ["fused", "split", "bert"])
def test_every_line_of_the_table_is_invertible(scheme):
    config = ModelConfig(
        vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, mlp_size=12, max_position_embeddings=9, tasks=("a", "b"),
        lora_rank=3, pooler=True, mlm_head=True, position_type="absolute" if scheme == "bert" else "rope",
        separate_qkv_adapters=scheme != "fused",
    )  # fmt: skip
    table = torch_names.base_mappings(config, scheme)
    if scheme == "fused":
        table |= torch_names.stacked_adapter_mappings(config)
    else:
        table |= {
            f"{task}.{n}": e for task in (0, 1) for n, e in torch_names.peft_adapter_mappings(config, task, scheme).items()
        }
    arrays = {path: v.shape for path, v in abstract_variables(config).items() if not path.endswith("scale") or "norm" in path}
    rng = np.random.default_rng(0)
    full = {path: rng.standard_normal(shape) for path, shape in arrays.items()}
    again = {path: np.full(shape, np.nan) for path, shape in arrays.items()}
    for entry in table.values():
        entry.fill(again[entry.path], entry.extract(full[entry.path]))
    for path, array in full.items():
        np.testing.assert_array_equal(again[path], array)


def test_conversion_needs_a_free_target_and_a_torch_source(tmp_path):
    checkpoints.write_original(tmp_path / "original")
    run("from_torch", tmp_path / "original", tmp_path / "native")
    for source, target, message in (
        ("original", "native", "exists and is not empty"),
        ("native", "other", "native checkpoint already"),
        ("nowhere", "other", "nowhere"),
    ):
        result = CliRunner().invoke(convert, ["from_torch", str(tmp_path / source), str(tmp_path / target)])
        assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("write", [write_original, write_transformers])
def test_all_prompts_come_along(embedder, tmp_path, write):
    assert "note" in dict(embedder.config.prompts) and "note" not in embedder.config.tasks
    write(tmp_path / "out", embedder.encoder, embedder.tokenizer)
    again = Embedder.load(tmp_path / "out")
    assert dict(again.config.prompts) == dict(embedder.config.prompts)


def test_the_tokenizer_comes_along(tmp_path):
    checkpoints.write_original(tmp_path / "original")
    run("from_torch", tmp_path / "original", tmp_path / "native")
    config = ModelConfig(vocab_size=16_000)
    before, after = (load_tokenizer(tmp_path / name, config) for name in ("original", "native"))
    text = "Bildbearbeitung 画像 🎨"
    assert before(text)["input_ids"] == after(text)["input_ids"] and before.model_max_length == after.model_max_length


def test_adapters_of_bfloat16_beside_float16_are_read_exactly(tmp_path):
    """Their common dtype is float32, which numpy does not know of."""
    checkpoints.write_transformers(tmp_path / "model")
    folders = sorted(path.parent for path in (tmp_path / "model").glob("*/adapter_config.json"))
    given = {}
    for folder, dtype in zip(folders[:2], (torch.bfloat16, torch.float16), strict=True):
        tensors = load_file(folder / "adapter_model.safetensors")
        given[folder.name] = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_file(given[folder.name], folder / "adapter_model.safetensors", metadata={"format": "pt"})
    for folder in folders[2:]:
        shutil.rmtree(folder)
    encoder = read_torch_checkpoint(tmp_path / "model")
    table = encoder.tokens.a[...]
    assert table.dtype == np.float32 and len(encoder.config.tasks) == 2
    for task, name in enumerate(encoder.config.tasks):
        (a,) = [tensor for key, tensor in given[adapter_folder(name)].items() if "word_embeddings" in key and "_A" in key]
        np.testing.assert_array_equal(np.asarray(table[:, task]), a.float().numpy().T)
    half = read_torch_checkpoint(tmp_path / "model", param_dtype="bfloat16")
    assert half.tokens.a[...].dtype == "bfloat16"

"""Adapters that PEFT writes, above modules of any spelling, change the weights as in PEFT."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerFast, XLMRobertaModel

from convert.torch_reference import TorchReference
from jina_jax import Embedder, Encoder
from jina_jax.checkpoints.torch_reader import read_torch_checkpoint
from jina_jax.errors import CheckpointError
from jina_jax.model.adapters import merge_adapter
from jina_jax.model.parameters import variables
from oracles import checkpoints, original

State = dict[str, torch.Tensor]
Spelling = Callable[[State, dict], State]
"""The state of a base under the names that it has where it is trained."""

TEXTS = ("", "An editor for photographs.", "Ein Betrachter für Ölgemälde.", "a word " * 20)

PLAIN: dict[str, Any] = dict(tasks=(), model_type="xlm-roberta")
SMALL: dict[str, Any] = dict(tokenizer=None, vocab_size=300, num_hidden_layers=2)
FUSED = dict(r=5, lora_alpha=3, target_modules=["Wqkv"])
ALL_FUSED = dict(r=5, lora_alpha=2, target_modules=["word_embeddings", "Wqkv", "out_proj", "fc1", "fc2", "dense"])
PATTERNS = ALL_FUSED | dict(
    rank_pattern={"mixer.Wqkv": 2, r"roberta\.encoder\.layers\.1\.mlp\.fc1": 3},
    alpha_pattern={r"encoder\.layers\.1\.mixer\.Wqkv": 7, "out_proj": 5, "^roberta.encoder.layers.1.mlp.fc2": -3},
    use_rslora=True,
)
SPLIT = dict(r=5, lora_alpha=2, target_modules=["q_proj", "v_proj", "o_proj"], alpha_pattern={"v_proj": 9})


def module_tree(state: State) -> nn.Module:
    """Modules with the names of a state, for PEFT to find and wrap."""
    root = nn.Module()
    for name, tensor in sorted(state.items(), key=lambda item: -item[1].ndim):  # a bias knows no input size
        *path, module, _ = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if not hasattr(parent, module):
            made = nn.Embedding if "embeddings" in name else lambda rows, columns: nn.Linear(columns, rows)
            parent.add_module(module, nn.LayerNorm(len(tensor)) if tensor.ndim == 1 else made(*tensor.shape))
    root.load_state_dict(state)
    return root


def write_adapter(folder: Path, state: State, seed: int = 0, **lora: Any) -> State:
    """Writes a random adapter by PEFT, and returns the weights that PEFT merges it into."""
    model: Any = get_peft_model(module_tree(state), LoraConfig(**lora))
    checkpoints.randomise_adapter(model, "default", checkpoints.generator(seed), shared=False)
    model.save_pretrained(folder, save_embedding_layers=False)
    return {name: tensor.detach().contiguous() for name, tensor in model.merge_and_unload().state_dict().items()}


def write_merged(directory: Path, base: Path, merged: State) -> None:
    directory.mkdir()
    save_file(merged, directory / "model.safetensors")
    shutil.copy(base / "config.json", directory)


def native(state: State, config: dict) -> State:
    """The names in transformers' class: q, k and v are three modules."""
    return checkpoints.peft_from_original(state, config)[0]


def wrapped(prefix: str, spelling: Spelling = lambda state, config: state) -> Spelling:
    return lambda state, config: {prefix + name: tensor for name, tensor in spelling(state, config).items()}


def fused(state: State, name: str) -> torch.Tensor:
    """The tensor of an original name, from a state under the names in transformers' class."""
    name = checkpoints.native_name(name.removeprefix("roberta."))
    parts = [name.replace("mixer.Wqkv", f"self_attn.{part}_proj") for part in "qkv"] if "Wqkv" in name else [name]
    return torch.cat([state[part] for part in parts])


@pytest.fixture
def base(tmp_path) -> tuple[Path, State, dict]:
    state, config = checkpoints.write_original(tmp_path / "base", **PLAIN, **SMALL)
    return tmp_path / "base", state, config


def assert_equal_weights(got: Encoder, want: Encoder) -> None:
    got_arrays, want_arrays = variables(got), variables(want)
    assert got_arrays.keys() == want_arrays.keys()
    for path, array in want_arrays.items():
        np.testing.assert_allclose(got_arrays[path].get_value(), array.get_value(), rtol=0, atol=2e-6, err_msg=path)


@pytest.mark.parametrize(
    ("lora", "spelling", "separate"),
    [
        (FUSED, wrapped(""), False),
        (PATTERNS, wrapped(""), False),
        (ALL_FUSED, wrapped("0.auto_model."), False),
        (SPLIT, wrapped("_orig_mod.", native), True),
    ],
    ids=["fused", "patterns", "sentence-transformers", "split, compiled"],
)
def test_an_adapter_changes_the_weights_as_in_peft(base, tmp_path, lora, spelling, separate):
    directory, state, config = base
    merged = write_adapter(directory / "mine", spelling(state, config), **lora)
    encoder = read_torch_checkpoint(directory)
    assert encoder.config.tasks == ("mine",) and encoder.config.separate_qkv_adapters == separate
    write_merged(tmp_path / "merged", directory, merged)
    assert_equal_weights(merge_adapter(encoder, "mine"), read_torch_checkpoint(tmp_path / "merged"))


def test_adapters_of_the_fused_and_of_split_projections_stand_side_by_side(tmp_path):
    directory = tmp_path / "base"
    state, config = checkpoints.write_original(directory, **PLAIN)
    merged = write_adapter(directory / "fused", state, **ALL_FUSED)
    merged_split = write_adapter(directory / "split", native(state, config), seed=1, **SPLIT)
    split = state | {name: fused(merged_split, name) for name in state if "Wqkv.weight" in name or "out_proj.weight" in name}
    model = Embedder.load(directory)
    assert model.config.tasks == ("fused", "split") and model.config.separate_qkv_adapters

    batch = PreTrainedTokenizerFast.from_pretrained(directory)(list(TEXTS), padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    want = [original.pool(original.encode(original.strip(w), config, ids, mask)[-1], mask) for w in (merged, split)]
    got = model.encode(TEXTS * 2, task=["fused"] * len(TEXTS) + ["split"] * len(TEXTS))
    np.testing.assert_allclose(got, torch.cat(want).numpy(), rtol=0, atol=1e-5)


def test_patterns_that_match_nothing_are_named_and_change_nothing_as_in_peft(base, tmp_path):
    directory, state, _ = base
    lora = ALL_FUSED | dict(alpha_pattern={"q_proj": 5, "fc1": 4}, rank_pattern={"Wkqv": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # newer PEFT says it, too
        merged = write_adapter(directory / "mine", state, **lora)
    with pytest.warns(UserWarning, match="match no module") as caught:
        encoder = read_torch_checkpoint(directory)
    said = sorted(str(warning.message) for warning in caught)
    assert len(said) == 2 and "alpha_pattern has ['q_proj']" in said[0] and "rank_pattern has ['Wkqv']" in said[1]
    write_merged(tmp_path / "merged", directory, merged)
    assert_equal_weights(merge_adapter(encoder, "mine"), read_torch_checkpoint(tmp_path / "merged"))


def test_a_projection_that_is_fused_and_split_in_one_adapter_is_ambiguous(base):
    directory, state, _ = base
    write_adapter(directory / "mine", state, **FUSED)
    file, name = directory / "mine" / "adapter_model.safetensors", "layers.1.self_attn.k_proj.lora_A.weight"
    tensors = load_file(file)
    checkpoints.replace(file, tensors | {f"base_model.model.{name}": torch.zeros(5, 64)})
    with pytest.raises(CheckpointError, match=f"ambiguous: it holds {name} under two names"):
        read_torch_checkpoint(directory)
    checkpoints.replace(file, {name: tensor[:-1] if "lora_B" in name else tensor for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match=r"wrong shape: .*lora_B.weight is \(191, 5\)"):
        read_torch_checkpoint(directory)


@pytest.mark.parametrize("lora", [FUSED, ALL_FUSED], ids=["no module", "some modules"])
def test_what_transformers_leaves_out_cannot_be_verified(base, lora):
    directory, state, _ = base
    write_adapter(directory / "mine", state, **lora)
    reference = TorchReference(directory, read_torch_checkpoint(directory).config)
    with pytest.raises(ValueError, match="mine cannot be compared: "):
        reference.hidden_states(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), "mine")


# ---- folders ----


def test_an_adapter_alone_says_how_to_join_it_to_its_base(tmp_path):
    base, alone = tmp_path / "e5", tmp_path / "run"
    checkpoints.write_e5(base, **SMALL)
    model = XLMRobertaModel.from_pretrained(base)
    model.add_adapter(LoraConfig(r=2, target_modules=["query", "value"]))
    model.save_pretrained(alone)
    with pytest.raises(CheckpointError, match=f"run holds an adapter without its base model, which is {base} .*cp -r .*TASK"):
        Embedder.load(alone)
    shutil.copytree(alone, base / "mine")  # as the message says
    assert read_torch_checkpoint(base).config.tasks == ("mine",)


def test_checkpoints_of_a_trainer_are_no_tasks(base):
    directory, state, _ = base
    for step in (9, 500):
        write_adapter(directory / f"checkpoint-{step}", state, **FUSED)
        for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "trainer_state.json"):
            (directory / f"checkpoint-{step}" / name).write_bytes(b"not read")
    with pytest.raises(
        CheckpointError, match=r"checkpoints \['checkpoint-500', 'checkpoint-9'\] of a trainer.*mv .*500 .*TASK"
    ):
        read_torch_checkpoint(directory)
    (directory / "checkpoint-500").rename(directory / "text_matching")  # as the message says
    (directory / "checkpoint-9").rename(directory.parent / "checkpoint-9")
    assert read_torch_checkpoint(directory).config.tasks == ("text-matching",)
    with pytest.raises(CheckpointError, match="holds no weights, its folders \\['base', 'checkpoint-9'\\] do"):
        Embedder.load(directory.parent)


def test_adapters_that_lie_too_deep_are_named(base):
    directory, state, _ = base
    write_adapter(directory / "adapters" / "mine", state, **FUSED)
    write_adapter(directory / ".ipynb_checkpoints", state, **FUSED)
    with pytest.warns(UserWarning, match=r"the adapters \['adapters/mine'\] are not read"):
        assert read_torch_checkpoint(directory).config.tasks == ()

"""Tensor names that a program has wrapped are read as without it, or refused if only some are."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import XLMRobertaForMaskedLM, XLMRobertaModel

from jina_jax.checkpoints.torch_reader import read_torch_checkpoint
from jina_jax.errors import CheckpointError
from jina_jax.model.parameters import variables
from oracles import checkpoints

State = dict[str, torch.Tensor]

Written = tuple[Path, dict[str, np.ndarray]]

SMALL: dict = dict(tokenizer=None, vocab_size=300, num_hidden_layers=2)
WRITERS: dict[str, Callable[[Path], object]] = {
    "e5": lambda directory: checkpoints.write_e5(directory, **SMALL),
    "mlm": lambda directory: checkpoints.write_xlmr(directory, mlm_head=True, **SMALL),
    "original": lambda directory: checkpoints.write_original(directory, **SMALL),
    "plain": lambda directory: checkpoints.write_original(directory, tasks=(), model_type="xlm-roberta", **SMALL),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Written]:
    """Checkpoint of each layout, and the arrays that are read from it."""
    root = tmp_path_factory.mktemp("written")
    for layout, write in WRITERS.items():
        write(root / layout)
    return {layout: (root / layout, arrays(root / layout)) for layout in WRITERS}


def arrays(directory: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(variable.get_value()) for path, variable in variables(read_torch_checkpoint(directory)).items()}


class TwoTowers(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.query, self.passage = model, model


class Field(nn.Module):
    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        self.add_module(name, model)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def pipeline(model: nn.Module, *others: nn.Module) -> nn.Module:
    """The modules of sentence-transformers: its first holds the model."""
    return nn.Sequential(Field(model, "auto_model"), nn.Module(), *others)


WRAPPED: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "DistributedDataParallel": ("e5", nn.DataParallel),
    "torch.compile": ("e5", compiled),
    "both": ("mlm", lambda model: nn.DataParallel(compiled(model))),
    "the other way round": ("mlm", lambda model: compiled(nn.DataParallel(model))),
    "sentence-transformers": ("e5", pipeline),
    "compiled in sentence-transformers": ("mlm", lambda model: compiled(pipeline(compiled(model)))),
    "a field": ("mlm", lambda model: Field(model, "model")),
    "a field named as the modules are": ("e5", lambda model: Field(Field(model, "encoder"), "encoder")),
}


def model_of(directory: Path, layout: str) -> nn.Module:
    return (XLMRobertaForMaskedLM if layout == "mlm" else XLMRobertaModel).from_pretrained(directory)


def rewrite(source: Path, target: Path, state: State) -> None:
    """Writes a checkpoint with other tensors, tied ones once."""
    shutil.copy(source / "config.json", target)
    save_file({name: tensor.clone() for name, tensor in state.items() if "decoder" not in name}, target / "model.safetensors")


def assert_arrays(directory: Path, want: dict[str, np.ndarray]) -> None:
    got = arrays(directory)
    assert got.keys() == want.keys()
    for path, array in want.items():
        np.testing.assert_array_equal(got[path], array, err_msg=path)


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_what_a_program_wrapped_is_read_as_the_model(written, tmp_path, wrapping):
    layout, wrap = WRAPPED[wrapping]
    source, want = written[layout]
    rewrite(source, tmp_path, wrap(model_of(source, layout)).state_dict())
    assert_arrays(tmp_path, want)


@pytest.mark.parametrize(
    ("layout", "pattern", "replacement"),
    [
        ("original", r"^", "text_model.transformer."),
        ("original", r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module."),
        ("in memory", r"^", "model."),
        ("in memory", r"(layers\.\d+)\.", r"\1._orig_mod."),
    ],
    ids=["another model's field", "FSDP and remat", "Lightning", "compiled layers"],
)
def test_names_of_jina_embeddings_v3_are_unwrapped(written, tmp_path, layout, pattern, replacement):
    source, want = written["original" if layout == "original" else "plain"]
    state = load_file(source / "model.safetensors")
    if layout == "in memory":
        state = checkpoints.peft_from_original(state, {})[0]
    rewrite(source, tmp_path, {re.sub(pattern, replacement, name, count=1): tensor for name, tensor in state.items()})
    assert_arrays(tmp_path, want)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model: pipeline(model, Field(nn.Linear(64, 8), "linear")).state_dict(), ["'0.auto_model.' (39)", "'2.' (2)"]),
        (lambda model: TwoTowers(model).state_dict(), ["'query.' (39)", "'passage.' (39)"]),
        (lambda model: AveragedModel(model).state_dict(), ["'module.' (39)", "'n_averaged' (1)"]),
    ],
    ids=["a dense module", "two towers", "an average"],
)
def test_more_than_one_encoder_is_refused_by_its_names(written, tmp_path, change, named):
    source, _ = written["e5"]
    rewrite(source, tmp_path, change(model_of(source, "e5")))
    with pytest.raises(CheckpointError) as error:
        read_torch_checkpoint(tmp_path)
    assert all(name in str(error.value) for name in named), error.value


def test_a_tensor_with_and_without_a_wrapper_is_ambiguous(written, tmp_path):
    source, _ = written["e5"]
    state = load_file(source / "model.safetensors")
    rewrite(source, tmp_path, state | {"encoder.layer.0._orig_mod.output.dense.bias": torch.zeros(64)})
    with pytest.raises(CheckpointError, match="is ambiguous.*encoder.layer.0.output.dense.bias twice"):
        read_torch_checkpoint(tmp_path)

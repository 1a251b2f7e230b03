"""PEFT adapter folders: one LoRA adapter each, in a sub-folder of the base model's directory."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import PUBLISHED_INSTRUCTIONS, ModelConfig
from ..errors import CheckpointError
from ..files import read_json
from . import torch_names
from .tensor_files import FLOATS, LazyTensor, open_tensors
from .torch_names import NameScheme, TensorMapping

PREFIX = "base_model.model."


def adapter_folder(task: str) -> str:
    """Folder of a task's adapter, also its name in PyTorch: letters, digits and underscores."""
    return re.sub(r"\W", "_", task)


_PUBLISHED_FOLDERS = {adapter_folder(task): task for task in PUBLISHED_INSTRUCTIONS}

_INERT = {
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "modules_to_save": (None, []),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # The others (pissa, olora, corda, loftq, lora_ga) change the base weights too.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica"),
}
"""Settings of adapter_config.json that this library does not support.

Each maps to the values with which it has no effect.
"""


class PeftAdapter(NamedTuple):
    """One adapter: its task, its folder, its settings and its tensors.

    The tensors are keyed by standard names (`torch_names.standard_module_name`).
    """

    task: str
    folder: Path
    settings: dict[str, Any]
    tensors: dict[str, LazyTensor]

    @property
    def rank(self) -> int:
        """Largest rank of its modules."""
        return max(tensor.shape[_rank_axis(name)] for name, tensor in self.tensors.items())

    def scale(self, module: str) -> float:
        """Scale of a module: alpha / rank, alpha / sqrt(rank) with rsLoRA, 0 without an adapter."""
        names = [name for name in self.tensors if name.startswith(f"{module}.lora_")]
        if not names:
            return 0.0
        rank = self.tensors[names[0]].shape[_rank_axis(names[0])]
        alpha = _pattern_value(self.settings.get("alpha_pattern"), module, self.settings.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


def find_peft_adapters(directory: Path, published_order: tuple[str, ...], *, allow_pickle: bool = False) -> list[PeftAdapter]:
    """Adapters in the sub-folders of `directory`.

    A folder named like a published task with underscores is that task's; the name of any other
    folder is its task.

    Args:
        directory: of the base model.
        published_order: tasks in the order of their adapters, empty = the order of
            PUBLISHED_INSTRUCTIONS; other adapters follow by name.
        allow_pickle: read `adapter_model.bin` where there is no safetensors file.

    Raises:
        CheckpointError: an adapter lies beside the base weights, is damaged or is not supported.
    """
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(f"{directory} holds an adapter beside its weights; put each adapter in a folder of its own")
    adapters = [_open(path.parent, allow_pickle) for path in sorted(directory.glob("*/adapter_config.json"))]
    order = {task: place for place, task in enumerate(published_order or PUBLISHED_INSTRUCTIONS)}
    return sorted(adapters, key=lambda adapter: (order.get(adapter.task, len(order)), adapter.task))


def matched_tensors(
    adapter: PeftAdapter, config: ModelConfig, task: int, array_shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[LazyTensor, TensorMapping]]:
    """Pairs every tensor of an adapter with its line of the table.

    A module without an adapter is allowed, one of `lora_A` and `lora_B` without the other is not.
    Ranks may be smaller than the model's.

    Args:
        adapter: the adapter.
        config: of the model.
        task: index of the adapter in the model.
        array_shapes: shape of each Flax array, by path.

    Raises:
        CheckpointError: lists every tensor that does not fit.
    """
    table = torch_names.peft_adapter_mappings(config, task, _name_scheme(config))
    problems = [f"unexpected: {name}" for name in adapter.tensors if name not in table]
    for name, tensor in adapter.tensors.items():
        if _partner(name) not in adapter.tensors:
            problems.append(f"missing: {_partner(name)}")
        if name not in table:
            continue
        expected = list(table[name].tensor_shape(array_shapes[table[name].path]))
        expected[_rank_axis(name)] = tensor.shape[_rank_axis(name)]
        rank = tensor.shape[_rank_axis(name)]
        said = _pattern_value(adapter.settings.get("rank_pattern"), name.rpartition(".lora_")[0], adapter.settings.get("r", 8))
        if rank != said:
            problems.append(f"wrong rank: {name} has {rank}, adapter_config.json says {said}")
        if list(tensor.shape) != expected:
            problems.append(f"wrong shape: {name} is {tensor.shape}, should be {tuple(expected)}")
        if tensor.dtype not in FLOATS:
            problems.append(f"wrong dtype: {name} is {tensor.dtype}, should be one of {[str(d) for d in FLOATS]}")
    if problems:
        raise CheckpointError(f"the adapter {adapter.folder} does not fit its base model:\n  " + "\n  ".join(problems))
    return {name: (tensor, table[name]) for name, tensor in adapter.tensors.items()}


def module_scales(adapter: PeftAdapter, config: ModelConfig) -> dict[str, np.ndarray]:
    """Scales of an adapter for every adapted module of the encoder, by path.

    Their shapes are [l, c] for q, k, v, [l] for the other modules of a layer, and [] elsewhere.
    """
    layers, down_projections = config.num_layers, 3 if config.separate_qkv_adapters else 1
    scales: dict[str, np.ndarray] = {}
    for name, entry in torch_names.peft_adapter_mappings(config, 0, _name_scheme(config)).items():
        if not entry.path.endswith(".a"):
            continue
        path = entry.path.removesuffix(".a")
        shape = () if not path.startswith("layers.") else (layers, down_projections) if path == "layers.qkv" else (layers,)
        array = scales.setdefault(path, np.zeros(shape, np.float32))
        layer, qkv_index = entry.place[:1], entry.place[2:3]  # qkv: (layer, EVERY, c, task)
        place = () if not shape else layer + qkv_index if path == "layers.qkv" else layer
        array[place] = adapter.scale(name.rpartition(".lora_")[0])
    return scales


def all_share_down_projections(adapters: list[PeftAdapter], config: ModelConfig) -> bool:
    """True if q, k and v share a down-projection and scale, as in the original.

    This must hold in every layer of every adapter.
    """
    pattern = torch_names.LAYER_PREFIXES[_name_scheme(config)]
    down_projections = [getattr(module, _name_scheme(config)) for module in torch_names.LAYER_MODULES if module.kind == "qkv"]
    for adapter in adapters:
        for layer in range(config.num_layers):
            modules = [pattern.format(l=layer) + qkv_index for qkv_index in down_projections]
            downs = [adapter.tensors.get(f"{module}.lora_A.weight") for module in modules]
            if not any(downs):
                continue
            if not all(downs) or len({adapter.scale(module) for module in modules}) > 1:
                return False
            first, *others = (down.read() for down in downs if down)
            if not all(np.array_equal(first, other) for other in others):
                return False
    return True


def _open(folder: Path, allow_pickle: bool) -> PeftAdapter:
    settings = read_json(folder / "adapter_config.json")
    if settings.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{folder}: peft_type {settings['peft_type']!r} is not supported; supported is 'LORA'")
    if refused := [key for key, inert in _INERT.items() if settings.get(key) not in inert]:
        raise CheckpointError(f"{folder}: adapter_config.json sets {refused}, which this library does not build")
    _check_numbers(folder, settings)
    tensors = {}
    for name, tensor in open_tensors(folder, "adapter_model", allow_pickle=allow_pickle).items():
        plain = name.removeprefix(PREFIX).removeprefix("roberta.")
        if not re.search(r"\.lora_([AB]\.weight|embedding_[AB])$", plain) or len(tensor.shape) != 2:
            raise CheckpointError(f"{folder}: {name} {tensor.shape} is not part of a plain LoRA adapter")
        standard = torch_names.standard_module_name(plain)
        if standard in tensors:
            raise CheckpointError(f"{folder} is ambiguous: it holds {standard} under two names")
        tensors[standard] = tensor
    if not tensors:
        raise CheckpointError(f"{folder} holds an adapter without tensors")
    return PeftAdapter(_PUBLISHED_FOLDERS.get(folder.name, folder.name), folder, settings, tensors)


def _check_numbers(folder: Path, settings: Mapping[str, Any]) -> None:
    numbers = {"r": settings.get("r", 8), "lora_alpha": settings.get("lora_alpha", 8)}
    try:
        for pattern in ("rank_pattern", "alpha_pattern"):
            numbers |= settings.get(pattern) or {}
        for pattern, value in numbers.items():
            re.compile(pattern)
            float(value)
    except (TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{folder}: adapter_config.json has ranks or alphas that are no numbers: {error}") from error


def _pattern_value(patterns: Mapping[str, float | int] | None, module: str, default: float | int) -> float | int:
    """Value for a module by PEFT's rule: the first pattern that matches the end of its name."""
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (module, f"roberta.{module}")):
            return value
    return default


def _name_scheme(config: ModelConfig) -> NameScheme:
    return "bert" if config.position_type == "absolute" else "split"


def _rank_axis(name: str) -> int:
    return 0 if re.search(r"_A(\.weight)?$", name) else 1


def _partner(name: str) -> str:
    """Name of the lora_B that belongs to a lora_A, and the reverse."""
    return re.sub(r"_([AB])(?=(\.weight)?$)", lambda match: "_" + {"A": "B", "B": "A"}[match[1]], name)

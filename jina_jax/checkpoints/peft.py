"""PEFT adapter folders: one LoRA adapter each, in a sub-folder of the base model's directory."""

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import PUBLISHED_INSTRUCTIONS, ModelConfig
from ..errors import CheckpointError
from ..files import read_json
from . import torch_names
from .settings import refuse_adapter_settings
from .tensor_files import FLOATS, LazyTensor, open_tensors
from .torch_names import NameScheme, TensorMapping
from .wrappers import PEFT_PREFIX, unwrapped_names

_TRAINERS_CHECKPOINT = re.compile(r"checkpoint([-_].*)?")
"""Name of a folder that a trainer writes every few hundred steps, and nobody has named."""


def adapter_folder(task: str) -> str:
    """Folder of a task's adapter, also its name in PyTorch: letters, digits and underscores."""
    return re.sub(r"\W", "_", task)


_PUBLISHED_FOLDERS = {adapter_folder(task): task for task in PUBLISHED_INSTRUCTIONS}


class PeftAdapter(NamedTuple):
    """One adapter: its task, its folder, its settings and its tensors."""

    task: str
    folder: Path
    settings: dict[str, Any]
    tensors: dict[str, LazyTensor]
    """By standard names (`torch_names.standard_module_name`)."""
    spelled: dict[str, tuple[str, ...]]
    """Names that PEFT may have seen the module of a tensor under, by the tensor's standard name.

    Those in the file and transformers' own. A file with the fused projection has the names of the
    original only.
    """

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
        alpha = self.setting("alpha_pattern", names[0], self.settings.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def setting(self, patterns: str, tensor: str, default: float | int) -> float | int:
        """Value for the module of a tensor, of the first pattern that matches it, as in PEFT."""
        for pattern, value in (self.settings.get(patterns) or {}).items():
            if self.matches(pattern, tensor):
                return value
        return default

    def matches(self, pattern: str, tensor: str) -> bool:
        """Whether a pattern matches the end of a name of a tensor's module."""
        return any(re.match(rf"(.*\.)?({pattern})$", name) for name in self.spelled[tensor])


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
        CheckpointError: an adapter lies beside the base weights, is damaged or is not supported, or
            a folder is named as a trainer names its checkpoints.
    """
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(f"{directory} holds an adapter beside its weights; put each adapter in a folder of its own")
    adapters = [_open(folder, allow_pickle) for folder in _adapter_folders(directory)]
    _warn_of_unread_adapters(directory)
    _warn_of_idle_patterns(adapters)
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
        said = adapter.setting("rank_pattern", name, adapter.settings.get("r", 8))
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
        array[place] = adapter.scale(_module(name))
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
    refuse_adapter_settings(folder, settings)
    _check_numbers(folder, settings)
    stored = open_tensors(folder, "adapter_model", allow_pickle=allow_pickle)
    tensors: dict[str, LazyTensor] = {}
    in_file: dict[str, str] = {}
    for name, plain in unwrapped_names(stored, folder).items():
        if not re.search(r"\.lora_([AB]\.weight|embedding_[AB])$", plain) or len(stored[name].shape) != 2:
            raise CheckpointError(f"{folder}: {name} {stored[name].shape} is not part of a plain LoRA adapter")
        standard = torch_names.standard_module_name(re.sub(r"^(roberta|bert)\.", "", plain))
        for part, tensor in _parts(standard, stored[name]).items():
            if part in tensors:
                raise CheckpointError(f"{folder} is ambiguous: it holds {part} under two names")
            tensors[part] = tensor
            in_file[part] = _module(name.rpartition(PEFT_PREFIX)[2])
    if not tensors:
        raise CheckpointError(f"{folder} holds an adapter without tensors")
    fused = len(in_file) > len(stored)
    spelled = {part: (name,) if fused else (name, _module(part), f"roberta.{_module(part)}") for part, name in in_file.items()}
    return PeftAdapter(_PUBLISHED_FOLDERS.get(folder.name, folder.name), folder, settings, tensors, spelled)


def _parts(name: str, tensor: LazyTensor) -> dict[str, LazyTensor]:
    """Tensors of q, k and v, which share A, of one of the fused projection; else the tensor."""
    names = torch_names.qkv_names(name)
    if len(names) == 1 or _rank_axis(name) == 0 or tensor.shape[0] % len(names):
        return dict.fromkeys(names, tensor)
    rows = tensor.shape[0] // len(names)
    return {
        part: LazyTensor((rows, tensor.shape[1]), tensor.dtype, lambda i=i: tensor.read()[i * rows : (i + 1) * rows])
        for i, part in enumerate(names)
    }


def _adapter_folders(directory: Path) -> list[Path]:
    # Hidden folders are copies of editors and notebooks.
    folders = [path.parent for path in sorted(directory.glob("*/adapter_config.json")) if not path.parent.name.startswith(".")]
    unnamed = [folder.name for folder in folders if _TRAINERS_CHECKPOINT.fullmatch(folder.name)]
    if unnamed:
        raise CheckpointError(
            f"{directory} holds the checkpoints {unnamed} of a trainer, whose names are no tasks: rename the one that is meant "
            f"to its task (mv {directory / unnamed[0]} {directory / 'TASK'}), and move the others out of the directory"
        )
    return folders


def _warn_of_unread_adapters(directory: Path) -> None:
    if deeper := sorted(path.parent.relative_to(directory).as_posix() for path in directory.glob("*/*/adapter_config.json")):
        warnings.warn(
            f"{directory}: the adapters {deeper} are not read; those in folders of the base model's directory are", stacklevel=7
        )


def _warn_of_idle_patterns(adapters: list[PeftAdapter]) -> None:
    """Warns, as PEFT does, of patterns that change nothing: another module was meant."""
    for adapter in adapters:
        for field in ("rank_pattern", "alpha_pattern"):
            patterns = adapter.settings.get(field) or {}
            idle = [pattern for pattern in patterns if not any(adapter.matches(pattern, name) for name in adapter.tensors)]
            if idle:
                message = f"{adapter.folder}: {field} has {idle}, which match no module of the adapter and change nothing"
                warnings.warn(message, stacklevel=7)  # the caller of Embedder.load


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


def _name_scheme(config: ModelConfig) -> NameScheme:
    return "bert" if config.position_type == "absolute" else "split"


def _module(tensor: str) -> str:
    """Name of the module that a tensor of an adapter belongs to."""
    return tensor.rpartition(".lora_")[0]


def _rank_axis(name: str) -> int:
    return 0 if re.search(r"_A(\.weight)?$", name) else 1


def _partner(name: str) -> str:
    """Name of the lora_B that belongs to a lora_A, and the reverse."""
    return re.sub(r"_([AB])(?=(\.weight)?$)", lambda match: "_" + {"A": "B", "B": "A"}[match[1]], name)

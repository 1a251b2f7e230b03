"""Reads a PyTorch checkpoint directory, in any published layout, into an Encoder.

The layout is recognised by its tensor names; `config.json` must agree with the tensors. Conversion
is total: a tensor that is missing, unexpected or of the wrong shape or dtype is an error, and one
error lists them all. Tensors are read one at a time, and one Flax array is completed before the
next is begun.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError
from ..files import read_json
from ..model.encoder import Encoder
from ..model.lora import AdapterParam, AdapterScale
from ..model.parameters import abstract_variables, from_arrays
from . import torch_names
from .foreign import refuse_foreign_tensors
from .hf_config import from_hf
from .library_settings import with_library_settings
from .peft import PeftAdapter, all_share_down_projections, find_peft_adapters, matched_tensors, module_scales
from .pipeline import transformer_folder
from .tensor_files import FLOATS, LazyTensor, open_tensors
from .torch_names import NameScheme, TensorMapping
from .wrappers import unwrapped_names

logger = logging.getLogger(__name__)

_STACKED = ".parametrizations.weight.0.lora_A"


class _Source(NamedTuple):
    """A tensor of the checkpoint, its name and its line of the table."""

    name: str
    tensor: LazyTensor
    entry: TensorMapping


class OpenCheckpoint(NamedTuple):
    """A checkpoint whose tensors are those of its configuration, and not read yet."""

    config: ModelConfig
    sources: list[_Source]
    adapters: list[PeftAdapter]


def read_torch_checkpoint(
    directory: Path,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    allow_pickle: bool = False,
) -> Encoder:
    """Reads the encoder of a checkpoint; its configuration is `encoder.config`.

    Args:
        directory: holds `config.json`, the weights, and PEFT adapters in sub-folders if it has any;
            or a `modules.json` that names the folder which does.
        dtype: compute dtype; None = that of the parameters.
        param_dtype: dtype of the parameters; None = as stored, bit for bit.
        allow_pickle: read `pytorch_model.bin` where there is no safetensors file.

    Raises:
        CheckpointError, ConfigError, FileNotFoundError: as `open_torch_checkpoint` does, or a
            tensor is not finite, or the tensors of one array have several dtypes.
    """
    opened = open_torch_checkpoint(directory, allow_pickle=allow_pickle)
    return _fill(*opened, dtype, param_dtype)


def open_torch_checkpoint(directory: Path, *, allow_pickle: bool = False) -> OpenCheckpoint:
    """Opens a checkpoint, and compares its tensors with its configuration.

    Args:
        directory, allow_pickle: as `read_torch_checkpoint` takes them.

    Raises:
        CheckpointError: the files are damaged, or the tensors are not those of a model that this
            library knows.
        ConfigError: `config.json` asks for something unsupported, or contradicts the tensors.
        FileNotFoundError: a file is missing.
    """
    root, directory = directory, transformer_folder(directory)
    hf = read_json(directory / "config.json")
    opened = _unwrapped(open_tensors(directory, allow_pickle=allow_pickle), directory)
    tensors = _by_standard_name(opened, directory)
    scheme = recognise_name_scheme(tensors, directory)
    stacked = any(name.endswith(_STACKED) for name in tensors)
    config = _checked_config(from_hf(hf), hf, tensors, scheme, stacked)
    _check_family(hf, opened)
    config = replace(
        config,
        pooler=any(name.startswith("pooler.dense.") for name in tensors),
        mlm_head="lm_head.dense.weight" in tensors,
    )
    adapters = find_peft_adapters(directory, tuple(hf.get("lora_adaptations") or ()), allow_pickle=allow_pickle)
    if stacked and adapters:
        raise CheckpointError(
            f"{directory} is ambiguous: its weights hold stacked adapters, {[a.folder.name for a in adapters]} hold PEFT ones"
        )
    if adapters:
        rank = max(adapter.rank for adapter in adapters)
        separate = not all_share_down_projections(adapters, config)
        tasks = tuple(adapter.task for adapter in adapters)
        config = replace(config, tasks=tasks, lora_rank=rank, separate_qkv_adapters=separate)
    config = with_library_settings(config, root)

    table = torch_names.base_mappings(config, scheme, parametrized=stacked)
    if stacked:
        table |= torch_names.stacked_adapter_mappings(config)
    return OpenCheckpoint(config, _match(table, tensors, config, directory), adapters)


def recognise_name_scheme(names: Iterable[str], directory: Path) -> NameScheme:
    """Scheme of the tensor names, which are given as `torch_names.standard_name` has them.

    Raises:
        CheckpointError: the names are of several schemes, or of none.
    """
    marks: dict[str, NameScheme] = {"mixer.Wqkv": "fused", "self_attn.q_proj": "split", "attention.self.query": "bert"}
    names = list(names)
    found: set[NameScheme] = {scheme for mark, scheme in marks.items() for name in names if mark in name}
    if len(found) == 1:
        (scheme,) = found
        return scheme
    if found:
        raise CheckpointError(f"{directory} is ambiguous: its tensor names mix the layouts {sorted(found)}")
    raise CheckpointError(
        f"{directory} is of an unknown kind: its tensors are {sorted(names)[:5]} ...; supported are jina-embeddings-v3 "
        "(original or transformers), XLM-RoBERTa and BERT, multilingual-E5 among them"
    )


def _unwrapped(tensors: Mapping[str, LazyTensor], directory: Path) -> dict[str, LazyTensor]:
    refuse_foreign_tensors(tensors, directory)
    return {plain: tensors[name] for name, plain in unwrapped_names(tensors, directory).items()}


def _check_family(hf: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises ConfigError where the names of tensors are BERT's and the configuration is not, or the
    reverse: their positions differ, and nothing else would tell."""
    said = hf.get("model_type")
    for family, of_others, marks in (("bert", False, ("bert.", "cls.")), ("xlm-roberta", True, ("roberta.", "lm_head."))):
        found = [name for name in names if name.startswith(marks)]
        if found and (said == "bert") == of_others:
            raise ConfigError(
                f"config.json contradicts the tensors: model_type is {said!r}, and {found[0]} is a name of {family!r}; "
                "write the model_type of the model that was trained"
            )


def _by_standard_name(tensors: Mapping[str, LazyTensor], directory: Path) -> dict[str, LazyTensor]:
    plain = {torch_names.standard_name(name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        twice = [name for name, count in Counter(map(torch_names.standard_name, tensors)).items() if count > 1]
        raise CheckpointError(
            f"{directory} is ambiguous: with and without a prefix such as 'roberta.' it holds {twice[0]} twice"
        )
    if "lm_head.decoder.bias" in plain and "lm_head.bias" not in plain:
        plain["lm_head.bias"] = plain.pop("lm_head.decoder.bias")
    return plain


def _checked_config(
    config: ModelConfig, hf: Mapping[str, Any], tensors: Mapping[str, LazyTensor], scheme: NameScheme, stacked: bool
) -> ModelConfig:
    """Completes the configuration with what only the tensors state.

    Raises:
        ConfigError: names every field that contradicts the tensors.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    found = _sizes(shapes, scheme, stacked)
    position_type = "absolute" if "embeddings.position_embeddings.weight" in tensors else "rope"
    said = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "type_vocab_size": config.type_vocab_size,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.mlp_size,
        "max_position_embeddings": config.max_position_embeddings,
        "number of lora_adaptations": len(config.tasks),
        "lora_rank": hf.get("lora_rank", found.get("lora_rank")),
    }
    wrong = [
        f"{field} is {said[field]}{'' if field.split()[-1] in hf else ' by default'}, in the tensors {size}"
        for field, size in found.items()
        if said[field] != size
    ]
    if config.position_type != position_type:
        in_file = hf.get("position_embedding_type")
        wrong.append(f"position_embedding_type is {in_file!r}, in the tensors {position_type}")
    if config.tasks and not stacked and hf.get("model_type") != "jina_embeddings_v3":
        wrong.append(f"lora_adaptations is {list(config.tasks)}, the tensors have no adapters")
    if wrong:
        raise ConfigError("config.json contradicts the tensors: " + "; ".join(wrong))
    return replace(config, lora_rank=found["lora_rank"]) if stacked else replace(config, tasks=())


def _sizes(shapes: Mapping[str, tuple[int, ...]], scheme: NameScheme, stacked: bool) -> dict[str, int]:
    """Sizes that the tensors state, by field of `config.json`; a missing tensor states nothing."""
    prefix, _, suffix = torch_names.LAYER_PREFIXES[scheme].partition("{l}")
    up = {"fused": "mlp.fc1", "split": "mlp.fc1", "bert": "intermediate.dense"}[scheme]
    weight = "parametrizations.weight.original" if stacked else "weight"
    layers = {name.removeprefix(prefix).split(suffix)[0] for name in shapes if name.startswith(prefix) and suffix in name}
    sizes = {"num_hidden_layers": 1 + max((int(layer) for layer in layers if layer.isdecimal()), default=0)}
    for field, name, axis in (
        ("vocab_size", f"embeddings.word_embeddings.{weight}", 0),
        ("hidden_size", f"embeddings.word_embeddings.{weight}", 1),
        ("type_vocab_size", f"embeddings.token_type_embeddings.{weight}", 0),
        ("max_position_embeddings", "embeddings.position_embeddings.weight", 0),
        ("intermediate_size", f"{prefix}0{suffix}{up}.{weight}", 0),
        ("number of lora_adaptations", "embeddings.word_embeddings.parametrizations.weight.0.lora_A", 0),
        ("lora_rank", "embeddings.word_embeddings.parametrizations.weight.0.lora_A", 2),
    ):
        if axis < len(shapes.get(name, ())):
            sizes[field] = shapes[name][axis]
    return sizes


def _match(
    table: Mapping[str, TensorMapping], tensors: Mapping[str, LazyTensor], config: ModelConfig, directory: Path
) -> list[_Source]:
    """Pairs every tensor with its line of the table.

    Raises:
        CheckpointError: lists every tensor that does not fit.
    """
    arrays = {path: variable.shape for path, variable in abstract_variables(config).items()}
    for name, partner in torch_names.TIED.items():
        if name in tensors and partner in tensors and not np.array_equal(tensors[name].read(), tensors[partner].read()):
            raise CheckpointError(f"{directory}: {name} differs from {partner}; an untied head is not supported")
    for name in torch_names.IGNORED.keys() & tensors.keys():
        logger.info("%s: %s is left out: %s", directory, name, torch_names.IGNORED[name])
    problems = [f"missing: {name}" for name in table if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in table and name not in torch_names.IGNORED]
    sources = [_Source(name, tensors[name], entry) for name, entry in table.items() if name in tensors]
    for name, tensor, entry in sources:
        expected = entry.tensor_shape(arrays[entry.path])
        if tensor.shape != expected:
            problems.append(f"wrong shape: {name} is {tensor.shape}, should be {expected}")
        if tensor.dtype not in FLOATS:
            problems.append(f"wrong dtype: {name} is {tensor.dtype}, should be one of {[str(dtype) for dtype in FLOATS]}")
    if problems:
        raise CheckpointError(f"the tensors of {directory} do not fit its config.json:\n  " + "\n  ".join(problems))
    return sources


def _fill(
    config: ModelConfig,
    sources: list[_Source],
    adapters: list[PeftAdapter],
    dtype: DTypeLike | None,
    param_dtype: DTypeLike | None,
) -> Encoder:
    variables = abstract_variables(config)
    by_path: dict[str, list[_Source]] = {}
    for source in sources:
        by_path.setdefault(source.entry.path, []).append(source)
    shapes = {path: variable.shape for path, variable in variables.items()}
    for task, adapter in enumerate(adapters):
        for name, (tensor, entry) in matched_tensors(adapter, config, task, shapes).items():
            by_path.setdefault(entry.path, []).append(_Source(f"{adapter.folder}: {name}", tensor, entry))
    scales = [module_scales(adapter, config) for adapter in adapters]
    not_finite: list[str] = []
    arrays = {}
    for path, variable in variables.items():
        if isinstance(variable, AdapterScale):
            array = np.full(variable.shape, config.lora_alpha / config.lora_rank, np.float32)
            for task, module_scale in enumerate(scales):
                array[..., task] = module_scale[path.removesuffix(".scale")]
        else:
            array = _assemble(path, variable, by_path.pop(path, []), param_dtype, not_finite)
        arrays[path] = jax.device_put(array)
    if not_finite:
        raise CheckpointError(f"{len(not_finite)} tensors hold NaN or infinity: {not_finite}")
    return from_arrays(config, arrays, dtype=arrays["tokens.table"].dtype if dtype is None else dtype)


def _assemble(
    path: str, variable: nnx.Variable, sources: list[_Source], dtype: DTypeLike | None, not_finite: list[str]
) -> np.ndarray:
    """Assembles one Flax array from its tensors.

    Entries that no tensor fills (a smaller rank, a module without adapter) are zero.
    """
    found = sorted({str(source.tensor.dtype) for source in sources})
    if len(found) > 1 and dtype is None and not isinstance(variable, AdapterParam):
        raise CheckpointError(f"the tensors of {path} have different dtypes {found}; choose one with dtype")
    if dtype is None:  # numpy knows no common dtype of bfloat16 and float16; it is float32
        dtype = reduce(jnp.promote_types, [source.tensor.dtype for source in sources] or [jnp.float32])
    array = _aligned_zeros(variable.shape, jnp.dtype(dtype))
    for name, tensor, entry in sources:
        values = tensor.read()
        if not _finite(values):
            not_finite.append(name)
        elif values.dtype != array.dtype:
            values = _cast(values, array.dtype)
            if not _finite(values):
                not_finite.append(f"{name}, in {array.dtype}")
        entry.fill(array, values)
    return array


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros at an address that is a multiple of 64, which jax takes over on CPU without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.zeros(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows is infinite, and reported
        return values.astype(dtype)


def _finite(values: np.ndarray) -> bool:
    # The test for an exponent of all ones is five times faster than that of ml_dtypes.
    if values.dtype == ml_dtypes.bfloat16:
        return not ((values.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(values).all())

"""Writes an encoder as a PyTorch checkpoint.

The layout is the original's, transformers' or sentence-transformers'.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from ..config import DOCUMENT_PROMPTS, SIDE_TASKS, ModelConfig
from ..errors import CheckpointError
from ..files import dump_json
from ..model.adapters import base_arrays, drop_adapter, extract_adapter, extract_adapters, merge_adapter
from ..model.encoder import Encoder
from ..storage import StoragePath
from ..text.tokenizer import Tokenizer, lower_cases
from . import torch_names
from .hf_config import to_hf
from .peft import adapter_folder
from .pipeline import write_modules
from .sealed_directory import atomic_directory
from .tensor_files import write_tensors
from .torch_names import TensorMapping

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

PEFT_TARGETS = {
    "rope": ["word_embeddings", "token_type_embeddings", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
    "absolute": [
        "word_embeddings",
        "token_type_embeddings",
        "query",
        "key",
        "value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ],
}


def write_original(directory: str | StoragePath, encoder: Encoder, tokenizer: Tokenizer, dtype: DTypeLike | None = None):
    """Writes the layout of the released jina-embeddings-v3.

    Adapters are stacked over tasks, and names have the prefix `roberta.`. Adapters with separate
    down-projections for q, k and v are written exactly, as shared ones of three times the rank.
    """
    config, arrays = encoder.config, _on_host(base_arrays(encoder), dtype)
    table = torch_names.base_mappings(config, "fused", parametrized=bool(config.tasks))
    if config.tasks:
        adapters = _on_host(extract_adapters(encoder), dtype)
        if config.separate_qkv_adapters:
            config = replace(config, lora_rank=3 * config.lora_rank, separate_qkv_adapters=False)
            logger.warning("q, k and v have down-projections of their own: written as shared ones of rank %d", config.lora_rank)
            adapters = share_down_projections(adapters)
        adapters, scale = with_one_scale(adapters)
        config = replace(config, lora_alpha=_alpha(scale, config.lora_rank))
        table |= torch_names.stacked_adapter_mappings(config)
        arrays |= adapters
    hf = to_hf(config, "original", _torch_dtype(arrays))
    with atomic_directory(directory) as target:
        _write(target, _prefixed(_tensors(table, arrays), "roberta"), hf, tokenizer)
        _write_prompts(target, config)


def write_transformers(directory: str | StoragePath, encoder: Encoder, tokenizer: Tokenizer, dtype: DTypeLike | None = None):
    """Writes the layout of transformers' classes, and a PEFT adapter folder for each task."""
    with atomic_directory(directory) as target:
        _write_transformers(target, encoder, tokenizer, dtype)
        _write_prompts(target, encoder.config)


def write_sentence_transformers(
    directory: str | StoragePath,
    encoder: Encoder,
    tokenizer: Tokenizer,
    dtype: DTypeLike | None = None,
    *,
    task: str | None = None,
    max_length: int,
):
    """Writes a model that sentence-transformers loads without remote code.

    The model is the base, or one task merged into it. The task's instruction becomes the default
    prompt, so that `encode(texts)` in sentence-transformers is `encode(texts, task)` here, and the
    prompt of queries or documents, of both where it is not the task of one of them.
    """
    config = encoder.config
    default = task or config.default_prompt
    prompts = {name: text for name, text in config.prompts if name not in config.tasks or name == default}
    if task:
        sides = [side for side, own in SIDE_TASKS.items() if task == own or task not in SIDE_TASKS.values()]
        prompts |= dict.fromkeys([task, *sides], config.prompt(task) or "")
    base = merge_adapter(encoder, task) if task else _without_adapters(encoder)
    library = {"prompts": _with_document(prompts), "default_prompt_name": default, "similarity_fn_name": "cosine"}
    if config.truncate_dim is not None:
        library["truncate_dim"] = config.truncate_dim
    sentence = {"max_seq_length": max_length, "do_lower_case": lower_cases(tokenizer)}
    with atomic_directory(directory) as target:
        _write_transformers(target, base, tokenizer, dtype)
        _write_json(target / "config_sentence_transformers.json", library)
        _write_json(target / "sentence_bert_config.json", sentence)
        write_modules(target, config.hidden_size)


def share_down_projections(adapters: Arrays) -> Arrays:
    """Converts adapters with separate q, k and v down-projections to a shared one.

    The shared one, of rank 3 r, equals the separate ones of rank r: the three are concatenated
    along the rank, and each of q, k and v in the up-projection reads its third.
    """
    a, b, scale = (adapters[f"layers.qkv.{name}"] for name in ("a", "b", "scale"))
    layers, inputs, c, k, r = a.shape
    shared = a.transpose(0, 1, 3, 2, 4).reshape(layers, inputs, 1, k, c * r)
    own = np.eye(c, dtype=b.dtype)[None, None, :, None, :, None]  # [l, k, c, r, c, o]
    wide = (own * b[:, :, None]).reshape(layers, k, c * r, c, -1)
    # The scales are [l, c, k]; where they differ, the ratio is multiplied into b.
    largest = np.abs(scale).max(axis=1, keepdims=True)
    ratio = np.divide(scale, largest, out=np.zeros_like(scale), where=largest > 0).transpose(0, 2, 1)
    wide = wide if (ratio == 1).all() else (wide.astype(np.float32) * ratio[:, :, None, :, None]).astype(b.dtype)
    out = {"layers.qkv.a": shared, "layers.qkv.b": wide, "layers.qkv.scale": largest}
    for path, array in adapters.items():
        rank_axis = {"a": -1, "b": -2}.get(path.rpartition(".")[2])
        if path in out:
            continue
        padding = [(0, 0)] * array.ndim
        if rank_axis is not None:
            padding[rank_axis] = (0, (c - 1) * r)
        out[path] = np.pad(array, padding)
    return out


def with_one_scale(adapters: Arrays) -> tuple[Arrays, float]:
    """Converts adapters to one common scale, as these layouts require; returns them and the scale.

    Where a module's scale differs, the ratio is multiplied into its `b`, which rounds.
    """
    scales = {path: array for path, array in adapters.items() if path.endswith(".scale")}
    target = max(float(np.abs(scale).max()) for scale in scales.values()) or 1.0
    out = dict(adapters)
    for path, scale in scales.items():
        if (scale == target).all():
            continue
        b = path.removesuffix("scale") + "b"
        ratio = (scale / target)[..., None, None]  # [..., k] against b [..., k, r, o]
        if path == "layers.qkv.scale":  # [l, c, k] against b [l, k, r, 3, o]
            ratio = np.broadcast_to((scale / target).transpose(0, 2, 1)[:, :, None, :, None], (*scale.shape[::2], 1, 3, 1))
        out[b] = (adapters[b].astype(np.float32) * ratio).astype(adapters[b].dtype)
        out[path] = np.full_like(scale, target)
        logger.warning("%s: the scales of the adapters differ; their ratio was multiplied into b", path)
    return out, target


def _write_transformers(target: Path, encoder: Encoder, tokenizer: Tokenizer, dtype: DTypeLike | None) -> None:
    config, arrays = encoder.config, _on_host(base_arrays(encoder), dtype)
    if len({adapter_folder(task) for task in config.tasks}) < len(config.tasks):
        raise ValueError(f"two of the tasks {list(config.tasks)} would share a folder: only letters and digits tell them apart")
    scheme = "fused" if config.position_type == "rope" else "bert"
    tensors = _tensors(torch_names.base_mappings(config, scheme), arrays)
    if config.mlm_head:
        tensors = _prefixed(tensors, "bert" if config.is_bert else "roberta")
    _write(target, tensors, to_hf(config, "transformers", _torch_dtype(arrays)), tokenizer)
    for task in config.tasks:
        adapter, scale = with_one_scale(_on_host(extract_adapter(encoder, task), dtype))
        folder = target / adapter_folder(task)
        folder.mkdir()
        table = torch_names.peft_adapter_mappings(config, 0, "split" if scheme == "fused" else "bert")
        tensors = {f"base_model.model.{name}": entry.extract(adapter[entry.path]) for name, entry in table.items()}
        write_tensors(folder / "adapter_model.safetensors", tensors)
        _write_json(folder / "adapter_config.json", _adapter_config(config, scale))


def _adapter_config(config: ModelConfig, scale: float) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "r": config.lora_rank,
        "lora_alpha": _alpha(scale, config.lora_rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": PEFT_TARGETS[config.position_type] + (["pooler.dense"] if config.pooler else []),
    }


def _on_host(arrays: Mapping[str, Array], dtype: DTypeLike | None) -> Arrays:
    """Arrays in host memory: parameters in `dtype` (None = unchanged), scales unchanged."""
    keep = {path for path in arrays if path.removesuffix("scale") + "b" in arrays}
    host = {path: np.asarray(array) for path, array in arrays.items()}
    if dtype is None:
        return host
    with np.errstate(over="ignore"):  # what overflows is infinite, and an error below
        cast = {path: array if path in keep else array.astype(jnp.dtype(dtype)) for path, array in host.items()}
    if wrong := [path for path, array in cast.items() if np.isfinite(host[path]).all() and not np.isfinite(array).all()]:
        raise CheckpointError(f"values of {wrong} are too large for {jnp.dtype(dtype)}; choose bfloat16 or float32")
    return cast


def _tensors(table: Mapping[str, TensorMapping], arrays: Arrays) -> Arrays:
    return {name: entry.extract(arrays[entry.path]) for name, entry in table.items()}


def _prefixed(tensors: Arrays, family: Literal["roberta", "bert"]) -> Arrays:
    return {torch_names.family_name(name, family): tensor for name, tensor in tensors.items()}


def _write(target: Path, tensors: Arrays, hf: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    write_tensors(target / "model.safetensors", tensors)
    _write_json(target / "config.json", hf)
    tokenizer.save_pretrained(target)


def _write_prompts(target: Path, config: ModelConfig) -> None:
    """Writes the prompts that are no task's instruction, for which `config.json` has no place."""
    prompts = {name: text for name, text in config.prompts if name not in config.tasks}
    if prompts or config.default_prompt:
        library = {"prompts": prompts, "default_prompt_name": config.default_prompt}
        _write_json(target / "config_sentence_transformers.json", library)


def _with_document(prompts: dict[str, str]) -> dict[str, str]:
    """Adds the prompt `document` where that of documents has another name: sentence-transformers
    looks for this name first, and takes it to be empty where it is missing."""
    name = next((name for name in DOCUMENT_PROMPTS if name in prompts), "document")
    return prompts if name == "document" else prompts | {"document": prompts[name]}


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(dump_json(fields), "utf-8")


def _without_adapters(encoder: Encoder) -> Encoder:
    for task in encoder.config.tasks:
        encoder = drop_adapter(encoder, task)
    return encoder


def _torch_dtype(arrays: Arrays) -> str:
    return str(arrays["tokens.table"].dtype)


def _alpha(scale: float, rank: int) -> float:
    """alpha of a float32 scale alpha / rank.

    It is the short number from which the scale came, if that gives the same scale.
    """
    short = float(f"{scale * rank:.6g}")
    return short if np.float32(short / rank) == np.float32(scale) else scale * rank

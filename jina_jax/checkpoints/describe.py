"""Says what a model is, from its files, without reading its weights."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast, get_args

import numpy as np

from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError
from ..files import read_json
from ..model.lora import AdapterParam, AdapterScale
from ..model.parameters import abstract_variables
from ..text.tokenizer import max_tokens
from .hf_config import MODEL_TYPES, Family, family_of
from .load import read_tokenizer
from .native import open_unverified
from .pipeline import MODULES, sentence_settings, transformer_folder
from .published_prompts import lacking_prompts
from .settings import Setting, list_settings
from .settings_rules import Verdict
from .sources import checkpoint_format
from .torch_reader import open_torch_checkpoint

_FAMILIES: dict[Family, str] = {
    "flash": "jina-embeddings-v3",
    "jina_embeddings_v3": "jina-embeddings-v3",
    "xlm-roberta": "XLM-RoBERTa",
    "bert": "BERT",
}
_LONGEST_VALUE = 200
"""Characters of a setting's value as JSON; a longer one is cut, and is then a string."""


class Description(TypedDict):
    """What a model is. None = not to be had: the model is refused."""

    layout: str | None
    """native, original, transformers, sentence-transformers, or the family of what has no layout of
    its own: XLM-RoBERTa, BERT."""
    family: str | None
    """jina-embeddings-v3 (with rotary positions), XLM-RoBERTa or BERT."""
    sizes: dict[str, int] | None
    """By the fields of `ModelConfig`."""
    parameters: dict[str, Any] | None
    """Of the base, and of each adapter by its task, with all that pads it to the model's rank."""
    dtype: dict[str, list[str]] | None
    """Dtypes of the base and of the adapters, as stored."""
    positions: dict[str, Any] | None
    limit: dict[str, Any] | None
    """Tokens of a text, special ones included, and what sets the limit."""
    dims: dict[str, Any] | None
    """Dimensions that the model lists, and the one that it keeps by default."""
    tasks: dict[str, str] | None
    """Instructions by task."""
    prompts: dict[str, str] | None
    """Prompts that are no task's instruction."""
    prompts_are_published: bool | None
    """Whether the prompts are the published ones of a model whose files have none."""
    default_prompt: str | None
    mlm_head: bool | None
    pooler: bool | None
    settings: dict[Verdict, list[dict[str, Any]]]
    """Settings beside the weights by what becomes of them: file, field, value, and why."""
    refused: list[str]
    """Why the model is not loaded; [] = it is."""


def describe(directory: Path, source: str | Path) -> Description:
    """Describes the model in a local directory.

    Args:
        directory: of the model, in any layout.
        source: the hub id or directory by which it is known.

    Raises:
        FileNotFoundError: a file is missing.
        CheckpointError: the directory holds no model, or a damaged one. One that is refused for a
            setting is described, as far as it can be.
    """
    found: dict[str, Any] = dict.fromkeys(Description.__annotations__)
    settings, refused = [], []
    try:
        found |= _kind(directory)
        settings = list_settings(directory)
        refused = [setting.refusal() for setting in settings if setting.verdict == "refused"]
        config, dtypes = _open(directory)
        found |= _model(directory, source, config) | {"dtype": dtypes}
    except ConfigError as error:
        refused = refused or [str(error)]
    except CheckpointError:
        if not refused:
            raise
    return cast(Description, found | {"settings": _by_verdict(settings), "refused": refused})


def _by_verdict(settings: list[Setting]) -> dict[Verdict, list[dict[str, Any]]]:
    found: dict[Verdict, list[dict[str, Any]]] = {verdict: [] for verdict in get_args(Verdict)}
    for file, field, value, verdict, why in settings:
        found[verdict].append({"file": file, "field": field, "value": _short(value), "why": why})
    return found


def _short(value: Any) -> Any:
    text = json.dumps(value, ensure_ascii=False)
    return value if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _kind(directory: Path) -> dict[str, Any]:
    """Layout and family, by the configuration; the family of a native checkpoint stands in none."""
    if checkpoint_format(directory) == "native":
        return {"layout": "native"}
    hf = read_json(transformer_folder(directory) / "config.json")
    if hf.get("model_type") not in (None, *MODEL_TYPES):
        return {}
    kind = family_of(hf)
    family = _FAMILIES[kind]
    if kind == "flash":
        return {"layout": "original", "family": family}
    if (directory / MODULES).exists():
        return {"layout": "sentence-transformers", "family": family}
    return {"layout": "transformers" if kind == "jina_embeddings_v3" else family, "family": family}


def _open(directory: Path) -> tuple[ModelConfig, dict[str, list[str]]]:
    """Configuration, and dtypes of the base and of the adapters; their scales are no parameters."""
    if checkpoint_format(directory) == "native":
        config, stored = open_unverified(directory)
        found = [(path, array.dtype) for path, array in stored.items()]
        of_peft = []
    else:
        config, sources, adapters = open_torch_checkpoint(directory)
        found = [(source.entry.path, source.tensor.dtype) for source in sources]
        of_peft = [tensor.dtype for adapter in adapters for tensor in adapter.tensors.values()]
    base, adapted = _parameters(config)
    return config, {
        "base": _names(dtype for path, dtype in found if path in base),
        "adapters": _names([*of_peft, *(dtype for path, dtype in found if path in adapted)]),
    }


def _names(dtypes: Iterable[Any]) -> list[str]:
    return sorted({str(np.dtype(dtype)) for dtype in dtypes})


def _parameters(config: ModelConfig) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers of parameters of the base and of the adapters, by the path of the array."""
    variables = abstract_variables(config)
    sizes = {path: math.prod(variable.shape) for path, variable in variables.items()}
    adapted = {path: sizes[path] for path, variable in variables.items() if isinstance(variable, AdapterParam)}
    scales = {path for path, variable in variables.items() if isinstance(variable, AdapterScale)}
    return {path: size for path, size in sizes.items() if path not in adapted and path not in scales}, adapted


def _model(directory: Path, source: str | Path, config: ModelConfig) -> dict[str, Any]:
    published = lacking_prompts(config, source)
    family = "jina-embeddings-v3" if config.position_type == "rope" else "BERT" if config.is_bert else "XLM-RoBERTa"
    sizes = ("num_layers", "hidden_size", "num_heads", "mlp_size", "vocab_size", "type_vocab_size")
    base, adapted = _parameters(config)
    each = sum(adapted.values()) // max(1, len(config.tasks))
    return {
        "family": family,
        "sizes": {name: getattr(config, name) for name in sizes} | {"lora_rank": config.lora_rank if config.tasks else None},
        "parameters": {"base": sum(base.values()), "adapters": dict.fromkeys(config.tasks, each)},
        "positions": {
            "type": config.position_type,
            "count": config.max_position_embeddings,
            "first": config.first_position,
            "rope_theta": config.rope_theta if config.position_type == "rope" else None,
        },
        "limit": _limit(directory, config),
        "dims": {"matryoshka": list(config.matryoshka_dims), "truncate_dim": config.truncate_dim},
        "tasks": {task: config.prompt(task) or "" for task in config.tasks},
        "prompts": {name: text for name, text in config.prompts if name not in config.tasks} | published,
        "prompts_are_published": bool(published),
        "default_prompt": config.default_prompt,
        "mlm_head": config.mlm_head,
        "pooler": config.pooler,
    }


def _limit(directory: Path, config: ModelConfig) -> dict[str, Any]:
    tokens = max_tokens(read_tokenizer(directory, config), config)
    folder = transformer_folder(directory)
    of_module, settings = sentence_settings(folder)
    of_tokenizer = folder / "tokenizer_config.json"
    limits: Mapping[str, Any] = {
        "positions": config.max_tokens,
        f"{of_module.name if of_module else ''}: max_seq_length": settings.get("max_seq_length"),
        f"{of_tokenizer.name}: model_max_length": read_json(of_tokenizer).get("model_max_length")
        if of_tokenizer.exists()
        else None,
    }
    return {"tokens": tokens, "set_by": [name for name, limit in limits.items() if limit == tokens]}

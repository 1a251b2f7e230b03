"""Translates `ModelConfig` from and to the `config.json` of published checkpoints."""

from collections.abc import Mapping
from typing import Any, Literal

from ..config import ModelConfig, PositionType, _from_file
from ..errors import ConfigError

Layout = Literal["original", "transformers"]

_POSITION_TYPES: dict[str, PositionType] = {"rotary": "rope", "rope": "rope", "absolute": "absolute"}
MODEL_TYPES = ("bert", "xlm-roberta", "jina_embeddings_v3")

Family = Literal["bert", "xlm-roberta", "flash", "jina_embeddings_v3"]
"""Class of a `config.json`: transformers' three by model_type, and the original's own, `flash`,
which has XLM-RoBERTa's model_type."""

_BERT: dict[str, Any] = {
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "rope_theta": 10_000.0,  # until training asks for rotary positions
}
_JINA: dict[str, Any] = {
    "vocab_size": 250_002,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 8194,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "pad_token_id": 1,
    "position_embedding_type": "rotary",
    "rope_theta": 20_000.0,
}
_DEFAULTS: dict[Family, dict[str, Any]] = {
    "bert": _BERT,
    "xlm-roberta": _BERT | {"pad_token_id": 1},
    "flash": _JINA | {"rope_theta": 10_000.0},
    "jina_embeddings_v3": _JINA,
}
"""Fields that a `config.json` may leave out, and what its class takes them to be."""

_CONTAINERS = {
    "lora_adaptations": list,
    "task_instructions": dict,
    "matryoshka_dimensions": list,
    "rope_parameters": dict,
    "rope_scaling": dict,
}


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a published `config.json`.

    Supported are jina-embeddings-v3 (original or transformers-native), XLM-RoBERTa and BERT, the
    E5 models among them. A field that is left out has the default of the file's class. Pooler, MLM
    head, rank and the kind of q, k, v adapters are set from the tensors by the reader, not from
    this file.

    Raises:
        ConfigError: a field is of the wrong type, or has a value that is not supported.
    """
    for field, kind in _CONTAINERS.items():
        if not isinstance(hf.get(field), kind | None):
            raise ConfigError(f"{field} must be a {kind.__name__}, not {hf[field]!r}")
    model_type = hf.get("model_type")
    if model_type is not None and model_type not in MODEL_TYPES:
        raise ConfigError(f"model_type {model_type!r} is not supported; supported are {list(MODEL_TYPES)}")
    if hf.get("hidden_act", "gelu") != "gelu":
        raise ConfigError(f"hidden_act {hf['hidden_act']!r} is not supported; supported is 'gelu' (exact)")
    if hf.get("emb_pooler") not in (None, "mean"):
        raise ConfigError(f"emb_pooler {hf['emb_pooler']!r} is not supported; supported are null and 'mean'")
    family = family_of(hf)
    default = _DEFAULTS[family]
    fields = {**default, **hf}
    position = _or(fields["position_embedding_type"], default["position_embedding_type"])
    if position not in list(_POSITION_TYPES):
        raise ConfigError(f"position_embedding_type {position!r} is not supported; use one of {sorted(_POSITION_TYPES)}")
    tasks = tuple(hf.get("lora_adaptations") or ())
    instructions = hf.get("task_instructions") or {}
    if missing := [task for task in tasks if instructions and task not in instructions]:
        raise ConfigError(f"task_instructions has no entry for {missing} of lora_adaptations")
    values = dict(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        mlp_size=fields["intermediate_size"],
        max_position_embeddings=fields["max_position_embeddings"],
        type_vocab_size=fields["type_vocab_size"],
        position_type=_POSITION_TYPES[position],
        position_offset=0 if family == "bert" else None,
        rope_theta=_rope_theta(hf, default["rope_theta"]),
        layer_norm_eps=fields["layer_norm_eps"],
        initializer_range=fields["initializer_range"],
        pad_id=_or(fields["pad_token_id"], default["pad_token_id"]),
        tasks=tasks,
        lora_rank=hf.get("lora_rank", 4),
        lora_alpha=hf.get("lora_alpha", 1),
        prompts=tuple(instructions.items()),
        matryoshka_dims=tuple(hf.get("matryoshka_dimensions") or ()),
        truncate_dim=hf.get("truncate_dim"),
    )
    return _from_file(values)


def to_hf(config: ModelConfig, layout: Layout, dtype: str) -> dict[str, Any]:
    """Contents of the `config.json` of a checkpoint in a PyTorch layout.

    Args:
        config: the model's configuration.
        layout: the PyTorch layout.
        dtype: as torch names it ("float32", "bfloat16").

    Raises:
        ConfigError: the layout is the original, which has rotary positions only, and the model has
            absolute ones.
    """
    rope = config.position_type == "rope"
    if layout == "original" and not rope:
        raise ConfigError("the original layout has rotary positions; write a model with absolute ones as 'transformers'")
    hf: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_size,
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.layer_norm_eps,
        "initializer_range": config.initializer_range,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "pad_token_id": config.pad_id,
        "torch_dtype": dtype,
        "matryoshka_dimensions": list(config.matryoshka_dims),
        "truncate_dim": config.truncate_dim,
    }
    if config.tasks:
        hf["task_instructions"] = {task: config.prompt(task) or "" for task in config.tasks}
    if config.is_bert:
        return hf | {"model_type": "bert", "architectures": [_architecture("Bert", config)]}
    hf |= {"bos_token_id": 0, "eos_token_id": 2}
    if not rope:
        return hf | {"model_type": "xlm-roberta", "architectures": [_architecture("XLMRoberta", config)]}
    hf["position_embedding_type"] = "rotary"
    if layout == "transformers":
        return hf | {
            "model_type": "jina_embeddings_v3",
            "architectures": [_architecture("JinaEmbeddingsV3", config)],
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "tie_word_embeddings": True,
        }
    hf |= {"model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"], "rotary_emb_base": config.rope_theta}
    if config.tasks:
        hf |= {
            "architectures": ["XLMRobertaLoRA"],
            "lora_adaptations": list(config.tasks),
            "lora_rank": config.lora_rank,
            "lora_alpha": config.lora_alpha,
            "lora_dropout_p": 0.0,
            "lora_main_params_trainable": False,
            "load_trained_adapters": True,
        }
    return hf


def family_of(hf: Mapping[str, Any]) -> Family:
    """Class of a `config.json`.

    The original's files have XLM-RoBERTa's model_type or none. They are known by what only they
    say: their class, which is named beside the code that is never run, rotary positions, adapters.
    Were the choice wrong, the tensors would contradict it: XLM-RoBERTa has a table of positions.
    """
    match hf.get("model_type"):
        case "bert" | "jina_embeddings_v3" as model_type:
            return model_type
    named = "XLMRobertaFlashConfig" in str(hf.get("auto_map"))
    rotary = hf.get("position_embedding_type") in ("rotary", "rope")
    return "flash" if named or rotary or hf.get("lora_adaptations") else "xlm-roberta"


def _rope_theta(hf: Mapping[str, Any], default: float) -> Any:
    # `rope_scaling` is the older name.
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"rope_parameters.rope_type {kind!r} is not supported; use 'default'")
    for place, field in ((parameters, "rope_theta"), (hf, "rope_theta"), (hf, "rotary_emb_base")):
        if place.get(field) is not None:
            return place[field]
    return default


def _architecture(family: str, config: ModelConfig) -> str:
    return family + ("ForMaskedLM" if config.mlm_head else "Model")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value

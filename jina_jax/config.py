"""The model's configuration, and its translation from and to the `config.json` files of published checkpoints."""

import dataclasses
import json
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, get_args, get_origin

PUBLISHED_INSTRUCTIONS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
    "separation": "",
    "classification": "",
    "text-matching": "",
}
"""The five tasks of jina-embeddings-v3, in the order of its adapters, each with the text put before every input."""

SERVING_ROPE_THETA = 20_000.0
"""Rotary base of the released model. The paper trains at 10,000 and serves at 20,000."""

PositionType = Literal["rope", "absolute"]
Layout = Literal["original", "transformers"]
Remat = Literal["none", "except_attention", "full"]
"""What of a layer the gradient computes again, in place of keeping it: nothing; all but attention's result; or everything, from
the layer's input."""

_POSITION_TYPES: dict[str, PositionType] = {"rotary": "rope", "rope": "rope", "absolute": "absolute"}
_MODEL_TYPES = ("xlm-roberta", "jina_embeddings_v3")


_CONTAINERS = {
    "lora_adaptations": list,
    "task_instructions": dict,
    "matryoshka_dimensions": list,
    "rope_parameters": dict,
    "rope_scaling": dict,
}


class ConfigError(ValueError):
    """A configuration that is contradictory or asks for what this library does not build; the message names the field."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and conventions of one encoder. Hashable, so that it can be a static part of a compiled program.

    The defaults are the published jina-embeddings-v3 without its adapters.
    """

    vocab_size: int = 250_002
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_size: int = 4096
    max_position_embeddings: int = 8194
    type_vocab_size: int = 1
    position_type: PositionType = "rope"
    rope_theta: float = 20_000.0
    """Base of the rotary angles in use now: the paper trains at 10,000 and serves at 20,000."""
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    pad_id: int = 1
    tasks: tuple[str, ...] = ()
    """Names of the adapters, in the order of their index."""
    lora_rank: int = 4
    lora_alpha: float = 1.0
    """Scale of a fresh adapter is lora_alpha / lora_rank; a loaded adapter brings its own."""
    separate_qkv_adapters: bool = False
    """Whether q, k and v have a down-projection each (PEFT) or share one (the original)."""
    pooler: bool = False
    """Whether the checkpoint holds the dense pooler. Embeddings never use it; it is kept so that nothing is lost."""
    mlm_head: bool = False
    prompts: tuple[tuple[str, str], ...] = ()
    """(task or prompt name, text put before the input)."""
    default_prompt: str | None = None
    """Name of the prompt for a call that names neither task nor prompt."""
    matryoshka_dims: tuple[int, ...] = ()
    truncate_dim: int | None = None
    unroll: bool = False
    """Unroll the loop over layers: faster inference on TPU v5e, longer compilation."""

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "mlp_size",
            "max_position_embeddings",
            "type_vocab_size",
        )
        for field in (*sizes, "lora_rank"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1, not {getattr(self, field)}")
        for field in ("rope_theta", "layer_norm_eps"):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(f"{field} must be above 0 and finite, not {getattr(self, field)}")
        for field in ("lora_alpha", "initializer_range"):
            if not math.isfinite(getattr(self, field)):
                raise ConfigError(f"{field} must be finite, not {getattr(self, field)}")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        if self.position_type == "rope" and self.head_dim % 2:
            raise ConfigError(f"rotary positions need an even head dimension, not {self.head_dim}")
        if "" in self.tasks:
            raise ConfigError(f"a task needs a name: {list(self.tasks)}")
        if len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"tasks are not unique: {list(self.tasks)}")
        if self.truncate_dim is not None and not 1 <= self.truncate_dim <= self.hidden_size:
            raise ConfigError(f"truncate_dim {self.truncate_dim} is outside 1..{self.hidden_size}")
        if wrong := [d for d in self.matryoshka_dims if not 1 <= d <= self.hidden_size]:
            raise ConfigError(f"matryoshka_dims {wrong} are outside 1..{self.hidden_size}")
        if not 0 <= self.pad_id < self.vocab_size:
            raise ConfigError(f"pad_id {self.pad_id} is not in the vocabulary of {self.vocab_size}")
        if self.max_tokens < 1:
            raise ConfigError(f"max_position_embeddings {self.max_position_embeddings} leaves no position for a token")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def max_tokens(self) -> int:
        """Most tokens of a text, special tokens included. Absolute positions start behind the padding id."""
        return self.max_position_embeddings - (self.pad_id + 1 if self.position_type == "absolute" else 0)

    def prompt(self, name: str) -> str | None:
        return dict(self.prompts).get(name)

    def task_index(self, task: str) -> int:
        """Index of a task's adapter; ValueError listing the valid names."""
        if task not in self.tasks:
            raise ValueError(f"unknown task {task!r}; this model has {list(self.tasks) or 'no adapters'}")
        return self.tasks.index(task)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`, also after a trip through JSON."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"unknown configuration fields {unknown}; known are {sorted(known)}")
        return _from_file(fields)


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a published `config.json`: jina-embeddings-v3 (original or transformers-native), XLM-R or E5.

    Pooler, MLM head, rank and the kind of q, k, v adapters are set from the tensors by the reader, not from here.
    """
    for field, kind in _CONTAINERS.items():
        if not isinstance(hf.get(field), kind | None):
            raise ConfigError(f"{field} must be a {kind.__name__}, not {hf[field]!r}")
    model_type = hf.get("model_type")
    if model_type is not None and model_type not in _MODEL_TYPES:
        raise ConfigError(f"model_type {model_type!r} is not supported; supported are {list(_MODEL_TYPES)}")
    if hf.get("hidden_act", "gelu") != "gelu":
        raise ConfigError(f"hidden_act {hf['hidden_act']!r} is not supported; supported is 'gelu' (exact)")
    if hf.get("emb_pooler") not in (None, "mean"):
        raise ConfigError(f"emb_pooler {hf['emb_pooler']!r} is not supported; supported are null and 'mean'")
    native = model_type == "jina_embeddings_v3"
    position = hf.get("position_embedding_type", "rotary" if native else "absolute")
    if position not in list(_POSITION_TYPES):
        raise ConfigError(f"position_embedding_type {position!r} is not supported; use one of {sorted(_POSITION_TYPES)}")
    tasks = tuple(hf.get("lora_adaptations") or ())
    instructions = hf.get("task_instructions") or {}
    if missing := [task for task in tasks if instructions and task not in instructions]:
        raise ConfigError(f"task_instructions has no entry for {missing} of lora_adaptations")
    try:
        values = dict(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=hf["num_attention_heads"],
            mlp_size=hf["intermediate_size"],
            max_position_embeddings=hf["max_position_embeddings"],
            type_vocab_size=hf.get("type_vocab_size", 1),
            position_type=_POSITION_TYPES[position],
            rope_theta=_rope_theta(hf, default=20_000.0 if native else 10_000.0),
            layer_norm_eps=hf.get("layer_norm_eps", 1e-5),
            initializer_range=hf.get("initializer_range", 0.02),
            pad_id=_or(hf.get("pad_token_id"), 1),
            tasks=tasks,
            lora_rank=hf.get("lora_rank", 4),
            lora_alpha=hf.get("lora_alpha", 1),
            prompts=tuple(instructions.items()),
            matryoshka_dims=tuple(hf.get("matryoshka_dimensions") or ()),
            truncate_dim=hf.get("truncate_dim"),
        )
    except KeyError as error:
        raise ConfigError(f"config.json has no field {error}") from error
    return _from_file(values)


def to_hf(config: ModelConfig, layout: Layout, dtype: str) -> dict[str, Any]:
    """The `config.json` of a checkpoint in a PyTorch layout; `dtype` as torch names it ("float32", "bfloat16")."""
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
        "bos_token_id": 0,
        "pad_token_id": config.pad_id,
        "eos_token_id": 2,
        "torch_dtype": dtype,
        "matryoshka_dimensions": list(config.matryoshka_dims),
        "truncate_dim": config.truncate_dim,
    }
    if config.tasks:
        hf["task_instructions"] = {task: config.prompt(task) or "" for task in config.tasks}
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


def dump_json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def differences(saved: Any, now: Any, place: str = "") -> list[str]:
    """Where two JSON values differ, as "stages.0.steps: 100 -> 200"."""
    saved, now = json.loads(json.dumps(saved)), json.loads(json.dumps(now))
    if isinstance(saved, list) and isinstance(now, list):
        saved, now = dict(enumerate(saved)), dict(enumerate(now))
    if not isinstance(saved, dict) or not isinstance(now, dict):
        return [] if saved == now else [f"{place}: {json.dumps(saved)} -> {json.dumps(now)}"]
    keys = [*saved, *(key for key in now if key not in saved)]
    return [line for key in keys for line in differences(saved.get(key), now.get(key), f"{place}.{key}".strip("."))]


def _from_file(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of values that may be of any type; JSON has neither tuples nor a difference between 1 and 1.0."""
    values = {name: _tuples(value) for name, value in fields.items()}
    types = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    if wrong := {name: value for name, value in values.items() if not _fits(value, types[name])}:
        listed = "; ".join(f"{name} is {value!r}, should be {_type_name(types[name])}" for name, value in wrong.items())
        raise ConfigError(f"the configuration has fields of the wrong type: {listed}")
    typed: dict[str, Any] = {name: float(value) if types[name] is float else value for name, value in values.items()}
    return ModelConfig(**typed)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type; a whole number passes for a float, a truth value for no number."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return value in arguments
    if get_origin(kind) is UnionType:
        return any(_fits(value, each) for each in arguments)
    if get_origin(kind) is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is ... and isinstance(value, tuple) else arguments
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    return isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _type_name(kind: Any) -> str:
    return kind.__name__ if kind in (bool, int, float, str) else str(kind).removeprefix("typing.")


def _rope_theta(hf: Mapping[str, Any], default: float) -> Any:
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # the second is the older name
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"rope_parameters.rope_type {kind!r} is not supported; use 'default'")
    for place, field in ((parameters, "rope_theta"), (hf, "rope_theta"), (hf, "rotary_emb_base")):
        if place.get(field) is not None:
            return place[field]
    return default


def _architecture(family: str, config: ModelConfig) -> str:
    return family + ("ForMaskedLM" if config.mlm_head else "Model")


def _or(value: int | None, default: int) -> int:
    return default if value is None else value

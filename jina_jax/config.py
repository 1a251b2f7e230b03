"""Configuration of the model.

`checkpoints.hf_config` translates it from and to the `config.json` of published checkpoints.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from .errors import ConfigError, did_you_mean

PUBLISHED_INSTRUCTIONS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
    "separation": "",
    "classification": "",
    "text-matching": "",
}
"""Instructions of the five tasks of jina-embeddings-v3, in the order of its adapters.

The instruction of a task is put before every input.
"""

DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Names of the prompt of documents, in the order in which they are looked for; that of queries is
"query"."""

Side = Literal["query", "document"]
"""The two sides of a retrieval."""

SIDE_TASKS: dict[Side, str] = {"query": "retrieval.query", "document": "retrieval.passage"}
"""Task of each side."""

SIDE_PROMPTS: dict[Side, tuple[str, ...]] = {"query": ("query",), "document": DOCUMENT_PROMPTS}
"""Names of the prompt of each side, in the order in which they are looked for."""

SERVING_ROPE_THETA = 20_000.0
"""Rotary base of the released model. The paper trains at 10,000 and serves at 20,000."""

PositionType = Literal["rope", "absolute"]
Remat = Literal["none", "except_products", "except_attention", "full"]
"""Activations of a layer that the backward pass recomputes instead of keeping them.

none: nothing. except_products: all but the results of matmuls and of attention, which leaves
LayerNorm, GELU and softmax. except_attention: all but attention's result. full: everything, from
the layer's input.
"""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and conventions of one encoder.

    It is hashable, so that it can be a static part of a compiled program.

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
    position_offset: int | None = None
    """Absolute position of a text's first token: 0 in BERT; None = pad_id + 1, as in XLM-RoBERTa.

    XLM-RoBERTa's positions follow the tokens: one that is the padding id, which a text can spell,
    has position pad_id and is not counted.
    """
    rope_theta: float = 20_000.0
    """Rotary base currently in use: the paper trains at 10,000 and serves at 20,000."""
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    pad_id: int = 1
    tasks: tuple[str, ...] = ()
    """Names of the adapters, in the order of their index."""
    lora_rank: int = 4
    lora_alpha: float = 1.0
    """Numerator of a fresh adapter's scale, lora_alpha / lora_rank; a loaded one has its scale."""
    separate_qkv_adapters: bool = False
    """Whether q, k and v have separate down-projections (PEFT) or share one (the original)."""
    pooler: bool = False
    """Whether the checkpoint holds the dense pooler.

    Embeddings never use it; it is kept so that nothing is lost.
    """
    mlm_head: bool = False
    prompts: tuple[tuple[str, str], ...] = ()
    """Pairs of (task or prompt name, text put before the input)."""
    default_prompt: str | None = None
    """Name of the prompt for a call that names neither task nor prompt."""
    matryoshka_dims: tuple[int, ...] = ()
    truncate_dim: int | None = None
    unroll: bool = False
    """Whether the loop over layers is unrolled: faster inference on TPU v5e, longer compilation."""

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
        if self.position_offset not in (None, 0, self.pad_id + 1):
            raise ConfigError(
                f"position_offset must be 0 (BERT) or pad_id + 1 = {self.pad_id + 1} (XLM-RoBERTa), not {self.position_offset}"
            )
        if self.max_tokens < 1:
            raise ConfigError(f"max_position_embeddings {self.max_position_embeddings} leaves no position for a token")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def first_position(self) -> int:
        """Position of a text's first token: `position_offset` of absolute ones, else 0."""
        if self.position_type == "rope":
            return 0
        return self.pad_id + 1 if self.position_offset is None else self.position_offset

    @property
    def is_bert(self) -> bool:
        """Whether absolute positions begin at 0, as in BERT and in nothing else here."""
        return self.position_type == "absolute" and self.first_position == 0

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a text, special tokens included."""
        return self.max_position_embeddings - self.first_position

    def prompt(self, name: str) -> str | None:
        return dict(self.prompts).get(name)

    def side_prompt(self, side: Side) -> str | None:
        """Name of the prompt of a side of a retrieval; None = the model has none."""
        return next((name for name in SIDE_PROMPTS[side] if self.prompt(name) is not None), None)

    def task_index(self, task: str) -> int:
        """Index of a task's adapter; raises ValueError listing the valid names."""
        if task not in self.tasks:
            raise ValueError(
                f"unknown task {task!r}; this model has {list(self.tasks) or 'no adapters'}{did_you_mean(task, self.tasks)}"
            )
        return self.tasks.index(task)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`, also after a round trip through JSON."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"unknown configuration fields {unknown}; known are {sorted(known)}")
        return _from_file(fields)


def _from_file(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig from values that may be of any type.

    Lists become tuples, and integers floats where the field is one: JSON has neither tuples nor a
    difference between 1 and 1.0.

    Raises:
        ConfigError: names every field of the wrong type.
    """
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
    """True if a value is of a field's type; an integer passes for a float, a bool for no number."""
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

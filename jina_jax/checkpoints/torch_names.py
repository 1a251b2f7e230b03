"""The one table of PyTorch names <-> Flax paths, for every layout and in both directions.

It has three sources, and everything else is derived from them:

  * MODULES and LAYER_MODULES: each module of the encoder and its name in each name scheme;
  * TENSORS: the tensors of a module of each kind, and how their axes change;
  * STACKED_ADAPTERS and PEFT_ADAPTERS: the same for adapters, stacked over tasks (the original) or
    in one folder per task (PEFT).

The functions below expand the table for a configuration. They map each tensor name to a
`TensorMapping`: a place in a Flax array and an invertible change of axes. Nothing here opens a
file.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from ..config import ModelConfig

NameScheme = Literal["fused", "split", "bert"]
"""Scheme of tensor names.

fused: files of jina-embeddings-v3, the original's and transformers'. split: transformers' names for
the modules of jina-embeddings-v3 in memory, which some files and all PEFT adapters use. bert:
BERT and XLM-RoBERTa, multilingual-E5 among them; their heads and prefixes have names of their own,
see `standard_name`.
"""

Kind = Literal["dense", "fused", "qkv", "embedding", "norm", "bias"]
"""Kind of a module.

fused: q, k and v in one matrix. qkv: one of q, k, v, a third of the fused array in Flax.
"""


class Module(NamedTuple):
    """A module of the encoder and its name in each scheme, "" if the scheme has none."""

    path: str
    kind: Kind
    fused: str
    split: str
    bert: str
    qkv_index: int = 0
    adapted: bool = True


def _everywhere(path: str, kind: Kind, name: str, *, adapted: bool = True) -> Module:
    return Module(path, kind, name, name, name, adapted=adapted)


# fmt: off
MODULES = (
    _everywhere("tokens",         "embedding", "embeddings.word_embeddings"),
    _everywhere("token_types",    "embedding", "embeddings.token_type_embeddings"),
    Module("positions",           "embedding", "", "", "embeddings.position_embeddings", adapted=False),
    Module("embed_norm",          "norm",      "emb_ln", "embeddings.LayerNorm", "embeddings.LayerNorm"),
    _everywhere("pooler",         "dense",     "pooler.dense"),
    _everywhere("mlm_head.dense", "dense",     "lm_head.dense", adapted=False),
    _everywhere("mlm_head.norm",  "norm",      "lm_head.layer_norm"),
    _everywhere("mlm_head",       "bias",      "lm_head"),
)

LAYER_PREFIXES: dict[NameScheme, str] = {
    "fused": "encoder.layers.{l}.",
    "split": "layers.{l}.",
    "bert": "encoder.layer.{l}.",
}

LAYER_MODULES = (
    #      path                     kind      fused             split                       bert
    Module("layers.qkv",            "fused",  "mixer.Wqkv",     "",                         ""),
    Module("layers.qkv",            "qkv",   "",               "self_attn.q_proj",         "attention.self.query", 0),
    Module("layers.qkv",            "qkv",   "",               "self_attn.k_proj",         "attention.self.key",   1),
    Module("layers.qkv",            "qkv",   "",               "self_attn.v_proj",         "attention.self.value", 2),
    Module("layers.out",            "dense",  "mixer.out_proj", "self_attn.o_proj",         "attention.output.dense"),
    Module("layers.attention_norm", "norm",   "norm1",          "post_attention_layernorm", "attention.output.LayerNorm"),
    Module("layers.up",             "dense",  "mlp.fc1",        "mlp.fc1",                  "intermediate.dense"),
    Module("layers.down",           "dense",  "mlp.fc2",        "mlp.fc2",                  "output.dense"),
    Module("layers.mlp_norm",       "norm",   "norm2",          "post_mlp_layernorm",       "output.LayerNorm"),
)

IGNORED = {
    "embeddings.position_ids": "a buffer that counts 0, 1, 2, ...",
    "lm_head.decoder.weight": "a copy of the tied embedding table; an error where it differs",
    "lm_head.decoder.bias": "a copy of lm_head.bias; an error where it differs",
    "cls.seq_relationship.weight": "a head that says whether one text follows another; no embedding uses it",
    "cls.seq_relationship.bias": "a head that says whether one text follows another; no embedding uses it",
}
"""Tensors left out on purpose, with the reason. Those in TIED are compared first."""

TIED = {
    "lm_head.decoder.weight": "embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}
# fmt: on

_BERT_HEAD = {
    "cls.predictions.transform.dense.": "lm_head.dense.",
    "cls.predictions.transform.LayerNorm.": "lm_head.layer_norm.",
    "cls.predictions.": "lm_head.",
}
"""Beginnings of names of BERT's MLM head, and XLM-RoBERTa's, which computes the same."""

_OLD_NORM = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}
"""Ends of names in the first files of BERT, as TensorFlow had them."""


class Transform(NamedTuple):
    """An invertible change of axes between a tensor and its place in a Flax array."""

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


IDENTITY = Transform(lambda x: x, lambda x: x)
TRANSPOSE = Transform(np.transpose, np.transpose)  # [o, i] <-> [i, o]
FUSED_KERNEL = Transform(  # [3 o, i] <-> [i, 3, o]
    lambda x: x.reshape(3, -1, x.shape[1]).transpose(2, 0, 1),
    lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
)
FUSED_BIAS = Transform(lambda x: x.reshape(3, -1), lambda x: x.reshape(-1))  # [3 o] <-> [3, o]
# [k, v, r] <-> [v, k, r]
TASKS_SECOND = Transform(lambda x: x.transpose(1, 0, 2), lambda x: x.transpose(1, 0, 2))
# [k, r, i] <-> [i, k, r]
TASKS_INNER = Transform(lambda x: x.transpose(2, 0, 1), lambda x: x.transpose(1, 2, 0))
# [k, o, r] <-> [k, r, o]
RANK_SECOND = Transform(lambda x: x.transpose(0, 2, 1), lambda x: x.transpose(0, 2, 1))
FUSED_UP = Transform(  # [k, 3 o, r] <-> [k, r, 3, o]
    lambda x: x.reshape(x.shape[0], 3, -1, x.shape[2]).transpose(0, 3, 1, 2),
    lambda x: x.transpose(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]),
)

# kind -> (tensor, array, transform). One of q, k, v fills its third of the array: `_qkv_place`.
TENSORS: dict[Kind, tuple[tuple[str, str, Transform], ...]] = {
    "dense": (("weight", "kernel", TRANSPOSE), ("bias", "bias", IDENTITY)),
    "qkv": (("weight", "kernel", TRANSPOSE), ("bias", "bias", IDENTITY)),
    "fused": (("weight", "kernel", FUSED_KERNEL), ("bias", "bias", FUSED_BIAS)),
    "embedding": (("weight", "table", IDENTITY),),
    "norm": (("weight", "scale", IDENTITY), ("bias", "bias", IDENTITY)),
    "bias": (("bias", "bias", IDENTITY),),
}

# The update of an embedding is A @ B, that of a dense layer B @ A. The ".0." in their names is the
# index of the parametrization, not of a task.
STACKED_ADAPTERS: dict[Kind, tuple[tuple[str, str, Transform], ...]] = {
    "dense": (("lora_A", "a", TASKS_INNER), ("lora_B", "b", RANK_SECOND)),
    "fused": (("lora_A", "a", TASKS_INNER), ("lora_B", "b", FUSED_UP)),
    "embedding": (("lora_A", "a", TASKS_SECOND), ("lora_B", "b", IDENTITY)),
}
PEFT_ADAPTERS: dict[Kind, tuple[tuple[str, str, Transform], ...]] = {
    "dense": (("lora_A.weight", "a", TRANSPOSE), ("lora_B.weight", "b", TRANSPOSE)),
    "qkv": (("lora_A.weight", "a", TRANSPOSE), ("lora_B.weight", "b", TRANSPOSE)),
    "embedding": (("lora_embedding_A", "a", TRANSPOSE), ("lora_embedding_B", "b", TRANSPOSE)),
}

Index = tuple[int | slice, ...]
EVERY = slice(None)


class TensorMapping(NamedTuple):
    """One line of the table.

    The tensor, after `transform`, is `array[place]` of the Flax array at `path`.
    """

    path: str
    place: Index
    transform: Transform

    def tensor_shape(self, array_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the PyTorch tensor, given the shape of the full Flax array."""
        return self.transform.to_torch(np.broadcast_to(np.zeros(()), array_shape)[self.place]).shape

    def fill(self, array: np.ndarray, tensor: np.ndarray) -> None:
        """Writes the tensor to its place; an adapter of smaller rank fills the leading entries."""
        value, target = self.transform.to_flax(tensor), array[self.place]
        target[tuple(slice(size) for size in value.shape)] = value

    def extract(self, array: np.ndarray) -> np.ndarray:
        """Returns the PyTorch tensor, contiguous."""
        return np.ascontiguousarray(self.transform.to_torch(array[self.place]))


def base_mappings(config: ModelConfig, scheme: NameScheme, *, parametrized: bool = False) -> dict[str, TensorMapping]:
    """Mappings of every tensor of the base model, by tensor name without a `roberta.` prefix.

    Args:
        config: of the model.
        scheme: scheme of the names.
        parametrized: adapted weights are named `parametrizations.weight.original`, as in the
            original with adapters.
    """
    entries = {}
    for module, name, layer in _modules(config, scheme):
        for tensor, leaf, transform in TENSORS[module.kind]:
            if parametrized and tensor == "weight" and module.adapted and module.kind in STACKED_ADAPTERS:
                tensor = "parametrizations.weight.original"
            index = layer + (_qkv_place(leaf, module.qkv_index) if module.kind == "qkv" else ())
            entries[f"{name}.{tensor}"] = TensorMapping(f"{module.path}.{leaf}", index, transform)
    return entries


def stacked_adapter_mappings(config: ModelConfig) -> dict[str, TensorMapping]:
    """Mappings of the original's adapters: one tensor for all tasks; q, k, v share a `lora_A`."""
    entries = {}
    for module, name, layer in _modules(config, "fused"):
        if not module.adapted:
            continue
        for tensor, leaf, transform in STACKED_ADAPTERS.get(module.kind, ()):
            shared = (EVERY, 0) if module.kind == "fused" and leaf == "a" else ()
            entry = TensorMapping(f"{module.path}.{leaf}", layer + shared, transform)
            entries[f"{name}.parametrizations.weight.0.{tensor}"] = entry
    return entries


def peft_adapter_mappings(config: ModelConfig, task: int, scheme: NameScheme) -> dict[str, TensorMapping]:
    """Mappings of one task's PEFT adapter, by tensor name without `base_model.model.`."""
    entries = {}
    for module, name, layer in _modules(config, scheme):
        if not module.adapted:
            continue
        for tensor, leaf, transform in PEFT_ADAPTERS.get(module.kind, ()):
            if leaf == "b":
                index = (task, EVERY, module.qkv_index) if module.kind == "qkv" else (task,)
            elif module.kind == "qkv":
                index = (EVERY, module.qkv_index if config.separate_qkv_adapters else 0, task)
            else:
                index = (EVERY, task)
            entries[f"{name}.{tensor}"] = TensorMapping(f"{module.path}.{leaf}", layer + index, transform)
    return entries


def standard_name(name: str) -> str:
    """Name of a tensor in the table, without the prefix of its family: the MLM head's is
    XLM-RoBERTa's, `bert.` and `roberta.` are left out."""
    for old, new in _OLD_NORM.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    for bert, standard in _BERT_HEAD.items():
        if name.startswith(bert):
            return standard + name.removeprefix(bert)
    return name.removeprefix("roberta.").removeprefix("bert.")


def family_name(name: str, family: Literal["roberta", "bert"]) -> str:
    """Name of a tensor with the prefix of its family: the inverse of `standard_name`."""
    if not name.startswith("lm_head."):
        return f"{family}.{name}"
    if family == "roberta":
        return name
    bert, standard = next((bert, standard) for bert, standard in _BERT_HEAD.items() if name.startswith(standard))
    return bert + name.removeprefix(standard)


def standard_module_name(name: str) -> str:
    """Name of a module in the split (or bert) scheme, given in any mixture of schemes.

    Published adapters have such mixtures: `encoder.layers.3.mixer.out_proj` ->
    `layers.3.self_attn.o_proj`. Names outside the layers are returned unchanged.
    """
    for scheme in ("fused", "split"):
        prefix, _, suffix = LAYER_PREFIXES[scheme].partition("{l}")
        layer, dot, rest = name.removeprefix(prefix).partition(suffix)
        if name.startswith(prefix) and layer.isdecimal() and dot:
            names = {module.fused: module.split for module in LAYER_MODULES if module.fused and module.split}
            for fused, split in names.items():
                if rest == fused or rest.startswith(fused + "."):
                    rest = split + rest.removeprefix(fused)
                    break
            return LAYER_PREFIXES["split"].format(l=layer) + rest
    return name


def qkv_names(name: str) -> tuple[str, ...]:
    """Names of q, k and v in the split scheme, of a name of the fused projection or in it.

    Any other name is returned alone.
    """
    fused = next(module.fused for module in LAYER_MODULES if module.kind == "fused")
    before, found, after = name.partition(f".{fused}.")
    if not found:
        return (name,)
    return tuple(f"{before}.{module.split}.{after}" for module in LAYER_MODULES if module.kind == "qkv")


def _modules(config: ModelConfig, scheme: NameScheme) -> Iterator[tuple[Module, str, Index]]:
    """Yields (module, its name, index of its layer) for a configuration and a scheme."""
    present = {"positions": config.position_type == "absolute", "pooler": config.pooler, "mlm_head": config.mlm_head}
    for module in MODULES:
        if (name := getattr(module, scheme)) and present.get(module.path.split(".")[0], True):
            yield module, name, ()
    for layer in range(config.num_layers):
        for module in LAYER_MODULES:
            if name := getattr(module, scheme):
                yield module, LAYER_PREFIXES[scheme].format(l=layer) + name, (layer,)


def _qkv_place(leaf: str, qkv_index: int) -> Index:
    """Index of q, k or v in the kernel [i, 3, o] or the bias [3, o]."""
    return (EVERY, qkv_index) if leaf == "kernel" else (qkv_index,)

"""Split of a model's parameters into those that a stage trains and those that it only uses."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from flax import nnx
from jax import Array

from jina_jax.config import ModelConfig
from jina_jax.model.adapters import base_arrays, extract_adapters, replace_adapters
from jina_jax.model.encoder import Encoder
from jina_jax.model.frozen_base import DENSE
from jina_jax.model.lora import AdapterParam
from jina_jax.model.parameters import Arrays, abstract_variables, from_arrays
from jina_jax.parallel.fsdp import pad_vocabulary, unpad_vocabulary

from ..config import Stage


class TrainableSplit(NamedTuple):
    """A stage's model, by path: the arrays that it trains, and those that it only uses."""

    config: ModelConfig
    trained: Arrays
    frozen: Arrays


def split_trainable(encoder: Encoder, stage: Stage) -> TrainableSplit:
    """Splits the encoder, with the stage's adapters only, into trained and frozen arrays.

    The vocabulary is padded, whatever the mesh, so that checkpoints fit every other mesh.
    """
    config = replace(encoder.config, tasks=stage.adapters)
    arrays = base_arrays(encoder) | (extract_adapters(encoder, stage.adapters) if stage.adapters else {})
    trained = {}
    for path, variable in abstract_variables(config).items():
        # Embeddings do not use the pooler, but weight decay would shrink it.
        unused = path.startswith("pooler.")
        if isinstance(variable, AdapterParam if stage.adapters else nnx.Param) and not unused:
            trained[path] = arrays.pop(path)
    return TrainableSplit(config, pad_vocabulary(trained), pad_vocabulary(arrays))


def ready_to_fold(frozen: Arrays, stage: Stage, dtype: str) -> Arrays:
    """Casts the kernels that a stage's adapters are folded into to the compute dtype.

    Folding does this first: here it is done once, and not in every step.
    """
    kernels = {f"layers.{name}.kernel" for name in DENSE} if stage.adapters else set()
    return {path: x.astype(dtype) if path in kernels else x for path, x in frozen.items()}


def merge_trained(encoder: Encoder, stage: Stage, trained: Mapping[str, Array]) -> Encoder:
    """Returns the model after a stage; the inverse of `split_trainable`."""
    if stage.adapters:
        return replace_adapters(encoder, stage.adapters, trained)
    arrays = base_arrays(encoder) | unpad_vocabulary(trained, encoder.config)
    return from_arrays(encoder.config, arrays, dtype=encoder.dtype)

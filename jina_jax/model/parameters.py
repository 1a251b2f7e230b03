"""The parameters of an encoder by their path, and encoders made of given arrays."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from ..config import ModelConfig
from .device import platform
from .encoder import Encoder


def abstract_variables(config: ModelConfig) -> dict[str, nnx.Variable]:
    """Every variable of a model by its path ("layers.qkv.kernel"), with shapes and without arrays."""
    return _by_path(nnx.state(_abstract(config, jnp.float32)))


def variables(encoder: Encoder) -> dict[str, nnx.Variable]:
    """Every variable of an encoder by its path."""
    return _by_path(nnx.state(encoder))


def from_arrays(config: ModelConfig, arrays: Mapping[str, Array], *, dtype: DTypeLike) -> Encoder:
    """An encoder made of given arrays by path; `dtype` is that of the computation."""
    for path, variable in abstract_variables(config).items():
        if variable.shape != arrays[path].shape:
            raise ValueError(f"{path} is {arrays[path].shape}, should be {variable.shape}")
    return from_local_arrays(config, arrays, dtype=dtype)


def from_local_arrays(config: ModelConfig, arrays: Mapping[str, Array], *, dtype: DTypeLike) -> Encoder:
    """`from_arrays` for arrays whose shapes may differ: a device's parts of them, or a padded vocabulary."""
    graphdef, state = nnx.split(_abstract(config, dtype))
    for path, variable in _by_path(state).items():
        variable.set_value(arrays[path])
    return nnx.merge(graphdef, state)


def _abstract(config: ModelConfig, dtype: DTypeLike) -> Encoder:
    return nnx.eval_shape(lambda: Encoder(config, dtype=dtype, rngs=nnx.Rngs(0)))


def _by_path(state: nnx.State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def unstack_layers(encoder: Encoder) -> Encoder:
    """The same on CPU with a list of layers, whose parameters lie in the memory of the stacked ones.

    A product of XLA on CPU reads a layer of a stack from a copy that is made before: a single query would be copies for the
    most part. Programs for accelerators read it where it is, and `encoder` itself is returned.
    """
    if platform() != "cpu":
        return encoder
    apart = nnx.merge(*nnx.split(encoder))  # variables of its own
    stacked = jax.tree.map(np.asarray, encoder.layers)
    layers = [jax.tree.map(lambda array, i=i: array[i], stacked) for i in range(encoder.config.num_layers)]
    apart.layers = nnx.List(jax.device_put(layers, may_alias=True))
    return apart


Arrays = dict[str, Array]

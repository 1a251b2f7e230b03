"""Parameters of an encoder by path, and encoders built from given arrays."""

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
    """Variables of a model by path ("layers.qkv.kernel"), with shapes and without arrays."""
    return _by_path(nnx.state(_abstract(config, jnp.float32)))


def variables(encoder: Encoder) -> dict[str, nnx.Variable]:
    """Variables of an encoder by path."""
    return _by_path(nnx.state(encoder))


def from_arrays(config: ModelConfig, arrays: Mapping[str, Array], *, dtype: DTypeLike) -> Encoder:
    """Builds an encoder from arrays by path; it computes in `dtype`.

    Raises:
        ValueError: an array does not have the shape of its variable.
    """
    for path, variable in abstract_variables(config).items():
        if variable.shape != arrays[path].shape:
            raise ValueError(f"{path} is {arrays[path].shape}, should be {variable.shape}")
    return from_local_arrays(config, arrays, dtype=dtype)


def from_local_arrays(config: ModelConfig, arrays: Mapping[str, Array], *, dtype: DTypeLike) -> Encoder:
    """`from_arrays` for arrays of other shapes: a device's shards, or a padded vocabulary."""
    graphdef, state = nnx.split(_abstract(config, dtype))
    for path, variable in _by_path(state).items():
        variable.set_value(arrays[path])
    return nnx.merge(graphdef, state)


def _abstract(config: ModelConfig, dtype: DTypeLike) -> Encoder:
    return nnx.eval_shape(lambda: Encoder(config, dtype=dtype, rngs=nnx.Rngs(0)))


def _by_path(state: nnx.State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def unstack_layers(encoder: Encoder) -> Encoder:
    """Turns the stacked layers into a list of layers that lie in the same memory, on CPU.

    XLA's matmuls on CPU read a layer of a stack from a copy made beforehand: a single query
    would consist mostly of copies. Programs for accelerators read the layer in place, and there
    `encoder` itself is returned.
    """
    if platform() != "cpu":
        return encoder
    apart = nnx.merge(*nnx.split(encoder))  # separate variables
    stacked = jax.tree.map(np.asarray, encoder.layers)
    layers = [jax.tree.map(lambda array, i=i: array[i], stacked) for i in range(encoder.config.num_layers)]
    apart.layers = nnx.List(jax.device_put(layers, may_alias=True))
    return apart


Arrays = dict[str, Array]

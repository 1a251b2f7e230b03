"""Parameters sharded over the `fsdp` axis, for code inside a `shard_map`.

They are gathered before use, and their gradients are summed back into shards.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from ..config import ModelConfig
from ..model.encoder import Layer
from .mesh import AXES, SPLIT, VOCABULARY_MULTIPLE

# ---- inside a shard_map


def all_gather_param(part: Array, axis: int, dtype: DTypeLike) -> Array:
    """Gathers a parameter from its shards on the `fsdp` axis.

    The shards travel in `dtype`; the result has their dtype, with the precision of `dtype`. Its
    gradient is summed over the devices in the shards' dtype, float32, and comes back as shards:
    JAX's transpose would sum in `dtype`.
    """
    return _all_gather_param(part, axis, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather_param(part: Array, axis: int, dtype: DTypeLike) -> Array:
    return jax.lax.all_gather(part.astype(dtype), "fsdp", axis=axis, tiled=True).astype(part.dtype)


def _all_gather_param_forward(part: Array, axis: int, dtype: DTypeLike) -> tuple[Array, None]:
    return _all_gather_param(part, axis, dtype), None


def _all_gather_param_backward(axis: int, dtype: DTypeLike, _: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=axis, tiled=True),)


_all_gather_param.defvjp(_all_gather_param_forward, _all_gather_param_backward)


def gather_layer(layer: Layer, dtype: DTypeLike) -> Layer:
    """Gathers the kernels of one layer; for the encoder's `gather`."""
    graphdef, state = nnx.split(layer)
    for names, variable in nnx.to_flat_state(state):
        axis = SPLIT.get(".".join(("layers", *map(str, names))))
        if axis is not None:  # SPLIT counts the layer axis, which one layer does not have
            variable.set_value(all_gather_param(variable.get_value(), axis - 1, dtype))
    return nnx.merge(graphdef, state)


def gather_outside_layers(arrays: Mapping[str, Array], dtype: DTypeLike) -> dict[str, Array]:
    """Gathers the parameters outside the layers; returns all parameters by path."""
    outside = {path: SPLIT[path] for path in arrays if path in SPLIT and not path.startswith("layers.")}
    return dict(arrays) | {path: all_gather_param(arrays[path], axis, dtype) for path, axis in outside.items()}


def sum_gradients(gradients: Mapping[str, Array]) -> dict[str, Array]:
    """Sums the gradients over the devices.

    Those of sharded parameters are summed over `fsdp` already, see `all_gather_param`.
    """
    split = {path for path in gradients if path in SPLIT}
    summed = jax.lax.psum({path: x for path, x in gradients.items() if path not in split}, AXES)
    return summed | jax.lax.psum({path: gradients[path] for path in split}, "data")


def global_norm(arrays: Mapping[str, Array]) -> Array:
    """Global L2 norm of parameters, sharded and replicated alike, in float32."""
    squares = {path: jnp.square(x.astype(jnp.float32)).sum() for path, x in arrays.items()}
    split = jax.lax.psum(sum((x for path, x in squares.items() if path in SPLIT), jnp.zeros(())), "fsdp")
    return jnp.sqrt(split + sum((x for path, x in squares.items() if path not in SPLIT), jnp.zeros(())))


# ---- the vocabulary


PADDING = {"tokens.table": 0.0, "mlm_head.bias": -1e30}
"""Padding value of each array over the vocabulary."""


def pad_vocabulary(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Pads the vocabulary to a multiple of 256: zero rows in the table, -1e30 in the MLM bias.

    The bias keeps the padding from being predicted. Training does not change the padding.
    """
    padded = dict(arrays)
    for path, value in PADDING.items():
        if path in arrays:
            missing = -arrays[path].shape[0] % VOCABULARY_MULTIPLE
            widths = [(0, missing)] + [(0, 0)] * (arrays[path].ndim - 1)
            padded[path] = jnp.pad(arrays[path], widths, constant_values=value)
    return padded


def unpad_vocabulary(arrays: Mapping[str, Array], config: ModelConfig) -> dict[str, Array]:
    """Removes the padding of `pad_vocabulary`."""
    padded = {path: arrays[path][: config.vocab_size] for path in PADDING if path in arrays}
    return dict(arrays) | padded

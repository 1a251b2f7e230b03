"""Parameters split over the `fsdp` axis, inside a `shard_map`: gathered before use, their gradients summed back."""

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
    """A parameter made whole from the parts on the `fsdp` axis, in the part's own dtype but with the precision of `dtype`.

    It travels in `dtype`. Its gradient is summed over the devices in the part's dtype, float32, and comes back as parts:
    the transpose that JAX knows would sum in `dtype`.
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
    """One layer with its kernels whole; for the encoder's `gather`."""
    graphdef, state = nnx.split(layer)
    for names, variable in nnx.to_flat_state(state):
        axis = SPLIT.get(".".join(("layers", *map(str, names))))
        if axis is not None:  # the axis of layers is gone
            variable.set_value(all_gather_param(variable.get_value(), axis - 1, dtype))
    return nnx.merge(graphdef, state)


def gather_outside_layers(arrays: Mapping[str, Array], dtype: DTypeLike) -> dict[str, Array]:
    """The parameters by path with those outside the layers whole."""
    outside = {path: SPLIT[path] for path in arrays if path in SPLIT and not path.startswith("layers.")}
    return dict(arrays) | {path: all_gather_param(arrays[path], axis, dtype) for path, axis in outside.items()}


def sum_gradients(gradients: Mapping[str, Array]) -> dict[str, Array]:
    """The devices' gradients added up. Those of split parameters are summed over `fsdp` already, see `all_gather_param`."""
    split = {path for path in gradients if path in SPLIT}
    summed = jax.lax.psum({path: x for path, x in gradients.items() if path not in split}, AXES)
    return summed | jax.lax.psum({path: gradients[path] for path in split}, "data")


def global_norm(arrays: Mapping[str, Array]) -> Array:
    """Square root of the sum of all squares of parameters, parts and whole ones alike, in float32."""
    squares = {path: jnp.square(x.astype(jnp.float32)).sum() for path, x in arrays.items()}
    split = jax.lax.psum(sum((x for path, x in squares.items() if path in SPLIT), jnp.zeros(())), "fsdp")
    return jnp.sqrt(split + sum((x for path, x in squares.items() if path not in SPLIT), jnp.zeros(())))


# ---- the vocabulary


PADDING = {"tokens.table": 0.0, "mlm_head.bias": -1e30}
"""Value of the padding of each array over the vocabulary."""


def pad_vocabulary(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """With rows of zeros behind the table, and a bias that keeps them from being predicted. Training does not change them."""
    padded = dict(arrays)
    for path, value in PADDING.items():
        if path in arrays:
            missing = -arrays[path].shape[0] % VOCABULARY_MULTIPLE
            widths = [(0, missing)] + [(0, 0)] * (arrays[path].ndim - 1)
            padded[path] = jnp.pad(arrays[path], widths, constant_values=value)
    return padded


def unpad_vocabulary(arrays: Mapping[str, Array], config: ModelConfig) -> dict[str, Array]:
    """The inverse of `pad_vocabulary`."""
    padded = {path: arrays[path][: config.vocab_size] for path in PADDING if path in arrays}
    return dict(arrays) | padded

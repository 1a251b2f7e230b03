"""Meshes, and where each array lives on one.

A mesh has two axes: `data`, replicas of the model, and `fsdp`, over which its large parameters and their optimizer state are
split. Batches are split over both. The programs over a mesh are `shard_map`s: inside, a parameter is this device's part, and
`whole` or `gather_layer` make it complete right before it is used.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from ..config import ModelConfig
from ..model.encoder import Layer

AXES = ("data", "fsdp")
BATCH = PartitionSpec(AXES)
"""The first axis of every array of a batch."""

SPLIT = {
    "tokens.table": 0,
    "layers.qkv.kernel": 1,
    "layers.out.kernel": 1,
    "layers.up.kernel": 1,
    "layers.down.kernel": 1,
}
"""Axis of each parameter that is split over `fsdp`: behind the layers, the inputs of a kernel. All other parameters are small:
each device has them whole."""

VOCABULARY_MULTIPLE = 256
"""The vocabulary of a model in training is padded to a multiple of this, so that it divides by the devices."""


def make_mesh(data: int | None = None, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the devices of all processes.

    Args:
        data: replicas; None = as many as there are devices for.
        fsdp: devices that share one copy of the parameters. Neighbours: over several slices or hosts, `data` is the outer axis.
        devices: of which to make it; None = all there are.

    Raises:
        ValueError: there are not as many devices.
    """
    present = list(jax.devices() if devices is None else devices)
    replicas = data or max(len(present) // fsdp, 1)
    needed = replicas * fsdp
    if needed > len(present):
        raise ValueError(f"mesh {replicas} x {fsdp} needs {needed} devices; there are {len(present)}")
    return Mesh(_arranged(present[:needed], replicas, fsdp), AXES)


def _arranged(devices: list[Any], data: int, fsdp: int) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and data % slices == 0:
        return mesh_utils.create_hybrid_device_mesh((data // slices, fsdp), (slices, 1), devices)
    return mesh_utils.create_device_mesh((data, fsdp), devices)


def specs(tree: Any) -> Any:
    """How the leaves of a tree are split. One below the path of a parameter, such as its optimizer state, is split as it is."""

    def spec(keys: tuple[Any, ...], _: Any) -> PartitionSpec:
        axis = split_axis(".".join(str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)))
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "fsdp")

    return jax.tree_util.tree_map_with_path(spec, tree)


def split_axis(path: str) -> int | None:
    """The axis that `fsdp` splits of the parameter or optimizer state at this path, or None."""
    return next((axis for name, axis in SPLIT.items() if path == name or path.endswith("." + name)), None)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """`specs` as shardings over a mesh."""
    return jax.tree.map(partial(NamedSharding, mesh), specs(tree))


def place(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has, on the devices, split as `specs` says."""
    return jax.tree.map(_put, tree, shardings(tree, mesh))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has, whole on every device."""
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, PartitionSpec())), tree)


def split_rows(batch: Any, mesh: Mesh) -> Any:
    """A batch that every process has, split over the devices. What has no axis is on all of them."""
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, BATCH if x.ndim else PartitionSpec())), batch)


def join_rows(batch: Any, mesh: Mesh) -> Any:
    """A batch of which every process has its own rows, split over the devices."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), x), batch)


def _put(x: Any, sharding: NamedSharding) -> Array:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def check_divides(config: ModelConfig, mesh: Mesh) -> None:
    """ValueError where a parameter does not divide by the `fsdp` axis."""
    fsdp = mesh.shape["fsdp"]
    sizes = {"hidden_size": config.hidden_size, "mlp_size": config.mlp_size, "the padded vocabulary": VOCABULARY_MULTIPLE}
    if wrong := [f"{name} {size}" for name, size in sizes.items() if size % fsdp]:
        raise ValueError(f"a mesh with fsdp = {fsdp} needs sizes that it divides; it does not divide {', '.join(wrong)}")


# ---- inside a shard_map


def whole(part: Array, axis: int, dtype: DTypeLike) -> Array:
    """A parameter made whole from the parts on the `fsdp` axis, in the part's own dtype but with the precision of `dtype`.

    It travels in `dtype`. Its gradient is summed over the devices in the part's dtype, float32, and comes back as parts:
    the transpose that JAX knows would sum in `dtype`.
    """
    return _whole(part, axis, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole(part: Array, axis: int, dtype: DTypeLike) -> Array:
    return jax.lax.all_gather(part.astype(dtype), "fsdp", axis=axis, tiled=True).astype(part.dtype)


def _whole_forward(part: Array, axis: int, dtype: DTypeLike) -> tuple[Array, None]:
    return _whole(part, axis, dtype), None


def _whole_backward(axis: int, dtype: DTypeLike, _: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=axis, tiled=True),)


_whole.defvjp(_whole_forward, _whole_backward)


def gather_layer(layer: Layer, dtype: DTypeLike) -> Layer:
    """One layer with its kernels whole; for the encoder's `gather`."""
    graphdef, state = nnx.split(layer)
    for names, variable in nnx.to_flat_state(state):
        axis = SPLIT.get(".".join(("layers", *map(str, names))))
        if axis is not None:  # the axis of layers is gone
            variable.set_value(whole(variable.get_value(), axis - 1, dtype))
    return nnx.merge(graphdef, state)


def gather_outside_layers(arrays: Mapping[str, Array], dtype: DTypeLike) -> dict[str, Array]:
    """The parameters by path with those outside the layers whole."""
    outside = {path: SPLIT[path] for path in arrays if path in SPLIT and not path.startswith("layers.")}
    return dict(arrays) | {path: whole(arrays[path], axis, dtype) for path, axis in outside.items()}


def sum_gradients(gradients: Mapping[str, Array]) -> dict[str, Array]:
    """The devices' gradients added up. Those of split parameters are summed over `fsdp` already, see `whole`."""
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

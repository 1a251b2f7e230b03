"""Device meshes, and the sharding of arrays over them.

A mesh has two axes: `data`, over replicas of the model, and `fsdp`, over which its large parameters
and their optimizer state are sharded. Batches are sharded over both. The programs over a mesh are
`shard_map`s: inside, a parameter is this device's shard, and `all_gather_param` or `gather_layer`
gathers it right before it is used.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..config import ModelConfig

AXES = ("data", "fsdp")
BATCH = PartitionSpec(AXES)
"""Partition spec of every array of a batch: its first axis, over all devices."""

SPLIT = {
    "tokens.table": 0,
    "layers.qkv.kernel": 1,
    "layers.out.kernel": 1,
    "layers.up.kernel": 1,
    "layers.down.kernel": 1,
}
"""Axis of each parameter that is sharded over `fsdp`.

A kernel is sharded by its inputs, behind the layer axis. All other parameters are small and
replicated.
"""

VOCABULARY_MULTIPLE = 256
"""Multiple to which training pads the vocabulary, so that it divides by the devices."""


def make_mesh(data: int | None = None, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh over the devices of all processes.

    Args:
        data: number of replicas; None = as many as there are devices for.
        fsdp: number of devices that share one copy of the parameters. They are neighbours: over
            several slices or hosts, `data` is the outer axis.
        devices: devices to choose from; None = all.

    Raises:
        ValueError: there are too few devices.
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
    """Partition specs of the leaves of a tree.

    A leaf whose path ends in that of a parameter, such as its optimizer state, is sharded like it.
    """

    def spec(keys: tuple[Any, ...], _: Any) -> PartitionSpec:
        axis = split_axis(".".join(str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)))
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "fsdp")

    return jax.tree_util.tree_map_with_path(spec, tree)


def split_axis(path: str) -> int | None:
    """Axis that `fsdp` splits of the parameter or optimizer state at this path, or None."""
    return next((axis for name, axis in SPLIT.items() if path == name or path.endswith("." + name)), None)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of the leaves of a tree over a mesh, from `specs`."""
    return jax.tree.map(partial(NamedSharding, mesh), specs(tree))


def shard_params(tree: Any, mesh: Mesh) -> Any:
    """Shards arrays, which every process has, over the devices as `specs` says."""
    return jax.tree.map(_put, tree, shardings(tree, mesh))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Replicates arrays, which every process has, on every device."""
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, PartitionSpec())), tree)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Shards a batch, which every process has, over the devices; scalars are replicated."""
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, BATCH if x.ndim else PartitionSpec())), batch)


def from_process_local(batch: Any, mesh: Mesh) -> Any:
    """Builds a global batch from the local rows of each process, sharded over the devices."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), x), batch)


def _put(x: Any, sharding: NamedSharding) -> Array:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def check_divides(config: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError if a parameter does not divide by the `fsdp` axis."""
    fsdp = mesh.shape["fsdp"]
    sizes = {"hidden_size": config.hidden_size, "mlp_size": config.mlp_size, "the padded vocabulary": VOCABULARY_MULTIPLE}
    if wrong := [f"{name} {size}" for name, size in sizes.items() if size % fsdp]:
        raise ValueError(f"a mesh with fsdp = {fsdp} needs sizes that it divides; it does not divide {', '.join(wrong)}")

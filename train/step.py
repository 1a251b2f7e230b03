"""One training step of a stage, as one compiled program over the mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jina_jax.config import ModelConfig
from jina_jax.model import from_arrays

from .batches import Batch
from .config import Mesh as MeshSizes
from .config import Stage
from .objectives import objective
from .optimizer import optimizer
from .start import Arrays

AXES = ("data", "fsdp")
"""The batch is split over both."""


class State(NamedTuple):
    """What a stage changes. Every stage has its own."""

    parameters: Arrays
    optimizer: Any


class Metrics(NamedTuple):
    """Scalars of one step, over all devices."""

    loss: Array
    grad_norm: Array
    """Before clipping."""


Step = Callable[[State, Arrays, Batch], tuple[State, Metrics]]


def make_mesh(sizes: MeshSizes) -> Mesh:
    """ValueError where there are not as many devices as the mesh has."""
    present = jax.devices()
    data = sizes.data or len(present) // sizes.fsdp
    needed = data * sizes.fsdp
    if needed > len(present):
        raise ValueError(f"mesh {data} x {sizes.fsdp} needs {needed} devices; there are {len(present)}")
    return Mesh(np.array(present[:needed]).reshape(data, sizes.fsdp), AXES)


def place(batch: Batch, mesh: Mesh) -> Batch:
    """A host's batch on its devices."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(AXES)))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Arrays on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


@jax.jit
def all_finite(tree: Any) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def initial_state(stage: Stage, trained: Arrays) -> State:
    """The parameters, copied since a step takes them over, and the optimizer's beginning."""
    parameters = jax.tree.map(jnp.copy, trained)
    return State(parameters, optimizer(stage).init(parameters))


def make_step(stage: Stage, kind: str, config: ModelConfig, dtype: str, mesh: Mesh) -> Step:
    """The compiled step of a stage on batches of one record kind.

    Args:
        stage: what is trained.
        kind: record kind of the batches.
        config: of the stage's model, see `start.Parts`.
        dtype: of the computation; parameters, gradients and optimizer are float32.
        mesh: the batch is split over it, parameters are replicated.

    Returns:
        (state, frozen arrays, batch) -> (new state, metrics). It takes the state's buffers over.
    """
    loss_share, transform = objective(stage, kind, AXES), optimizer(stage)

    def step(state: State, frozen: Arrays, batch: Batch) -> tuple[State, Metrics]:
        def loss(parameters: Arrays) -> Array:
            return loss_share(from_arrays(config, frozen | parameters, dtype=dtype), batch)

        # The shares are summed after the gradient: inside it, the transpose of psum would be another psum.
        share, gradients = jax.value_and_grad(loss)(state.parameters)
        gradients = jax.lax.psum(gradients, AXES)
        updates, optimizer_state = transform.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        return State(parameters, optimizer_state), Metrics(jax.lax.psum(share, AXES), optax.tree.norm(gradients))  # type: ignore[arg-type]

    whole, split = PartitionSpec(), PartitionSpec(AXES)
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(whole, whole, split), out_specs=(whole, whole), check_vma=False)
    return jax.jit(sharded, donate_argnums=0)

"""One training step of a stage, as one compiled program over the mesh."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jina_jax.config import ModelConfig
from jina_jax.model.device import compiler_options
from jina_jax.model.parameters import Arrays, from_local_arrays
from jina_jax.parallel import fsdp
from jina_jax.parallel.mesh import AXES, BATCH, check_divides, shard_params, shardings, specs

from ..config import Stage
from ..data.collate import TrainBatch
from .objectives import objective
from .optimizer import clipped, optimizer


class State(NamedTuple):
    """Arrays that the steps of a stage change. Each stage has a separate state."""

    parameters: Arrays
    optimizer: Any


class Metrics(NamedTuple):
    """Scalars of one step, over all devices."""

    loss: Array
    grad_norm: Array
    """Norm of the gradient before clipping."""
    tokens: Array


Step = Callable[[State, Arrays, TrainBatch], tuple[State, Metrics]]


@jax.jit
def all_finite(tree: Any) -> Array:
    """Returns whether all elements of all arrays are finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def abstract_state(stage: Stage, trained: Mapping[str, Any]) -> State:
    """Shapes of a stage's state, from its parameters or their shapes."""
    shapes = jax.eval_shape(dict, trained)
    return State(shapes, jax.eval_shape(optimizer(stage).init, shapes))


def initial_state(stage: Stage, trained: Arrays, mesh: Mesh) -> State:
    """Parameters and initial optimizer state on the mesh.

    The parameters are copied, since a step takes over its state's buffers.
    """
    parameters = shard_params(jax.tree.map(jnp.copy, trained), mesh)
    begin = jax.jit(optimizer(stage).init, out_shardings=shardings(abstract_state(stage, trained).optimizer, mesh))
    return State(parameters, begin(parameters))


def make_step(stage: Stage, kind: str, config: ModelConfig, dtype: str, mesh: Mesh) -> Step:
    """Returns the compiled step of a stage on batches of one record kind.

    Args:
        stage: stage to train; `memory.fitted_step` chooses what it leaves to the program.
        kind: record kind of the batches.
        config: configuration of the stage's model, see `trainable_split.TrainableSplit`.
        dtype: compute dtype; parameters, gradients and optimizer state are float32.
        mesh: the batch is split over it, and large parameters over its `fsdp` axis.

    Returns:
        Function (state, frozen arrays, batch) -> (new state, metrics). It takes over the state's
        buffers.

    Raises:
        ValueError: the stage leaves `encode_chunk_rows` or `remat` to the program; or a parameter
            does not divide by the `fsdp` axis.
    """
    if stage.leaves_memory_open:
        raise ValueError(f"stage {stage.name} leaves encode_chunk_rows or remat open")
    check_divides(config, mesh)
    split = mesh.shape["fsdp"] > 1
    # Without remat the backward pass would keep the gathered kernels of all layers, all at once.
    if split:
        stage = replace(stage, remat="full" if stage.remat == "none" else stage.remat)
    gather = partial(fsdp.gather_layer, dtype=dtype) if split else None
    loss_share, transform = objective(stage, kind, AXES, gather), optimizer(stage)

    def step(state: State, frozen: Arrays, batch: TrainBatch) -> tuple[State, Metrics]:
        def local_loss(parameters: Arrays) -> Array:
            arrays = frozen | parameters
            if split:
                arrays = fsdp.gather_outside_layers(arrays, dtype)
            return loss_share(from_local_arrays(config, arrays, dtype=dtype), batch)

        # Local losses are summed after the gradient: inside it, the transpose of psum would be
        # another psum.
        share, gradients = jax.value_and_grad(local_loss)(state.parameters)
        gradients = fsdp.sum_gradients(gradients)
        norm = fsdp.global_norm(gradients)
        updates, optimizer_state = transform.update(clipped(gradients, norm, stage), state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        loss, tokens = jax.lax.psum((share, sum((part.segment_ids > 0).sum() for part in batch.parts)), AXES)
        return State(parameters, optimizer_state), Metrics(loss, norm, tokens)  # type: ignore[arg-type]

    def compiled(state: State, frozen: Arrays, batch: TrainBatch) -> tuple[State, Metrics]:
        state_specs = specs(state)
        over_mesh = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(state_specs, specs(frozen), BATCH),
            out_specs=(state_specs, PartitionSpec()),
            check_vma=False,
        )
        return over_mesh(state, frozen, batch)

    return jax.jit(compiled, donate_argnums=0, compiler_options=compiler_options(mesh.devices.flat[0].device_kind))

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
from jina_jax.model.parameters import Arrays, from_local_arrays
from jina_jax.parallel import fsdp
from jina_jax.parallel.mesh import AXES, BATCH, check_divides, shard_params, shardings, specs

from ..config import Stage
from ..data.collate import TrainBatch
from .objectives import objective
from .optimizer import clipped, optimizer


class State(NamedTuple):
    """What a stage changes. Every stage has its own."""

    parameters: Arrays
    optimizer: Any


class Metrics(NamedTuple):
    """Scalars of one step, over all devices."""

    loss: Array
    grad_norm: Array
    """Before clipping."""
    tokens: Array


Step = Callable[[State, Arrays, TrainBatch], tuple[State, Metrics]]


@jax.jit
def all_finite(tree: Any) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def abstract_state(stage: Stage, trained: Mapping[str, Any]) -> State:
    """The shapes of a stage's state, from its parameters or their shapes."""
    shapes = jax.eval_shape(dict, trained)
    return State(shapes, jax.eval_shape(optimizer(stage).init, shapes))


def initial_state(stage: Stage, trained: Arrays, mesh: Mesh) -> State:
    """The parameters on the mesh, copied since a step takes them over, and the optimizer's beginning."""
    parameters = shard_params(jax.tree.map(jnp.copy, trained), mesh)
    begin = jax.jit(optimizer(stage).init, out_shardings=shardings(abstract_state(stage, trained).optimizer, mesh))
    return State(parameters, begin(parameters))


def make_step(stage: Stage, kind: str, config: ModelConfig, dtype: str, mesh: Mesh) -> Step:
    """The compiled step of a stage on batches of one record kind.

    Args:
        stage: what is trained.
        kind: record kind of the batches.
        config: of the stage's model, see `start.Parts`.
        dtype: of the computation; parameters, gradients and optimizer are float32.
        mesh: the batch is split over it, and large parameters over its `fsdp` axis.

    Returns:
        (state, frozen arrays, batch) -> (new state, metrics). It takes the state's buffers over.
    """
    check_divides(config, mesh)
    split = mesh.shape["fsdp"] > 1
    if split:  # kept for the backward pass, every layer's kernels would be there whole, and all at once
        stage = replace(stage, remat="full" if stage.remat == "none" else stage.remat)
    gather = partial(fsdp.gather_layer, dtype=dtype) if split else None
    loss_share, transform = objective(stage, kind, AXES, gather), optimizer(stage)

    def step(state: State, frozen: Arrays, batch: TrainBatch) -> tuple[State, Metrics]:
        def local_loss(parameters: Arrays) -> Array:
            arrays = frozen | parameters
            if split:
                arrays = fsdp.gather_outside_layers(arrays, dtype)
            return loss_share(from_local_arrays(config, arrays, dtype=dtype), batch)

        # The shares are summed after the gradient: inside it, the transpose of psum would be another psum.
        share, gradients = jax.value_and_grad(local_loss)(state.parameters)
        gradients = fsdp.sum_gradients(gradients)
        norm = fsdp.global_norm(gradients)
        updates, optimizer_state = transform.update(clipped(gradients, norm, stage), state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        loss, tokens = jax.lax.psum((share, (batch.segment_ids > 0).sum()), AXES)
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

    return jax.jit(compiled, donate_argnums=0)

"""How a step fits the memory: the rows that it encodes at once, and what it recomputes.

A stage may leave both to the program ("auto"). For each shape of its batches, ways to run the step
are then compiled, those of the fewest operations first, until one fits by the compiler's account.
"""

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jina_jax.config import ModelConfig, Remat
from jina_jax.errors import JinaJaxError
from jina_jax.model.parameters import Arrays

from ..config import Stage
from ..data.collate import TrainBatch
from .chips import GIB
from .update import Metrics, State, Step, make_step

logger = logging.getLogger(__name__)

REMATS: tuple[Remat, ...] = ("except_products", "except_attention", "full")
TPU_REMATS = REMATS[1:]
"""Kinds that the program chooses from, those that recompute the least first.

On TPU, keeping the results of matmuls takes as long as recomputing them, since the loop over the
layers copies them into its stack and out of it (classification on 16 v5e, by the compiler's
estimate: 0.4 % less with queries, keys and values kept, 11 % more with the MLP's hidden states).
"""

USABLE = 0.95
"""Fraction of a device's memory that a step may take; batches and other stages need some."""

HOST_SHARE = 0.75
"""Fraction of the machine's memory that steps on CPUs may take."""

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Linux's file of a container's limit: bytes, or "max"."""

Result = TypeVar("Result")


class DoesNotFit(JinaJaxError):
    """A step needs more memory than a device has."""


class Plan(NamedTuple):
    """One way to run a step: fields of a stage that leave its loss as it is, but for rounding."""

    encode_chunk_rows: int | None
    remat: Remat


def with_plan(stage: Stage, plan: Plan) -> Stage:
    return replace(stage, **plan._asdict())


def plans(stage: Stage, rows: Sequence[int], config: ModelConfig, dtype: str, room: int, *, on_tpu: bool) -> list[Plan]:
    """Returns the ways to run a stage's step, those of the fewest operations first.

    Those whose kept activations alone take more than the room are left out, except the last, which
    needs the least. With the loss of a batch's embeddings, chunks cost one more forward pass, as
    much as everything that can be recomputed; with MLM they cost nothing.

    Args:
        stage: what it does not leave to the program is the same in all.
        rows: of each part of the batch, on a device.
        config: of the model.
        dtype: compute dtype.
        room: bytes of a device that the step's arguments leave.
        on_tpu: the device is a TPU.
    """
    remats = (stage.remat,) if stage.remat != "auto" else TPU_REMATS if on_tpu else REMATS
    if stage.encode_chunk_rows != "auto":
        found = [Plan(stage.encode_chunk_rows, remat) for remat in remats]
    else:
        halves = range(1, max(rows).bit_length())
        chunked = [Plan(-(-max(rows) // 2**i), remats[0]) for i in halves] + [Plan(1, remats[-1])]
        whole = [Plan(None, remat) for remat in remats]
        found = [whole[0], *chunked] if stage.objective == "mlm" else [*whole, *chunked]
    fitting = [plan for plan in found[:-1] if kept_bytes(plan, stage, rows, config, dtype) <= room]
    return [*fitting, found[-1]]


def kept_bytes(plan: Plan, stage: Stage, rows: Sequence[int], config: ModelConfig, dtype: str) -> int:
    """Bytes that a step has to keep on each device, at the least: activations of all layers, one
    layer's hidden states in float32, and the kernels that adapters are folded into."""
    d, f, size = config.hidden_size, config.mlp_size, jnp.dtype(dtype).itemsize
    widths = {"except_attention": 2 * d, "full": d}
    tokens = stage.row_length * (min(plan.encode_chunk_rows, max(rows)) if plan.encode_chunk_rows else sum(rows))
    kernels = config.num_layers * (4 * d * d + 2 * d * f) if stage.adapters else 0
    return tokens * (config.num_layers * widths.get(plan.remat, 6 * d + f) * size + 4 * f) + kernels * size


def first_fitting(candidates: Sequence[Plan], compile_: Callable[[Plan], Result]) -> tuple[Plan, Result]:
    """Returns the first plan that compiles, and what came of it.

    Args:
        candidates: from `plans`.
        compile_: raises DoesNotFit where the program does not fit.

    Raises:
        DoesNotFit: the last plan does not fit either.
    """
    for plan in candidates[:-1]:
        try:
            return plan, compile_(plan)
        except DoesNotFit as error:
            logger.info("%s: %s", plan, error)
    return candidates[-1], compile_(candidates[-1])


def fitted_step(stage: Stage, kind: str, config: ModelConfig, dtype: str, mesh: Mesh) -> Step:
    """Returns a stage's step, as `make_step` does, that fits the memory of the mesh's devices.

    A batch of another shape is planned anew. The plan depends on the shape, the mesh and the
    devices alone, so a run that resumes on equal devices has the same.

    Raises:
        DoesNotFit: at a step that no plan makes small enough.
    """
    if not stage.leaves_memory_open:
        return make_step(stage, kind, config, dtype, mesh)
    programs: dict[tuple[int, ...], Step] = {}

    def step(state: State, frozen: Arrays, batch: TrainBatch) -> tuple[State, Metrics]:
        rows = tuple(part.tokens.shape[0] // mesh.size for part in batch.parts)
        if rows not in programs:
            memory, on_tpu = device_memory(mesh), mesh.devices.flat[0].platform == "tpu"

            def compiled(plan: Plan) -> Step:
                lowered = make_step(with_plan(stage, plan), kind, config, dtype, mesh).lower(state, frozen, batch)  # type: ignore[attr-defined]
                return _compiled_within(lowered, int(USABLE * memory), on_tpu)

            room = int(USABLE * memory) - shard_bytes((state, frozen, batch))
            candidates = plans(stage, rows, config, dtype, room, on_tpu=on_tpu)
            try:
                plan, programs[rows] = first_fitting(candidates, compiled)
            except DoesNotFit as error:
                raise DoesNotFit(
                    f"stage {stage.name}: a step on {sum(rows)} rows of {stage.row_length} {error}; "
                    "set logit_chunk, a smaller batch_size or a larger mesh.fsdp"
                ) from error
            shown, at_once = " + ".join(map(str, rows)), plan.encode_chunk_rows or "all"
            logger.info("stage %s: a step on %s rows encodes %s at once, remat %s", stage.name, shown, at_once, plan.remat)
        return programs[rows](state, frozen, batch)

    return step


def shard_bytes(tree: Any) -> int:
    """Bytes of arrays, or of their shapes with shardings, on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def device_memory(mesh: Mesh) -> int:
    """Bytes of memory of a device, the least of all processes; of a CPU, its share of the machine's
    or the container's."""
    stats = mesh.local_devices[0].memory_stats() or {}
    own = stats.get("bytes_limit") or int(HOST_SHARE * _host_memory()) // len(mesh.local_devices)
    mebibytes = np.int32(own // 2**20)  # JAX's integers have 32 bits
    if jax.process_count() > 1:
        mebibytes = multihost_utils.process_allgather(mebibytes).min()
    return int(mebibytes) * 2**20


def _host_memory() -> int:
    """Bytes of memory of the machine, or of the container that this process is in."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.exists() else "max"
    return machine if limit == "max" else min(machine, int(limit))


def _compiled_within(lowered: Any, limit: int, on_tpu: bool) -> Step:
    """Compiles a program; all processes agree on whether it fits.

    Raises:
        DoesNotFit: it needs more than `limit` bytes of a device, in one of the processes.
    """
    compiled, needed = None, 0
    try:
        compiled = lowered.compile()
        needed = _needed_bytes(compiled.memory_analysis(), on_tpu)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
    fits = compiled is not None and needed <= limit
    if jax.process_count() > 1:
        fits = bool(np.all(multihost_utils.process_allgather(np.array(fits))))
    if not fits or compiled is None:
        of_it = f"{needed / GIB:.2f} GiB" if needed else "more"
        raise DoesNotFit(f"needs {of_it} of the {limit / GIB:.2f} GiB that a device has for it")
    return compiled


def _needed_bytes(stats: Any, on_tpu: bool) -> int:
    """Bytes of a device that a program needs: arguments, results and temporaries."""
    if on_tpu:  # elsewhere, the peak is that of a part of them
        return stats.peak_memory_in_bytes
    return stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes

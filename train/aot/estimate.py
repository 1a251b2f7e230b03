"""Compiles the programs of a configuration for a slice of TPUs.

Says whether they fit, and how long they take.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jina_jax.config import ModelConfig
from jina_jax.embed.forward import text_embeddings
from jina_jax.model.parameters import from_local_arrays
from jina_jax.parallel.mesh import check_divides, make_mesh

from ..config import MeshConfig, Stage, TrainConfig
from ..data.examples import texts_per_example
from ..step.chips import GIB
from ..step.flops import training_flops
from ..step.memory import USABLE, DoesNotFit, Plan, first_fitting, plans, shard_bytes, with_plan
from ..step.trainable_split import TrainableSplit
from ..step.update import make_step
from .abstract_step import abstract_splits, int32_struct, source_sizes, step_arguments
from .compiler import Measurement, Slice, measure
from .topology import Topology

INFERENCE_ROWS = 16
"""Rows of each device in the embedder's program, if the stage has no number of them."""


class Compiled(NamedTuple):
    """One program, the work of one run of it, and its cost."""

    name: str
    tokens: int
    """Tokens of texts of full length, over all devices."""
    flops: float
    """Operations of the model, over all devices; recomputed ones count once."""
    plan: Plan | None = None
    """Way in which a step is run; None for the embedder, and where no way fits."""
    measurement: Measurement | None = None
    """Measured cost; None where the program does not fit."""
    failure: str = ""


def compile_config(
    config: TrainConfig, directory: Path, slice_: Slice, *, inference: bool = False, hlo: Path | None = None
) -> Iterator[Compiled]:
    """Compiles every program of a configuration, or the embedder's alone.

    Each stage has one program for each kind of record.

    Args:
        config: what to compile.
        directory: that of the configuration's file, see `abstract_step.source_sizes`.
        slice_: from `load_topology`.
        inference: compiles the embedder's program, in place of the steps.
        hlo: file for the compiled program's text; of several programs, each has a file with its
            stage and kind in the name.

    Raises:
        ValueError: mesh and devices, or batch and mesh, do not fit, or the model's sizes are not
            known.
    """
    mesh = mesh_for(config.mesh, slice_)
    sizes = source_sizes(config, directory)
    check_divides(sizes, mesh)
    models = abstract_splits(config, sizes)
    if inference:
        yield _compiled_inference(config.stages[0], models[0], mesh, slice_, hlo)
        return
    programs = [
        # All are checked before the first is compiled.
        (stage, kind, model, step_arguments(stage, kind, model, mesh))
        for stage, model in zip(config.stages, models, strict=True)
        for kind in dict.fromkeys(dataset.kind for dataset in stage.datasets)
    ]
    for stage, kind, model, arguments in programs:
        name = stage.name if len({dataset.kind for dataset in stage.datasets}) == 1 else f"{stage.name}, {kind}"
        tokens = stage.batch_size * texts_per_example(stage, kind) * stage.max_length
        file = hlo and (hlo if len(programs) == 1 else hlo.with_stem(f"{hlo.stem}-{stage.name}-{kind}"))
        done = Compiled(name, tokens, training_flops(model.config, stage) * tokens)
        rows = [part.tokens.shape[0] // mesh.size for part in arguments[2].parts]
        room = int(USABLE * slice_.topology.chip.hbm) - shard_bytes(arguments)
        candidates = plans(stage, rows, model.config, config.dtype, room, on_tpu=True)
        measured = partial(_measured, stage, kind, model.config, config.dtype, mesh, arguments, slice_.topology, file)
        try:
            plan, measurement = first_fitting(candidates, measured)
            yield done._replace(plan=plan, measurement=measurement)
        except DoesNotFit as error:
            yield done._replace(failure=f"{error}; {_suggest_fix(stage, config.mesh, mesh.size)}")


def mesh_for(wanted: MeshConfig, slice_: Slice) -> jax.sharding.Mesh:
    """The mesh of a configuration over all devices of a slice.

    Raises:
        ValueError: the mesh does not fit the devices; the message lists what does.
    """
    count, fsdp = len(slice_.devices), wanted.fsdp
    if count % fsdp or (wanted.data or count // fsdp) * fsdp != count:
        valid = [n for n in range(1, count + 1) if count % n == 0 and n <= 256]
        raise ValueError(
            f"a mesh of data = {wanted.data or 'all'} x fsdp = {fsdp} does not fit the {count} devices of "
            f"{slice_.topology.name}; fsdp may be one of {valid}, with data = {count} / fsdp"
        )
    try:
        return make_mesh(count // fsdp, fsdp, slice_.devices)
    except NotImplementedError as error:
        raise ValueError(f"fsdp = {fsdp} is no part of the axes of {slice_.topology.name}: {error}") from error


def report(compiled: Compiled) -> str:
    """A program's cost as a few lines of text."""
    cost = compiled.measurement
    assert cost is not None
    memory = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in cost.memory.items())
    millions = ", ".join(f"{kind} {cycles / 1e6:,.1f}" for kind, cycles in cost.cycles.items())
    share, alone = model_flops_utilisation(compiled)
    lines = [f"{compiled.name} on {cost.topology}, {cost.devices} devices"]
    if plan := compiled.plan:
        lines.append(f"  rows at once           {plan.encode_chunk_rows or 'all'}; remat {plan.remat}")
    lines += [
        f"  memory, GiB a device   {memory}; there are {cost.hbm / GIB:.2f}",
        f"  step time, estimated   {cost.seconds:.3f} s: computation {cost.compute_seconds:.3f}, "
        f"communication by its model {cost.communication_seconds:.3f}",
        f"  throughput             {compiled.tokens / cost.seconds:,.0f} tokens/s, {compiled.flops:.3g} FLOPs a step, "
        f"{share:.1%} of the peak; of computation alone {alone:.1%}",
        f"  million cycles         {sum(cost.cycles.values()) / 1e6:,.1f}: {millions}",
        f"  million bundles        {cost.bundles / 1e6:,.1f}: as scheduled, without waits",
    ]
    for collective in cost.collectives:
        over = f"over {collective.group or cost.devices} devices"
        lines.append(f"  {collective.kind:<22} {collective.calls} {over}, {collective.bytes / 1e9:.3f} GB")
    for name, kernel in cost.kernels.items():
        cycles = f"{kernel['cycles']:,} cycles each" if kernel["cycles"] else "NOT COUNTED: it is in no schedule"
        lines.append(f"  kernel {name:<15} {kernel['calls']} calls, {cycles}")
    return "\n".join([*lines, f"  compiled in            {cost.compile_seconds:.0f} s"])


def model_flops_utilisation(compiled: Compiled) -> tuple[float, float]:
    """MFU in the estimated time, and MFU in the time of computation alone.

    MFU is the model's operations divided by those that the devices could do in that time.
    """
    cost = compiled.measurement
    assert cost is not None
    least = compiled.flops / cost.devices / cost.peak
    return least / cost.seconds, least / cost.compute_seconds


def to_json(compiled: Compiled) -> dict[str, Any]:
    """All numbers of a program, for JSON."""
    cost = compiled.measurement
    fields = {"name": compiled.name, "fits": cost is not None, "tokens": compiled.tokens, "flops": compiled.flops}
    if cost is None:
        return fields | {"reason": compiled.failure}
    if compiled.plan:
        fields |= compiled.plan._asdict()
    share, alone = model_flops_utilisation(compiled)
    return fields | {
        "topology": cost.topology,
        "devices": cost.devices,
        "memory_bytes": cost.memory | {"usable": cost.hbm},
        "cycles": cost.cycles,
        "bundles": cost.bundles,
        "kernels": cost.kernels,
        "collectives": [collective._asdict() for collective in cost.collectives],
        "seconds": cost.seconds,
        "compute_seconds": cost.compute_seconds,
        "communication_seconds": cost.communication_seconds,
        "tokens_per_second": compiled.tokens / cost.seconds,
        "mfu": share,
        "mfu_without_communication": alone,
        "compile_seconds": cost.compile_seconds,
    }


def _measured(
    stage: Stage,
    kind: str,
    config: ModelConfig,
    dtype: str,
    mesh: jax.sharding.Mesh,
    arguments: tuple[Any, ...],
    topology: Topology,
    hlo: Path | None,
    plan: Plan,
) -> Measurement:
    """Measures a stage's step, run as planned.

    Raises:
        DoesNotFit: the compiler refuses it, or training would take another plan.
    """
    found = measure(make_step(with_plan(stage, plan), kind, config, dtype, mesh), arguments, topology, hlo)
    if stage.leaves_memory_open and (peak := found.memory["peak"]) > USABLE * found.hbm:
        raise DoesNotFit(f"needs {peak / GIB:.2f} GiB of the {USABLE * found.hbm / GIB:.2f} GiB that a step may take")
    return found


def _compiled_inference(
    stage: Stage, model: TrainableSplit, mesh: jax.sharding.Mesh, slice_: Slice, hlo: Path | None
) -> Compiled:
    """Compiles the embedder's program on rows of the stage's row length.

    One adapter is used for all texts if the stage has any; parameters are in bfloat16.
    """
    config, everywhere = model.config, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arrays: dict[str, Any] = {
        path: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype, sharding=everywhere)
        for path, x in (model.trained | model.frozen).items()
    }
    encoder = from_local_arrays(config, arrays, dtype=jnp.bfloat16)
    rows = stage.encode_chunk_rows if isinstance(stage.encode_chunk_rows, int) else INFERENCE_ROWS
    per_token = int32_struct(mesh, rows * mesh.size, stage.row_length)
    adapter_ids = int32_struct(mesh) if stage.adapters else None
    tokens = rows * mesh.size * stage.row_length
    flops = training_flops(config, replace(stage, objective="pairs", adapters=(), max_length=stage.max_length)) / 3 * tokens
    done = Compiled(f"embedding in rows of {stage.row_length}, {rows} on each device", tokens, flops)
    arguments = encoder, per_token, per_token, per_token, adapter_ids
    try:
        return done._replace(measurement=measure(text_embeddings, arguments, slice_.topology, hlo, mesh=mesh))
    except DoesNotFit as error:
        return done._replace(failure=f"{error}; fewer stages.0.encode_chunk_rows than {rows} would need less")


def _suggest_fix(stage: Stage, mesh: MeshConfig, devices: int) -> str:
    """Suggests what to change in a configuration that does not fit."""
    found = []
    if stage.encode_chunk_rows is None:
        found.append("stages.N.encode_chunk_rows (rows at once; now all)")
    elif isinstance(stage.encode_chunk_rows, int) and stage.encode_chunk_rows > 1:
        found.append(f"fewer stages.N.encode_chunk_rows (now {stage.encode_chunk_rows})")
    if stage.remat not in ("full", "auto") and (stage.remat != "none" or mesh.fsdp == 1):
        found.append("stages.N.remat=full")
    if stage.logit_chunk is None:
        found.append("stages.N.logit_chunk=1024")
    wider = [n for n in (2, 4, 8, 16) if devices % n == 0 and n > mesh.fsdp]
    if wider:
        found.append(f"mesh.fsdp={wider[-1]}")
    return f"needs less with: {', '.join(found)}" if found else "it needs more devices, or a smaller batch_size"

"""python -m train.compile CONFIG --topology T: will a step fit a slice of TPUs, and how long is it? No TPU is needed."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp

from jina_jax.cli import Program
from jina_jax.config import dump_json
from jina_jax.embed.forward import embed_rows
from jina_jax.model.encoder import from_parts
from jina_jax.parallel.mesh import check_divides, make_mesh

from .aot.abstract_step import Parts, abstract_parts, source_sizes, step_arguments, whole_numbers
from .aot.chips import GIB
from .aot.compiler import DoesNotFit, Measurement, Slice, load_topology, measure
from .config import Mesh, Stage, TrainConfig, load_config
from .data.examples import texts_per_example
from .step.flops import training_flops
from .step.update import make_step

INFERENCE_ROWS = 16
"""Rows of each device in the embedder's program, where the stage has no `chunk_rows`."""


class Compiled(NamedTuple):
    """One program, the work of one run of it, and its cost."""

    name: str
    tokens: int
    """At texts of full length, over all devices."""
    flops: float
    """Of the model, over all devices: what is computed twice to save memory counts once."""
    measurement: Measurement | None
    """None where it does not fit."""
    failure: str = ""


@click.command(cls=Program)
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--topology", required=True, help="Chip and chips along each axis: v4|v5e|v5p|v6e|7x, such as v5e:4x4, v5p:4x4x4."
)
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Another value for a field: mesh.fsdp=16")
@click.option("--inference", is_flag=True, help="The embedder's program on packed rows, in place of the training step.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the numbers there.")
@click.option("--hlo", type=click.Path(path_type=Path), help="Write the text of the compiled program there; one file for each.")
def main(config: Path, topology: str, overrides: tuple[str, ...], inference: bool, out: Path | None, hlo: Path | None) -> None:
    """Compile the step of CONFIG, a Python file of configs/, with the TPU compiler, and say what it needs."""
    logging.getLogger("jax").setLevel(logging.ERROR)
    loaded = load_config(config, overrides)
    directory = Path(str(config).partition(":")[0]).parent
    for path in filter(None, (out, hlo)):
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"there is no directory {path.parent}")
    slice_ = load_topology(topology)
    done = []
    for compiled in compile_config(loaded, directory, slice_, inference=inference, hlo=hlo):
        click.echo(report(compiled) if compiled.measurement else f"{compiled.name} does not fit: {compiled.failure}")
        done.append(compiled)
    if out:
        out.write_text(dump_json({"programs": [to_json(compiled) for compiled in done]}), "utf-8")
    if not all(compiled.measurement for compiled in done):
        raise SystemExit(1)


def compile_config(
    config: TrainConfig, directory: Path, slice_: Slice, *, inference: bool = False, hlo: Path | None = None
) -> Iterator[Compiled]:
    """Compiles every program of a configuration: of each stage, one for each kind of record; or the embedder's alone.

    Args:
        config: what to compile.
        directory: of its file, see `abstract.source_sizes`.
        slice_: from `load_topology`.
        inference: the embedder's program, in place of the steps.
        hlo: file for the compiled program's text; of several programs, each has its name in its own.

    Raises:
        ValueError: mesh and devices, or batch and mesh, do not fit, or the model's sizes are not to be had.
    """
    mesh = over_devices(config.mesh, slice_)
    sizes = source_sizes(config, directory)
    check_divides(sizes, mesh)
    models = abstract_parts(config, sizes)
    if inference:
        yield _compiled_inference(config.stages[0], models[0], mesh, slice_, hlo)
        return
    programs = [
        (stage, kind, model, step_arguments(stage, kind, model, mesh))  # all are checked before the first is compiled
        for stage, model in zip(config.stages, models, strict=True)
        for kind in dict.fromkeys(dataset.kind for dataset in stage.datasets)
    ]
    for stage, kind, model, arguments in programs:
        name = stage.name if len({dataset.kind for dataset in stage.datasets}) == 1 else f"{stage.name}, {kind}"
        tokens = stage.batch_size * texts_per_example(stage, kind) * stage.length
        step = make_step(stage, kind, model.config, config.dtype, mesh)
        file = hlo and (hlo if len(programs) == 1 else hlo.with_stem(f"{hlo.stem}-{stage.name}-{kind}"))
        done = Compiled(name, tokens, training_flops(model.config, stage) * tokens, None)
        try:
            yield done._replace(measurement=measure(step, arguments, slice_.topology, file))
        except DoesNotFit as error:
            yield done._replace(failure=f"{error}; {_remedy(stage, config.mesh, mesh.size)}")


def over_devices(wanted: Mesh, slice_: Slice) -> jax.sharding.Mesh:
    """The mesh of a configuration over all devices of a slice.

    Raises:
        ValueError: it does not fit them; the message lists what does.
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
    share, alone = shares_of_peak(compiled)
    lines = [
        f"{compiled.name} on {cost.topology}, {cost.devices} devices",
        f"  memory, GiB a device   {memory}; there are {cost.hbm / GIB:.2f}",
        f"  step time, estimated   {cost.seconds:.3f} s: computation {cost.compute_seconds:.3f}, "
        f"communication by its model {cost.communication_seconds:.3f}",
        f"  throughput             {compiled.tokens / cost.seconds:,.0f} tokens/s, {compiled.flops:.3g} FLOPs a step, "
        f"{share:.1%} of the peak; of computation alone {alone:.1%}",
        f"  million cycles         {sum(cost.cycles.values()) / 1e6:,.1f}: {millions}",
    ]
    for collective in cost.collectives:
        over = f"over {collective.group or cost.devices} devices"
        lines.append(f"  {collective.kind:<22} {collective.count} {over}, {collective.bytes / 1e9:.3f} GB")
    for name, kernel in cost.kernels.items():
        cycles = f"{kernel['cycles']:,} cycles each" if kernel["cycles"] else "NOT COUNTED: it is in no schedule"
        lines.append(f"  kernel {name:<15} {kernel['calls']} calls, {cycles}")
    return "\n".join([*lines, f"  compiled in            {cost.compile_seconds:.0f} s"])


def shares_of_peak(compiled: Compiled) -> tuple[float, float]:
    """The model's operations over what the devices could do in the estimated time: in all of it, and in computation's."""
    cost = compiled.measurement
    assert cost is not None
    least = compiled.flops / cost.devices / cost.peak
    return least / cost.seconds, least / cost.compute_seconds


def to_json(compiled: Compiled) -> dict[str, Any]:
    """Every number of a program."""
    cost = compiled.measurement
    fields = {"name": compiled.name, "fits": cost is not None, "tokens": compiled.tokens, "flops": compiled.flops}
    if cost is None:
        return fields | {"reason": compiled.failure}
    share, alone = shares_of_peak(compiled)
    return fields | {
        "topology": cost.topology,
        "devices": cost.devices,
        "memory_bytes": cost.memory | {"usable": cost.hbm},
        "cycles": cost.cycles,
        "kernels": cost.kernels,
        "collectives": [collective._asdict() for collective in cost.collectives],
        "seconds": cost.seconds,
        "compute_seconds": cost.compute_seconds,
        "communication_seconds": cost.communication_seconds,
        "tokens_per_second": compiled.tokens / cost.seconds,
        "share_of_peak": share,
        "share_of_peak_without_communication": alone,
        "compile_seconds": cost.compile_seconds,
    }


def _compiled_inference(stage: Stage, model: Parts, mesh: jax.sharding.Mesh, slice_: Slice, hlo: Path | None) -> Compiled:
    """Rows of the stage's length, with one adapter for all texts where the stage has one; parameters in bfloat16."""
    config, everywhere = model.config, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arrays: dict[str, Any] = {
        path: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype, sharding=everywhere)
        for path, x in (model.trained | model.frozen).items()
    }
    encoder = from_parts(config, arrays, dtype=jnp.bfloat16)
    rows = stage.chunk_rows or INFERENCE_ROWS
    per_token = whole_numbers(mesh, rows * mesh.size, stage.row_length)
    tasks = whole_numbers(mesh) if stage.adapters else None
    tokens = rows * mesh.size * stage.row_length
    flops = training_flops(config, replace(stage, objective="pairs", adapters=(), length=stage.length)) / 3 * tokens
    done = Compiled(f"embedding in rows of {stage.row_length}, {rows} on each device", tokens, flops, None)
    arguments = encoder, per_token, per_token, per_token, tasks
    try:
        return done._replace(measurement=measure(embed_rows, arguments, slice_.topology, hlo, mesh=mesh))
    except DoesNotFit as error:
        return done._replace(failure=f"{error}; fewer stages.0.chunk_rows than {rows} would need less")


def _remedy(stage: Stage, mesh: Mesh, devices: int) -> str:
    """What to change in a configuration that does not fit."""
    found = []
    if stage.chunk_rows is None:
        found.append("stages.N.chunk_rows (rows at once; now all)")
    elif stage.chunk_rows > 1:
        found.append(f"fewer stages.N.chunk_rows (now {stage.chunk_rows})")
    if stage.remat != "full" and (stage.remat != "none" or mesh.fsdp == 1):
        found.append("stages.N.remat=full")
    if stage.loss_chunk is None:
        found.append("stages.N.loss_chunk=1024")
    wider = [n for n in (2, 4, 8, 16) if devices % n == 0 and n > mesh.fsdp]
    if wider:
        found.append(f"mesh.fsdp={wider[-1]}")
    return f"needs less with: {', '.join(found)}" if found else "it needs more devices, or a smaller batch_size"


if __name__ == "__main__":
    main(prog_name="python -m train.compile")

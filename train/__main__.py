"""Trains a configuration: python -m train CONFIG --workdir DIR"""

import logging
from pathlib import Path

import click

from jina_jax.command import Command
from jina_jax.parallel import processes
from jina_jax.storage import as_path

from .config import load_config
from .run.loop import train
from .run.profiling import parse_steps


@click.command(cls=Command)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--workdir", required=True, help="The run's directory, also gs:// or s3://; an interrupted run resumes.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Another value for a field: stages.0.steps=100")
@click.option("--profile-steps", metavar="FIRST:LAST", help="Record a trace of these steps in WORKDIR/profile, for XProf.")
def main(config: Path, workdir: str, overrides: tuple[str, ...], profile_steps: str | None) -> None:
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
    place, profile = as_path(workdir), None if profile_steps is None else parse_steps(profile_steps)
    processes.start()
    with processes.abort_together():
        model = train(loaded, place, progress=True, profile=profile)
    if model is not None:
        click.echo(f"model: {model}")


if __name__ == "__main__":
    main(prog_name="python -m train")

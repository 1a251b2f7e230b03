"""What adapters cost, or bring, on texts of another kind than they were trained on.

    make quickstart
    JINA_JAX_MTEB_DATA=DIR python -m benchmarks.adapters_elsewhere runs/quickstart/e5-small \
        runs/quickstart/model --json benchmarks/results/adapters_elsewhere.json

Tasks of MTEB by its protocols (`published_scores.py`), with the base behind its prompts, and with
the adapter that the library uses for such a task.
"""

import functools
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import click

from jina_jax import Embedder
from jina_jax.command import Command

from .machine import machine, versions
from .published_scores import DATA, PACKAGES, TASKS, Model, Published, bitext, model_of

TATOEBA_JAPANESE = Published(bitext, "tatoeba/jpn-eng", 84.39)

MEASURED = TASKS | {"Tatoeba (jpn-eng)": TATOEBA_JAPANESE}

ADAPTERS = {"sts": "text-matching", "bitext": "text-matching", "classification": "classification"}
"""Adapter by protocol; retrieval has one for each side."""


def scores(base: Embedder, tuned: Embedder, data: Path, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Scores of tasks in percent with the base and with its adapters."""
    rows = []
    for name in tasks:
        task = MEASURED[name]
        folder, _, subset = task.files.partition("/")
        adapter = ADAPTERS.get(task.score.__name__)
        models = {"base": model_of(base), "adapter": with_adapter(tuned, adapter)}
        found = {system: round(100 * task.score(model, data / folder, subset), 2) for system, model in models.items()}
        rows.append({"task": name, "name": adapter or "retrieval.query+retrieval.passage"} | found)
        click.echo(rows[-1], err=True)
    return rows


def with_adapter(embedder: Embedder, adapter: str | None) -> Model:
    """The ways to embed texts with one adapter; None = that of each side of retrieval."""
    if adapter is None:
        return model_of(embedder)
    encode = functools.partial(embedder.encode, task=adapter)
    return Model(encode, encode)


@click.command(cls=Command)
@click.argument("base")
@click.argument("tuned")
@click.option("--data", type=click.Path(path_type=Path, exists=True), envvar=DATA, required=True, help=f"Default: ${DATA}.")
@click.option("--task", "tasks", type=click.Choice([*MEASURED]), multiple=True, help="Default: all.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(base: str, tuned: str, data: Path, tasks: Sequence[str], dtype: str, out: Path | None) -> None:
    """Score BASE, and TUNED with its adapters; print a table."""
    rows = scores(Embedder.load(base, dtype=dtype), Embedder.load(tuned, dtype=dtype), data, tasks or [*MEASURED])
    click.echo("| task | adapter | base | with the adapter |\n|---|---|---:|---:|")
    for row in rows:
        click.echo(f"| {row['task']} | {row['name']} | {row['base']:.2f} | {row['adapter']:.2f} |")
    if out:
        report = {"machine": machine(), "date": str(date.today()), "dtype": dtype, "versions": versions(PACKAGES)}
        out.write_text(json.dumps(report | {"tasks": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.adapters_elsewhere")

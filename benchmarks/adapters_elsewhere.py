"""What adapters cost, or bring, on texts of another kind than they were trained on.

    make quickstart
    JINA_JAX_MTEB_DATA=RAW python -m benchmarks.adapters_elsewhere runs/quickstart/e5-small \
        runs/quickstart/model --out runs/elsewhere --json benchmarks/results/adapters_elsewhere.json

Tasks of MTEB (`published_scores.py`), with the base behind its prompts, and with the adapters that
`jina_jax.mteb` takes for such a task. Results are kept in OUT.
"""

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import click

from jina_jax import Embedder
from jina_jax.command import Command
from train.mteb.run import model_name

from .machine import machine, versions
from .published_scores import DATA, PACKAGES, prepare, score

MEASURED = ("STSBenchmarkMultilingualSTS", "STS16", "XQuADRetrieval", "Tatoeba", "Banking77Classification")
SUBSETS = ("default", "en", "de", "deu-eng", "jpn-eng", "rus-eng")


def scores(base: str, tuned: str, data: Path, names: Sequence[str], dtype: str, out: Path) -> list[dict[str, Any]]:
    """Scores of tasks in percent with the base and with its adapters."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for system, model in {"base": base, "adapter": tuned}.items():
        tasks = prepare(data, out / "data", names, SUBSETS)  # mteb forgets a task's data once it has run
        embedder = Embedder.load(model, dtype=dtype)
        for row in score(embedder, model_name(model, embedder), tasks, out / system):
            rows.setdefault((row.task, row.subset), {"task": row.task, "subset": row.subset})[system] = row.score
    return list(rows.values())


@click.command(cls=Command)
@click.argument("base")
@click.argument("tuned")
@click.option("--data", type=click.Path(path_type=Path, exists=True), envvar=DATA, required=True, help=f"Default: ${DATA}.")
@click.option("--task", "names", type=click.Choice(MEASURED), multiple=True, help="Default: all.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the results and of laid out data.")
@click.option("--json", "output", type=click.Path(path_type=Path))
def main(base: str, tuned: str, data: Path, names: Sequence[str], dtype: str, out: Path, output: Path | None) -> None:
    """Score BASE, and TUNED with its adapters; print a table."""
    rows = scores(base, tuned, data, names or MEASURED, dtype, out)
    click.echo("| task | base | with the adapter |\n|---|---:|---:|")
    for row in rows:
        label = row["task"] if row["subset"] == "default" else f"{row['task']}, {row['subset']}"
        click.echo(f"| {label} | {row['base']:.2f} | {row['adapter']:.2f} |")
    if output:
        report = {"machine": machine(), "date": str(date.today()), "dtype": dtype, "versions": versions(PACKAGES)}
        output.write_text(json.dumps(report | {"tasks": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.adapters_elsewhere")

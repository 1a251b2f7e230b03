"""Banking77 with a new adapter, by `python -m train.adapter` with its defaults.

    jina-jax demo-model runs/e5-small
    JINA_JAX_MTEB_DATA=DIR python -m benchmarks.own_task runs/e5-small --seeds 3 \
        --json benchmarks/results/own_task.json

The command is what a user types: it trains on the task's training split alone, and measures base
and adapter on its test split by MTEB's protocol. DIR/banking77 has train.jsonl and test.jsonl of
text and label. One run for each seed, each in its own process.
"""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np

from jina_jax.command import Command

from .machine import machine, versions
from .published_scores import DATA

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "scikit-learn")


@click.command(cls=Command)
@click.argument("model")
@click.option("--data", type=click.Path(path_type=Path, exists=True), envvar=DATA, required=True, help=f"Default: ${DATA}.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How many; the first is 0.")
@click.option("--workdir", type=click.Path(path_type=Path), default="runs/own_task", help="An interrupted run resumes.")
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(model: str, data: Path, seeds: int, workdir: Path, out: Path | None) -> None:
    """Train and measure an adapter above MODEL for each seed, and print the scores."""
    runs = []
    for seed in range(seeds):
        runs.append(_run(model, data / "banking77", workdir / f"seed-{seed}", seed))
        click.echo(f"seed {seed}: {runs[-1]['before']:.2f} -> {runs[-1]['after']:.2f}")
    after = [run["after"] for run in runs]
    click.echo(f"mean of {seeds} seeds: {np.mean(after):.2f}, least {min(after):.2f}")
    if out:
        report = {"machine": machine(), "date": str(date.today()), "versions": versions(PACKAGES)}
        out.write_text(json.dumps(report | {"task": "Banking77Classification", "runs": runs}, indent=2) + "\n")


def _run(model: str, folder: Path, out: Path, seed: int) -> dict[str, Any]:
    """Accuracies in percent before and after, with the sizes and the seconds of a run."""
    command = [sys.executable, "-m", "train.adapter", folder / "train.jsonl", "--text", "text", "--label", "label"]
    command += ["--test", folder / "test.jsonl", "--model", model, "--out", out, "--seed", seed]
    subprocess.run([str(argument) for argument in command], check=True, stdout=subprocess.DEVNULL)
    report = json.loads((out / "report.json").read_text())
    sizes = ("steps", "batch_size", "max_length", "learning_rate", "temperature", "num_negatives")
    return {
        "seed": seed,
        "before": round(100 * report["before"]["accuracy"], 2),
        "after": round(100 * report["after"]["accuracy"], 2),
        "training_seconds": report["seconds"],
        "dtype": report["dtype"],
        "rank": report["rank"],
    } | {name: report["stage"][name] for name in sizes}


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.own_task")

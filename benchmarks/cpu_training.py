"""Contrastive training on CPU at the size of `make pretrain`, beside sentence-transformers.

    python -m benchmarks.cpu_training --json benchmarks/results/cpu_training.json

`pair_training.py` says which training. Each system runs in a separate process, in turns, and each
turn counts the steps after the first ones, which compile. Needs the peer's trainer:
pip install -e '.[bench]'
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import click

from configs import pretrain

from .machine import machine, versions
from .pair_training import EVERY, train_ours, train_peer, write_pairs

PACKAGES = ("jax", "jaxlib", "flax", "optax", "sentence-transformers", "transformers", "torch", "accelerate")
SYSTEMS = [(name, dtype) for dtype in ("float32", "bfloat16") for name in ("jina-jax", "sentence-transformers")]


@click.group(invoke_without_command=True)
@click.option("--steps", type=click.IntRange(EVERY), default=40, show_default=True, help="Counted in each turn.")
@click.option("--turns", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
@click.pass_context
def main(context: click.Context, steps: int, turns: int, out: Path | None) -> None:
    """Measure both systems, print a table, and write the numbers as JSON."""
    if context.invoked_subcommand:
        return
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        pairs = Path(scratch) / "pairs.jsonl"
        write_pairs(pairs)
        for turn in range(turns):
            for name, dtype in SYSTEMS:
                runs.append({"system": name, "dtype": dtype, "turn": turn, "seconds": _measured(name, dtype, steps, pairs)})
                click.echo(runs[-1], err=True)
    results = [_result(name, dtype, runs) for name, dtype in SYSTEMS]
    report = {"machine": machine(), "date": str(date.today()), "versions": versions(PACKAGES), "steps": steps}
    click.echo(_table(results))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report | {"results": results, "runs": runs}, indent=2) + "\n")


@main.command()
@click.argument("system")
@click.argument("dtype")
@click.argument("steps", type=int)
@click.argument("pairs", type=click.Path(path_type=Path))
def worker(system: str, dtype: str, steps: int, pairs: Path) -> None:
    """Train with one system in this process, and print the mean seconds of a counted step."""
    measure = train_ours if system == "jina-jax" else train_peer
    stage = replace(pretrain.pairs().stages[0], steps=EVERY + steps)
    click.echo(json.dumps(statistics.mean(measure(pretrain.MODEL, stage, pairs, dtype)[1:])))


def _measured(system: str, dtype: str, steps: int, pairs: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.cpu_training", "worker", system, dtype, str(steps), str(pairs)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _result(system: str, dtype: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over turns; the ratio is that of the two systems' medians."""

    def seconds(name: str) -> float:
        return statistics.median(run["seconds"] for run in runs if run["system"] == name and run["dtype"] == dtype)

    return {
        "system": system,
        "dtype": dtype,
        "steps_per_second": 1 / seconds(system),
        "against_peer": seconds("sentence-transformers") / seconds(system),
    }


def _table(results: list[dict[str, Any]]) -> str:
    lines = ["| system | dtype | steps/s | against peer |", "|---|---|---|---|"]
    lines += [f"| {r['system']} | {r['dtype']} | {r['steps_per_second']:.2f} | {r['against_peer']:.2f} |" for r in results]
    return "\n".join(lines)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.cpu_training")

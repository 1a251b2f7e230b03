"""The quickstart's adapters of several seeds on the validation and the test split.

    make quickstart
    python -m train configs/quickstart.py --workdir runs/seed-1 --set seed=1
    python -m train configs/quickstart.py --workdir runs/seed-2 --set seed=2
    python -m benchmarks.quickstart_seeds runs/quickstart/e5-small runs/quickstart/model \
        runs/seed-1/model runs/seed-2/model --json benchmarks/results/quickstart_seeds.json

Tasks, texts, limit and dtype are those of `train/quickstart.py`; embeddings are kept in --out.
Besides, one of the two retrieval adapters on both sides, with the first seed.
"""

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np

from jina_jax import Embedder
from jina_jax.command import Command, use_compilation_cache
from train.data.corpus import BUNDLED, read_corpus
from train.evaluation.before_after import before_after_scores, sampled_tasks
from train.evaluation.kept_embeddings import KeptEmbeddings
from train.evaluation.model_scores import OWN_ADAPTERS, Run, Sides, base_sides, both_sides
from train.evaluation.tasks import EvalTask
from train.quickstart import DTYPE, MAX_LENGTH

from .machine import machine, versions

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scikit-learn")
DIMS = (48, 384)
ALONE = ("retrieval.query", "retrieval.passage")


@click.command(cls=Command)
@click.argument("base")
@click.argument("models", nargs=-1, required=True)
@click.option("--split", "splits", type=click.Choice(["validation", "test"]), multiple=True, default=["validation", "test"])
@click.option("--out", type=click.Path(path_type=Path), default="runs/quickstart_seeds", show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path))
def main(base: str, models: Sequence[str], splits: Sequence[str], out: Path, output: Path | None) -> None:
    """Measure BASE, and MODELS of one training with several seeds."""
    use_compilation_cache()
    out.mkdir(parents=True, exist_ok=True)
    train_packages, config = read_corpus(BUNDLED, "train"), Embedder.load(base, dtype=DTYPE).config
    rows: list[dict[str, Any]] = []
    for split in splits:
        tasks = sampled_tasks(read_corpus(BUNDLED, split), train_packages)
        found = _values(base, tasks, {"base": lambda task: base_sides(config, task.name)}, out / "base.sqlite")
        for number, model in enumerate(models):
            sides = {"adapters": lambda task: OWN_ADAPTERS[task.name][0]}
            if number == 0:
                sides |= {name: lambda task, name=name: _alone(task, name) for name in ALONE}
            for key, values in _values(model, tasks, sides, out / f"{number}.sqlite").items():
                found.setdefault(key, []).extend(values)
        rows += [
            {"split": split, "task": task, "subset": subset, "dim": dim, "system": system, "values": values}
            for (task, subset, system, dim), values in found.items()
        ]
        click.echo(_table(split, rows))
    if output:
        report = {"machine": machine(), "date": str(date.today()), "versions": versions(PACKAGES)}
        output.write_text(json.dumps(report | {"dtype": DTYPE, "max_length": MAX_LENGTH, "rows": rows}, indent=1) + "\n")


def _alone(task: EvalTask, adapter: str) -> Sides | None:
    return both_sides(adapter) if task.name == "retrieval" else None


def _values(model: str, tasks: Sequence[EvalTask], systems: dict[str, Any], file: Path) -> dict[tuple, list[float]]:
    """Scores of a model by task, subset, system and dimension, each a list of one."""
    embedder = Embedder.load(model, dtype=DTYPE)
    embeddings, found = KeptEmbeddings(file, lambda _: embedder, MAX_LENGTH), {}
    for system, sides_of in systems.items():
        runs = [Run(task, sides, DIMS) for task in tasks if (sides := sides_of(task)) is not None]
        for score in before_after_scores(runs, embeddings, progress=True):
            if score.system == "model":
                found[score.task, score.subset, system, score.dim] = [score.value]
    return found


def _table(split: str, rows: Sequence[dict[str, Any]]) -> str:
    values = {(row["task"], row["subset"], row["system"], row["dim"]): row["values"] for row in rows if row["split"] == split}
    lines = [
        f"| {split} | base | adapters | gain | deviation of seeds | query's alone | passage's alone | 48: base | adapters |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for task, subset in dict.fromkeys(key[:2] for key in values):
        cells = [values.get((task, subset, system, 384), []) for system in ("base", "adapters", *ALONE)]
        cells += [values[task, subset, system, 48] for system in ("base", "adapters")]
        base, adapters, *others = [f"{100 * np.mean(cell):.1f}" if cell else "" for cell in cells]
        gain = 100 * (np.mean(cells[1]) - np.mean(cells[0]))
        deviation = f"{100 * np.std(cells[1], ddof=1):.1f}" if len(cells[1]) > 1 else ""
        lines.append(f"| {task}, {subset} | {base} | {adapters} | {gain:+.1f} | {deviation} | {' | '.join(others)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

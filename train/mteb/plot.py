"""Plots the scores of systems by task."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from jina_jax.files import atomic_write

from .systems import System, TaskRun

INCHES_A_TASK = 0.34


def plot_systems(runs: Sequence[TaskRun], own: Sequence[System], others: Sequence[System], output: Path) -> None:
    """Plots a line for each task and a mark for each system on it, the measured ones filled.

    Args:
        runs: the tasks, from the top.
        own, others: measured and published systems; one that lacks a task has no mark there.
        output: a .png.
    """
    figure = Figure(figsize=(9, 1.6 + INCHES_A_TASK * len(runs)), layout="constrained")
    axes = figure.add_subplot()
    for number, system in enumerate([*own, *others]):
        points = [(score.mean, -row) for row, run in enumerate(runs) if (score := system.scores.get(run.name))]
        if points:
            marker, fill = ("o", "full") if number < len(own) else ("D", "none")
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker, fillstyle=fill, color=f"C{number % 10}", label=system.label)
    axes.set_yticks([-row for row in range(len(runs))], [f"{run.name}\n{run.metric}" for run in runs], fontsize=7)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    least = min(score.mean for system in [*own, *others] for score in system.scores.values())
    axes.set(xlabel="score x 100, on what was run", xlim=(min(0, least - 1), 100), ylim=(-len(runs) + 0.4, 0.6))
    figure.legend(loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    with atomic_write(output) as target:
        figure.savefig(target, format="png", dpi=120)

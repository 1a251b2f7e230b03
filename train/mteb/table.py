"""The leaderboard's table of a run: its scores beside the published ones of others."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from jina_jax.files import atomic_write, check_output_file, write_json

from . import plot
from .names import Selection
from .systems import System, TaskRun, source

FILES = ("table.md", "table.json", "table.png")


class Leaderboard(NamedTuple):
    """Everything that a table says."""

    selections: Sequence[Selection]
    """What was asked for."""
    asked: dict[str, int]
    """Tasks of each selection, before those without data were left out."""
    runs: Sequence[TaskRun]
    own: Sequence[System]
    """The model that was run, and its variants."""
    others: Sequence[System]
    """Published scores; those without a score on any task are not shown."""

    @property
    def systems(self) -> list[System]:
        return [*self.own, *(system for system in self.others if system.scores)]


def check_writable(out: Path) -> None:
    """Makes the directory, and raises OSError if no table can be written there."""
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        check_output_file(out / name)


def write(out: Path, board: Leaderboard) -> None:
    """Writes table.md, table.json and table.png into a directory."""
    with atomic_write(out / "table.md") as target:
        target.write_text(markdown(board) + "\n![scores of each task](table.png)\n", "utf-8")
    write_json(out / "table.json", as_json(board))
    plot.plot_systems(board.runs, board.own, board.systems[len(board.own) :], out / "table.png")


def markdown(board: Leaderboard) -> str:
    """All tables, under headings. Values are times 100."""
    parts = [f"# MTEB scores of {board.own[0].label}\n", _what_was_run(board), "## Means\n", _means(board)]
    if len(board.systems) > len(board.own):
        parts += ["## Beside each system, on the tasks that both have\n", _pairwise(board)]
    parts += ["## Tasks\n", _tasks(board)]
    if any(len(run.cells) > 1 for run in board.runs):
        parts += ["## Languages and splits\n", _cells(board)]
    return "\n".join([*parts, f"Scores of other systems: {source()}.\n"])


def as_json(board: Leaderboard) -> dict:
    """The scores of every system, with what was run of each task."""
    return {
        "published": source(),
        "tasks": {
            run.name: {"type": run.type, "metric": run.metric, "cells": [list(cell) for cell in run.cells], "of": run.all_cells}
            for run in board.runs
        },
        "systems": {
            system.label: {
                "measured": system in board.own,
                "mean_task": mean_task(board.runs, system),
                "mean_type": mean_type(board.runs, system),
                "scores": {
                    name: {
                        "mean": round(score.mean, 3),
                        "cells": {f"{cell.split}/{cell.subset}": round(value, 3) for cell, value in score.by_cell.items()},
                    }
                    for name, score in system.scores.items()
                },
            }
            for system in board.systems
        },
    }


def mean_task(runs: Iterable[TaskRun], system: System) -> float | None:
    """Mean over the tasks; None where the system lacks one."""
    scores = [system.scores.get(run.name) for run in runs]
    return None if None in scores else fmean(score.mean for score in scores if score)


def mean_type(runs: Sequence[TaskRun], system: System) -> float | None:
    """Mean over the types of tasks, of the means over the tasks of each."""
    means = [mean_task(members, system) for members in _by_type(runs).values()]
    return None if None in means else fmean(mean for mean in means if mean is not None)


def _what_was_run(board: Leaderboard) -> str:
    lines = []
    for selection in board.selections:
        asked = board.asked[selection.name]
        if selection.is_benchmark:
            names = "all" if len(selection.tasks) == asked else f"{len(selection.tasks)} of the {asked}"
            lines.append(f"{names} tasks of {selection.name}")
        else:
            lines.append(selection.name)
    partial = [f"{run.name} ({len(run.cells)} of {run.all_cells})" for run in board.runs if not run.complete]
    text = f"Run: {', '.join(lines)}. "
    if partial:
        text += f"Of some tasks not all languages and splits were run: {', '.join(partial)}. "
    return (
        f"{text}Every mean, of this model and of the others, is over what was run alone, and is not that of MTEB's "
        "leaderboard. A system that lacks a task has no mean with it.\n"
    )


def _means(board: Leaderboard) -> str:
    types = _by_type(board.runs)
    rows = []
    for system in board.systems:
        means = [mean_task(members, system) for members in types.values()]
        rows.append((system.label, [mean_task(board.runs, system), mean_type(board.runs, system), *means]))
    headings = [f"mean of {len(board.runs)} tasks", f"mean of {len(types)} types"]
    return _markdown_table("", [*headings, *(f"{kind} ({len(members)})" for kind, members in types.items())], rows)


def _pairwise(board: Leaderboard) -> str:
    own, lines = board.own[0], [f"| | tasks | {board.own[0].label} | this system | difference |", "|---|---:|---:|---:|---:|"]
    for system in board.systems[len(board.own) :]:
        common = [name for name in own.scores if name in system.scores]
        ours, theirs = (fmean(each.scores[name].mean for name in common) for each in (own, system))
        lines.append(f"| {system.label} | {len(common)} | {ours:.2f} | {theirs:.2f} | {ours - theirs:+.2f} |")
    return "\n".join(lines) + "\n"


def _tasks(board: Leaderboard) -> str:
    rows = []
    for run in board.runs:
        scores = [system.scores.get(run.name) for system in board.systems]
        part = "" if run.complete else f", {len(run.cells)} of {run.all_cells}"
        rows.append((f"{run.name} ({run.metric}{part})", [score and score.mean for score in scores]))
    return _markdown_table("task", [system.label for system in board.systems], rows)


def _cells(board: Leaderboard) -> str:
    rows = []
    for run in (run for run in board.runs if len(run.cells) > 1):
        for cell in run.cells:
            scores = [system.scores.get(run.name) for system in board.systems]
            label = f"{run.name} {cell.subset} {cell.split}"
            rows.append((label, [score.by_cell.get(cell) if score else None for score in scores]))
    return _markdown_table("task", [system.label for system in board.systems], rows)


def _by_type(runs: Iterable[TaskRun]) -> dict[str, list[TaskRun]]:
    found: dict[str, list[TaskRun]] = {}
    for run in runs:
        found.setdefault(run.type, []).append(run)
    return found


def _markdown_table(corner: str, headings: Sequence[str], rows: Iterable[tuple[str, Sequence[float | None]]]) -> str:
    lines = [f"| {' | '.join((corner, *headings))} |", f"|---|{'---:|' * len(headings)}"]
    for label, values in rows:
        cells = ["" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"| {' | '.join((label, *cells))} |")
    return "\n".join(lines) + "\n"

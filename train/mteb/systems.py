"""Scores of systems by task: those of a run, and published ones of others on the same data."""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from .names import Task

PUBLISHED = Path(__file__).with_name("published_scores.json")


FILED_DIGITS = 6
"""Decimals of a score in mteb's files; a run that reads them has the scores of the one before."""


class Cell(NamedTuple):
    """One split of a task in one of its subsets, which are mostly languages."""

    split: str
    subset: str


class TaskRun(NamedTuple):
    """What was run of a task."""

    name: str
    type: str
    metric: str
    cells: tuple[Cell, ...]
    all_cells: int
    """How many the task has in MTEB."""

    @property
    def complete(self) -> bool:
        return len(self.cells) == self.all_cells


class TaskScore(NamedTuple):
    """Score of a system on the cells of a task that were run, times 100."""

    mean: float
    by_cell: dict[Cell, float]
    """Empty where only the mean is known."""


class System(NamedTuple):
    """A model, or one variant of it, with its scores by task; a task that it lacks is not there."""

    label: str
    scores: dict[str, TaskScore]


def task_run(task: Task) -> TaskRun:
    """Returns what is to be run of a task; an aggregate has one score for each split."""
    metadata = task.metadata
    subsets, all_subsets = (["default"],) * 2 if task.is_aggregate else (task.hf_subsets, metadata.hf_subsets)
    cells = tuple(Cell(split, subset) for split in task.eval_splits for subset in subsets)
    return TaskRun(metadata.name, metadata.type, metadata.main_score, cells, len(metadata.eval_splits) * len(all_subsets))


def measured(label: str, runs: Iterable[TaskRun], results: Mapping[str, Any]) -> System:
    """Returns a system from mteb's results by task."""
    return System(label, {run.name: _measured(run, results[run.name]) for run in runs})


def published(runs: Iterable[TaskRun]) -> list[System]:
    """Returns the systems of `published_scores.json` with what they have of the same cells.

    A system has a task if each cell that was run is published, or if all of the task was run and is
    published as a mean.
    """
    runs = list(runs)
    return [
        System(label, {run.name: score for run in runs if (score := _published(run, tasks.get(run.name)))})
        for label, tasks in _published_tasks().items()
    ]


def source() -> str:
    """Where the published scores are from."""
    return _file()["source"]


def published_cell(label: str, task: str, cell: Cell) -> float | None:
    """A system's published score of one cell; None = there is none."""
    entry = _published_tasks()[label].get(task, {})
    if "splits" in entry:
        return entry["splits"].get(cell.split, {}).get(cell.subset)
    return entry["score"] if entry.get("of") == 1 else None


def _measured(run: TaskRun, result: Any) -> TaskScore:
    scores = {
        Cell(split, entry["hf_subset"]): 100 * round(entry["main_score"], FILED_DIGITS)
        for split, entries in result.scores.items()
        for entry in entries
    }
    by_cell = {cell: scores[cell] for cell in run.cells}
    return TaskScore(fmean(by_cell.values()), by_cell)


def _published(run: TaskRun, entry: Mapping[str, Any] | None) -> TaskScore | None:
    if entry is None:
        return None
    splits = entry.get("splits", {})
    by_cell = {cell: splits[cell.split][cell.subset] for cell in run.cells if cell.subset in splits.get(cell.split, {})}
    if len(by_cell) == len(run.cells):
        return TaskScore(fmean(by_cell.values()), by_cell)
    if run.complete and entry["cells"] == entry["of"] == run.all_cells:
        return TaskScore(entry["score"], {run.cells[0]: entry["score"]} if len(run.cells) == 1 else {})
    return None


def _published_tasks() -> dict[str, Any]:
    return {label: system["tasks"] for label, system in _file()["systems"].items()}


@cache
def _file() -> dict[str, Any]:
    return json.loads(PUBLISHED.read_text("utf-8"))

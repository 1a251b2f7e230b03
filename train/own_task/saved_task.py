"""What a run of a task keeps in its directory beside what the training loop keeps there.

DIR/task.json      what was asked for, the run that was planned, the scores of the base
DIR/records/       records to train on, and those held out
DIR/report.json    the scores before and after, when the run is finished
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jina_jax.checkpoints.sealed_directory import atomic_directory, check_free
from jina_jax.errors import RunError
from jina_jax.files import json_diff, read_json, write_json

from ..config import RecordKind, TrainConfig, from_dict, to_dict
from ..data.records import read_records, write_records

TASK, REPORT = "task.json", "report.json"
TRAIN, HELD_OUT = Path("records", "train.jsonl"), Path("records", "held_out.jsonl")


class SavedTask(NamedTuple):
    """A task whose base has been measured, and whose adapters can be trained."""

    config: TrainConfig
    train: Sequence[Any]
    held_out: Sequence[Any]
    before: dict[str, Any]
    """Scores of the base, and what they are of."""


def open_task(directory: Path, request: Mapping[str, Any], kind: RecordKind) -> SavedTask | None:
    """Opens the task that a directory holds; None where it is new or empty.

    Raises:
        RunError: the directory is of another task, and the message lists the differences.
        FileExistsError: it holds something else.
    """
    if not (directory / TASK).is_file():
        check_free(directory)
        return None
    saved = read_json(directory / TASK, RunError)
    if differences := json_diff(saved.get("request"), request):
        raise RunError(f"{directory} holds another run; it differs in: {'; '.join(differences)}. Give another --out")
    return SavedTask(
        _reading_from(from_dict(saved["config"]), directory / TRAIN),
        list(read_records(directory / TRAIN, kind)),
        list(read_records(directory / HELD_OUT, kind)),
        saved["before"],
    )


def save_task(directory: Path, request: Mapping[str, Any], task: SavedTask) -> SavedTask:
    """Writes a task into a new or empty directory, all at once; returns it as it is there."""
    task = task._replace(config=_reading_from(task.config, directory / TRAIN))
    with atomic_directory(directory) as target:
        (target / TRAIN).parent.mkdir()
        write_records(target / TRAIN, iter(task.train))
        write_records(target / HELD_OUT, iter(task.held_out))
        write_json(target / TASK, {"request": dict(request), "config": to_dict(task.config), "before": task.before})
    return task


def _reading_from(config: TrainConfig, file: Path) -> TrainConfig:
    """The run of a directory that may have been moved."""
    (stage,) = config.stages
    datasets = (dataclasses.replace(stage.datasets[0], path=str(file)),)
    return dataclasses.replace(config, stages=(dataclasses.replace(stage, datasets=datasets),))

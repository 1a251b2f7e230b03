"""Finds the tasks of MTEB by name, alone or by benchmark."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import copy
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from jina_jax.errors import how_to_install

Task = Any
"""A task object of mteb, `mteb.abstasks.AbsTask`."""

CORPUS = "corpus"
"""Name of the tasks on the bundled corpus, in place of a benchmark."""


class Selection(NamedTuple):
    """Tasks to run, by what was asked for."""

    name: str
    """Of the task or the benchmark."""
    tasks: list[Task]
    is_benchmark: bool


def mteb() -> Any:
    """Imports mteb, which an extra installs and which takes seconds."""
    try:
        import mteb
    except ImportError as error:
        raise ValueError(f"MTEB needs an extra: {how_to_install('mteb')}") from error
    return mteb


@contextmanager
def quiet() -> Iterator[None]:
    """Discards what mteb and datasets write to the terminal: a progress bar for each small step."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        yield


def select(name: str) -> Selection:
    """Returns the tasks of a name.

    Raises:
        ValueError: no task or benchmark is named so (with the nearest names), or a task has inputs
            other than text.
    """
    benchmarks = {benchmark.name: benchmark for benchmark in mteb().get_benchmarks()}
    tasks = task_names()
    if name in benchmarks:
        selection = Selection(name, [copy(task) for task in benchmarks[name].tasks], True)  # a run narrows its own
    elif name in tasks:
        selection = Selection(name, [mteb().get_task(name)], False)
    else:
        near = get_close_matches(name, [CORPUS, *benchmarks, *tasks], n=5)
        raise ValueError(f"MTEB has no task or benchmark {name!r}; " + (f"near are {near}" if near else "see mteb.get_tasks()"))
    _check_text(selection)
    return selection


def task_names() -> list[str]:
    """Names of all tasks, those that newer ones supersede among them."""
    from mteb.get_tasks import TASK_LIST

    return [task.metadata.name for task in TASK_LIST]


def parts(tasks: Iterable[Task]) -> list[Task]:
    """Returns the tasks that have data: those of an aggregate, and any other itself; none twice."""
    found: dict[str, Task] = {}
    for task in tasks:
        for part in parts(task.metadata.tasks) if task.is_aggregate else [task]:
            found.setdefault(part.metadata.name, part)
    return list(found.values())


def unique(selections: Sequence[Selection]) -> list[Task]:
    """Returns the tasks of all selections, in their order.

    Raises:
        ValueError: two of them take other subsets of one task.
    """
    found: dict[str, Task] = {}
    for task in (task for selection in selections for task in selection.tasks):
        before = found.setdefault(task.metadata.name, task)
        if set(before.hf_subsets) != set(task.hf_subsets) or set(before.eval_splits) != set(task.eval_splits):
            raise ValueError(f"two benchmarks take different languages or splits of {task.metadata.name}; run one at a time")
    return list(found.values())


def _check_text(selection: Selection) -> None:
    wrong = [task.metadata for task in selection.tasks if set(task.modalities) != {"text"}]
    if wrong:
        inputs = sorted({modality for metadata in wrong for modality in metadata.modalities} - {"text"})
        shown = ", ".join(metadata.name for metadata in wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise ValueError(f"{selection.name} needs {' and '.join(inputs)} ({shown}), and the model embeds text")

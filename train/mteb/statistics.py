"""Compares the data of a task with the statistics that mteb ships of them."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jina_jax.errors import DataError

from .names import Task, quiet

BY_SUBSET = "hf_subset_descriptive_stats"

RECOUNTED = {"unique_pairs"}
"""Figures that mteb counts in another way today than when it counted those that it ships."""


def check_statistics(task: Task) -> list[str]:
    """Checks counts, lengths, scores and labels of a task's data; names of labels are free.

    Returns:
        The subsets and splits, as SUBSET.SPLIT, that mteb has no statistics of.

    Raises:
        DataError: a figure differs; the message names the first.
    """
    unchecked = []
    for split in dict.fromkeys([*task.eval_splits, *_train_splits(task)]):
        for subset in task.hf_subsets:
            expected = _expected(task, subset, split)
            if expected is None:
                if split not in task.eval_splits:
                    continue
                unchecked.append(f"{subset}.{split}")
                continue
            name = subset if task.metadata.is_multilingual else None
            with quiet():
                found = task._calculate_descriptive_statistics_from_split(split, hf_subset=name)  # public forms write into mteb
            if difference := next(_differences(expected, found, ""), None):
                raise DataError(f"the data of {task.metadata.name} ({subset}, {split}) are not mteb's: {difference}")
    return unchecked


def _train_splits(task: Task) -> list[str]:
    """The split that classifiers are fitted on; another type of task has none."""
    return [task.train_split] if hasattr(task, "train_split") else []


def _expected(task: Task, subset: str, split: str) -> Mapping[str, Any] | None:
    statistics = (task.metadata.descriptive_stats or {}).get(split)
    if statistics is None or not task.metadata.is_multilingual:
        return statistics
    return statistics.get(BY_SUBSET, {}).get(subset)


def _differences(expected: Any, found: Any, place: str) -> Iterator[str]:
    """Yields what differs among the fields that both have: versions of mteb add some."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        if place.endswith("labels"):
            expected, found = (sorted(each["count"] for each in labels.values()) for labels in (expected, found))
            yield from _differences(expected, found, f"{place}, counts")
            return
        for name in (name for name in expected if name in found and name not in RECOUNTED):
            yield from _differences(expected[name], found[name], f"{place} {name}".strip())
    elif isinstance(expected, float) and isinstance(found, float):
        if not math.isclose(expected, found, rel_tol=1e-6, abs_tol=1e-6):
            yield f"{place} is {found}, not {expected}"
    elif expected != found:
        yield f"{place} is {found}, not {expected}"

"""From the words of a request to the adapter and the instruction of its texts."""

from typing import NamedTuple

from ..config import SIDE_TASKS, ModelConfig, Side
from ..embed.inputs import resolve_prompt
from ..embed.sides import side_options
from .errors import invalid

COHERE_INPUT_TYPES = {
    "search_query": "retrieval.query",
    "search_document": "retrieval.passage",
    "classification": "classification",
    "clustering": "separation",
}
"""Cohere's names of tasks. It has none for text-matching, which therefore goes by its own name."""

_SIDES: dict[str, Side] = {task: side for side, task in SIDE_TASKS.items()}


class Task(NamedTuple):
    """What the texts of a request are embedded with."""

    adapter: int
    """Index of the adapter, -1 = the base model."""
    prefix: str
    """Text put before each."""


def known_tasks(config: ModelConfig) -> list[str]:
    """Returns the names of tasks that a request may give: the model's, and the two sides of a
    retrieval, which a model without adapters for them embeds with its prompts."""
    return [*config.tasks, *(task for task in _SIDES if task not in config.tasks)]


def resolve_task(name: str | None, config: ModelConfig, field: str) -> Task:
    """Returns what a task's texts are embedded with; None is the base model.

    Raises:
        ApiError: the model has no such task.
    """
    if name is not None and name not in known_tasks(config):
        raise invalid(field, f"{name!r} is no task of this model; it has {known_tasks(config)}", "unknown_task")
    options = {"task": name} if name is None or name in config.tasks else side_options(config, _SIDES[name])
    task = options.get("task")
    prefix = resolve_prompt(task, options.get("prompt"), options.get("prompt_name"), config)
    return Task(-1 if task is None else config.task_index(task), prefix)


def resolve_prompt_name(name: str, config: ModelConfig, field: str) -> Task:
    """Returns what the texts of a prompt are embedded with; that of a task brings its adapter.

    Raises:
        ApiError: the model has no such prompt.
    """
    if name in known_tasks(config):
        return resolve_task(name, config, field)
    if config.prompt(name) is None:
        known = [*dict.fromkeys([*dict(config.prompts), *known_tasks(config)])]
        raise invalid(field, f"{name!r} is no prompt of this model; it has {known}", "unknown_prompt")
    return Task(-1, resolve_prompt(None, None, name, config))


def split_model_name(name: str, config: ModelConfig) -> tuple[str, str | None]:
    """Returns the name of a model and the task that it ends in, as in `NAME:retrieval.query`: most
    clients cannot send a task otherwise. An unknown ending is part of the name."""
    base, colon, task = name.rpartition(":")
    return (base, task) if colon and base and task in known_tasks(config) else (name, None)

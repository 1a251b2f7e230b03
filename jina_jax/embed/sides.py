"""The two sides of a retrieval: which task and prompt embed each, and which side texts are of."""

from typing import Any, TypedDict

from ..config import SIDE_PROMPTS, SIDE_TASKS, ModelConfig, Side
from .inputs import check_one_of, resolve_prompt


class Embedded(TypedDict):
    """What texts were embedded with, as another command needs it to embed the other side."""

    task: str | None
    """Adapter; None = the base model."""
    prompt: str
    """Text put before each input."""
    side: Side | None
    """Side of a retrieval that they are; None = neither."""


def side_options(config: ModelConfig, side: Side) -> dict[str, Any]:
    """Returns the arguments of `Embedder.encode` for a side: its task where the model has it, else
    its prompt, else no prompt at all, since the default prompt is not of a side.

    Raises:
        ValueError: there is no such side.
    """
    check_one_of("side", side, tuple(SIDE_TASKS))
    if SIDE_TASKS[side] in config.tasks:
        return {"task": SIDE_TASKS[side]}
    name = config.side_prompt(side)
    return {"prompt": ""} if name is None else {"prompt_name": name}


def encode_options(
    config: ModelConfig, *, task: str | None, prompt: str | None, prompt_name: str | None, side: Side | None
) -> dict[str, Any]:
    """Returns the arguments of `Embedder.encode` for what a command was asked for.

    Raises:
        ValueError: there is no such side.
    """
    if side is not None:
        return side_options(config, side)
    return {"task": task, "prompt": prompt, "prompt_name": prompt_name}


def check_exclusive(*, task: str | None, prompt: str | None, prompt_name: str | None, side: Side | None) -> None:
    """Raises ValueError if two options of a command are given of which each decides the same."""
    others = {"--task": task, "--prompt": prompt, "--prompt-name": prompt_name}
    given = [name for name, value in others.items() if value is not None]
    if side is not None and given:
        raise ValueError(f"--side and {given[0]} exclude each other: a side has its own task or prompt")
    if prompt is not None and prompt_name is not None:
        raise ValueError("--prompt and --prompt-name exclude each other: a prompt is given by its text or by its name")


def embedded_with(
    config: ModelConfig, *, task: str | None, prompt: str | None, prompt_name: str | None, side: Side | None
) -> Embedded:
    """Returns what texts are embedded with where a command was asked for this.

    A side that is not asked for is known by the task or the prompt name of a side, in a model that
    embeds the side with that task or, lacking it, with a prompt.

    Raises:
        ValueError: there is no such prompt or side.
    """
    options = encode_options(config, task=task, prompt=prompt, prompt_name=prompt_name, side=side)
    adapter = options.get("task")
    text = resolve_prompt(adapter, options.get("prompt"), options.get("prompt_name"), config)
    return {"task": adapter, "prompt": text, "side": side or _side(config, adapter, prompt_name)}


def _side(config: ModelConfig, task: str | None, prompt_name: str | None) -> Side | None:
    for side, side_task in SIDE_TASKS.items():
        of_task = side_options(config, side).get("task") == task
        of_prompt = prompt_name in SIDE_PROMPTS[side] or (prompt_name is None and task == side_task)
        if of_task and of_prompt:
            return side
    return None

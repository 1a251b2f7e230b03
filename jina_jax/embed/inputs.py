"""What the arguments of `Embedder.encode` come to. Each function raises ValueError where one is not valid, and says what is."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..config import ModelConfig
from ..text.tokenizer import check_unicode


def as_texts(sentences: Any) -> list[str]:
    """The texts of a call; one text counts as a list of one."""
    if isinstance(sentences, str):
        return [sentences]
    if isinstance(sentences, np.ndarray):
        sentences = sentences.tolist()  # of no dimension: one string
        if isinstance(sentences, str):
            raise ValueError("sentences is an array without dimensions; pass the string itself")
    if isinstance(sentences, bytes | dict) or not isinstance(sentences, Iterable):
        raise ValueError(f"sentences must be a string or a sequence of strings, not {type(sentences).__name__}")
    texts = list(sentences)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {index} is no string but {type(text).__name__}")
    return [str(text) for text in texts]  # numpy strings are strings, but not to the tokenizer


def with_prompts(
    texts: list[str], task: str | Sequence[str | None] | None, prompt: Any, prompt_name: Any, config: ModelConfig
) -> tuple[list[str], np.ndarray]:
    """Texts behind their instructions, and the adapter of each [n], -1 = none."""
    tasks = _tasks(task, len(texts))
    names = {*tasks, task if isinstance(task, str) else None}  # a wrong one is an error for no texts, too
    indices = {name: -1 if name is None else config.task_index(name) for name in names}
    prefixes = {name: _prefix(name, prompt, prompt_name, config) for name in indices}
    texts = [prefixes[name] + text for name, text in zip(tasks, texts, strict=True)]
    check_unicode(texts)
    return texts, np.array([indices[name] for name in tasks], np.int32)


def resolve_truncate_dim(truncate_dim: int | None, config: ModelConfig) -> int:
    """Leading dimensions to keep."""
    d, dims = config.hidden_size, config.matryoshka_dims
    dim = config.truncate_dim if truncate_dim is None else truncate_dim
    if dim is None:
        return d
    if dims and dim not in dims:
        raise ValueError(f"truncate_dim {dim!r} is not one of the model's dimensions {list(dims)}")
    if not is_int(dim) or not 1 <= dim <= d:
        raise ValueError(f"truncate_dim must be an integer in 1..{d}, not {dim!r}")
    return int(dim)


def resolve_max_length(max_length: int | None, most: int) -> int:
    """Most tokens of a text, of those that the model takes."""
    if max_length is None:
        return most
    if not is_int(max_length) or not 2 <= max_length <= most:
        raise ValueError(f"max_length must be an integer in 2..{most}, not {max_length!r}")
    return int(max_length)


def is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_one_of(name: str, value: Any, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; use one of {list(valid)}")


def _tasks(task: Any, texts: int) -> list[str | None]:
    """A task for each text."""
    if task is None or isinstance(task, str):
        return [task] * texts
    if not isinstance(task, Iterable):
        raise ValueError(f"task must be a name, or one for each text, not {type(task).__name__}")
    tasks = list(task)
    if len(tasks) != texts:
        raise ValueError(f"there are {len(tasks)} tasks for {texts} texts")
    if wrong := [name for name in tasks if name is not None and not isinstance(name, str)]:
        raise ValueError(f"a task is a name or None, not {wrong[0]!r}")
    return tasks


def _prefix(task: str | None, prompt: str | None, prompt_name: str | None, config: ModelConfig) -> str:
    if prompt is not None:
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be a string, not {type(prompt).__name__}")
        return prompt
    name = prompt_name or task or config.default_prompt
    if name is None:
        return ""
    text = config.prompt(name)
    if text is None and name == prompt_name:
        known = [known for known, _ in config.prompts]
        raise ValueError(f"unknown prompt_name {prompt_name!r}; this model has {known or 'no prompts'}")
    return text or ""

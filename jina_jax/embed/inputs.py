"""Validates and normalises the arguments of `Embedder.encode`. A ValueError says what would be
valid."""

import logging
from collections.abc import Iterable, Sequence, Set
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ..config import ModelConfig
from ..errors import did_you_mean
from ..text.tokenizer import check_unicode
from .quantize import EMBEDDING_PRECISIONS, EmbeddingPrecision, parse_ranges

logger = logging.getLogger(__name__)


class Request(NamedTuple):
    """The texts of a call to `encode`, ready to be tokenised."""

    texts: list[str]
    """Each behind its instruction or prompt."""
    adapter_ids: Int[np.ndarray, " n"]
    """Adapter of each text, -1 = none."""
    max_length: int
    """Tokens of a text that are kept, special tokens included."""
    batch_size: int


class Output(NamedTuple):
    """The form of a call's result."""

    token_embeddings: bool
    """Token states in place of one vector a text."""
    dim: int
    """Leading dimensions to keep."""
    normalize: bool
    precision: EmbeddingPrecision
    ranges: Float[np.ndarray, "2 d"] | None
    """Least and largest value of each dimension, for int8 and uint8; None = those of the call."""
    single: bool
    """One text was given as a string: the result is its vector."""
    as_list: bool
    """A list of vectors in place of a matrix."""


def parse_request(
    sentences: Any, task: Any, prompt: Any, prompt_name: Any, batch_size: Any, max_length: Any, config: ModelConfig, limit: int
) -> Request:
    """Returns the texts of a call with their instructions, adapters and limits; `limit` is the
    model's of tokens."""
    if not is_int(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, and an integer, not {batch_size!r}")
    texts, adapter_ids = with_prompts(as_texts(sentences), task, prompt, prompt_name, config)
    return Request(texts, adapter_ids, resolve_max_length(max_length, limit), int(batch_size))


def parse_output(
    sentences: Any,
    truncate_dim: Any,
    normalize: bool,
    precision: Any,
    ranges: Any,
    output_value: Any,
    convert_to_numpy: bool,
    config: ModelConfig,
) -> Output:
    """Returns the form that a call asks for."""
    dim = resolve_truncate_dim(truncate_dim, config)
    check_one_of("precision", precision, EMBEDDING_PRECISIONS)
    check_one_of("output_value", output_value, ("sentence_embedding", "token_embeddings"))
    if output_value == "token_embeddings" and precision != "float32":
        raise ValueError("token_embeddings come in float32 only")
    single = isinstance(sentences, str)
    ranges = parse_ranges(ranges, precision, dim)
    return Output(output_value == "token_embeddings", dim, normalize, precision, ranges, single, not convert_to_numpy)


def as_texts(sentences: Any) -> list[str]:
    """Returns the texts of a call; one string counts as a list of one."""
    if isinstance(sentences, str):
        return [sentences]
    if isinstance(sentences, np.ndarray):
        sentences = sentences.tolist()  # of no dimension: one string
        if isinstance(sentences, str):
            raise ValueError("sentences is an array without dimensions; pass the string itself")
    if isinstance(sentences, Set):
        raise ValueError(f"sentences must be in an order, and a {type(sentences).__name__} has none; pass a list")
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
    """Returns texts behind their instructions, and the adapter of each [n], -1 = none."""
    tasks = _tasks(task, len(texts))
    # a wrong one is an error for no texts, too
    names = {*tasks, task if isinstance(task, str) else None}
    indices = {name: -1 if name is None else config.task_index(name) for name in names}
    prefixes = {name: resolve_prompt(name, prompt, prompt_name, config) for name in indices}
    texts = [prefixes[name] + text for name, text in zip(tasks, texts, strict=True)]
    check_unicode(texts)
    return texts, np.array([indices[name] for name in tasks], np.int32)


def resolve_prompt(task: str | None, prompt: Any, prompt_name: Any, config: ModelConfig) -> str:
    """Returns the text put before each input: the prompt, else that of the name, else the task's
    instruction; for the base model the default prompt.

    Raises:
        ValueError: the prompt is no string, or the model has none of that name.
    """
    if prompt is not None:
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be a string, not {type(prompt).__name__}")
        return prompt
    if prompt_name is not None:
        known = dict(config.prompts)
        if not isinstance(prompt_name, str) or prompt_name not in known:
            near = did_you_mean(prompt_name, known)
            raise ValueError(f"unknown prompt_name {prompt_name!r}; this model has {[*known] or 'no prompts'}{near}")
        return known[prompt_name]
    name = config.default_prompt if task is None else task
    return "" if name is None else config.prompt(name) or ""


def resolve_truncate_dim(truncate_dim: int | None, config: ModelConfig) -> int:
    """Returns how many leading dimensions to keep: any from 1 to all. One that the model does not
    list is logged, once."""
    d, dims = config.hidden_size, config.matryoshka_dims
    dim = config.truncate_dim if truncate_dim is None else truncate_dim
    if dim is None:
        return d
    if not is_int(dim) or not 1 <= dim <= d:
        raise ValueError(f"truncate_dim must be an integer in 1..{d}, not {dim!r}")
    if dims and dim not in dims:
        _say_unlisted(int(dim), dims)
    return int(dim)


@cache
def _say_unlisted(dim: int, dims: tuple[int, ...]) -> None:
    logger.warning("truncate_dim %d is not one of the dimensions that the model was trained at: %s", dim, list(dims))


def resolve_max_length(max_length: int | None, limit: int) -> int:
    """Returns how many tokens of a text to keep at most; `limit` is the model's."""
    if max_length is None:
        return limit
    if not is_int(max_length) or not 2 <= max_length <= limit:
        raise ValueError(f"max_length must be an integer in 2..{limit}, not {max_length!r}")
    return int(max_length)


def is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_one_of(name: str, value: Any, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; use one of {list(valid)}{did_you_mean(value, valid)}")


def _tasks(task: Any, texts: int) -> list[str | None]:
    """A task for each text."""
    if task is None or isinstance(task, str):
        return [task] * texts
    if not isinstance(task, Iterable):
        raise ValueError(f"task must be a name, or one for each text, not {type(task).__name__}")
    if isinstance(task, Set):
        raise ValueError(f"tasks must be in the order of the texts, and a {type(task).__name__} has none; pass a list")
    tasks = list(task)
    if len(tasks) != texts:
        raise ValueError(f"there are {len(tasks)} tasks for {texts} texts")
    if wrong := [name for name in tasks if name is not None and not isinstance(name, str)]:
        raise ValueError(f"a task is a name or None, not {wrong[0]!r}")
    return tasks

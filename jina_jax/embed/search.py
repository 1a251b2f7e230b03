"""Searches embeddings: how the query is embedded, and which rows are most similar to it."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ..config import ModelConfig, Side
from ..errors import DataError
from .inputs import resolve_prompt
from .sides import Embedded, side_options

OTHER_SIDE: dict[Side, Side] = {"query": "document", "document": "query"}


class Hit(NamedTuple):
    """A row that was found."""

    score: float
    row: int
    """Its number over all blocks, from 0."""
    id: Any


def top_k(
    query: Float[np.ndarray, " d"], blocks: Iterable[tuple[Sequence[Any], Float[np.ndarray, "_ d"]]], k: int
) -> list[Hit]:
    """Returns the k rows whose dot product with the query is largest, the best first.

    Of embeddings of length 1 it is the cosine. Rows of equal score are in their order, and equal
    rows have equal scores, whatever their blocks. No more than k rows and a block are in memory.

    Args:
        query: float32.
        blocks: ids and embeddings (float32) of some rows each; ids may be anything.
        k: how many rows to return; where there are fewer, all.

    Raises:
        ValueError: `k` is below 1, or a block does not fit the query or its ids.
        DataError: an embedding is not finite; the message has its id.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if not np.isfinite(query).all():
        raise ValueError("the query's embedding holds NaN or infinity")
    best: list[Hit] = []
    rows = 0
    for ids, embeddings in blocks:
        if embeddings.shape != (len(ids), len(query)):
            raise ValueError(f"a block must be [{len(ids)}, {len(query)}], ids by dimensions, not {embeddings.shape}")
        scores = _scores(query, embeddings)
        if len(wrong := np.flatnonzero(~np.isfinite(scores))):
            raise DataError(f"the embedding of {ids[wrong[0]]} holds NaN, infinity or numbers too large to multiply")
        hits = [Hit(float(scores[row]), rows + int(row), ids[row]) for row in _candidates(scores, k)]
        best = sorted([*best, *hits], key=lambda hit: -hit.score)[:k]  # stable: equal ones stay in order
        rows += len(ids)
    return best


def query_side(config: ModelConfig, embedded: Embedded) -> Side | None:
    """Returns the side that a query to texts which were embedded so is on.

    Texts that were given no side, but the task and prompt of documents, are documents. None = there
    is no other side: the query is embedded as the texts were.

    Raises:
        ValueError: the texts have the prompt of a side, and the model has none for either. It had
            them as it was loaded then, by its hub id.
    """
    side, given = embedded["side"], (embedded["task"], embedded["prompt"])
    if side is None:
        return "query" if has_sides(config) and _task_and_prompt(config, "document") == given else None
    if not has_sides(config) and _task_and_prompt(config, side) != given:
        raise ValueError(
            f"the texts were embedded with the prompt {embedded['prompt']!r}, and the model has no prompts where it is loaded "
            "from; give it by the same hub id, or a copy with its prompts in config_sentence_transformers.json"
        )
    return OTHER_SIDE[side]


def has_sides(config: ModelConfig) -> bool:
    """True if the model embeds queries and documents differently."""
    return _task_and_prompt(config, "query") != _task_and_prompt(config, "document")


def _task_and_prompt(config: ModelConfig, side: Side) -> tuple[str | None, str]:
    options = side_options(config, side)
    task = options.get("task")
    return task, resolve_prompt(task, options.get("prompt"), options.get("prompt_name"), config)


def _scores(query: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """Dot products [n]. A matrix product rounds a row by its place: equal ones would differ."""
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found in the scores
        return np.einsum("nd,d->n", embeddings, query)


def _candidates(scores: np.ndarray, k: int) -> np.ndarray:
    """Rows that may be among the k best: those from the k-th largest score on."""
    if len(scores) <= k:
        return np.arange(len(scores))
    return np.flatnonzero(scores >= np.partition(scores, -k)[-k])

"""Scores of a model.

Chooses the adapters that are measured on each task, and makes the embeddings that they need.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from jina_jax import Embedder, ModelConfig
from jina_jax.embed.similarity import normalize

from .scores import Score, System
from .tasks import EvalTask

TEXTS_PER_CALL = 1024
"""Texts of one call of `Embedder.encode`; the progress bar moves after each call."""


class Sides(NamedTuple):
    """Adapters that embed the two sides of a task; None is the base model."""

    name: str
    left: str | None
    right: str | None
    prompts: tuple[str | None, str | None] = (None, None)
    """Texts put before the inputs of the two sides; None = as `Embedder.encode` has it."""


BASE = Sides("none", None, None)


def base_sides(config: ModelConfig, task: str) -> Sides:
    """Returns the base model with its prompts, if it has any for queries or documents.

    Those are for the two sides of retrieval. In the other tasks, whose sides are alike, both have
    the prompt for queries, as the authors of E5 use it.
    """
    names = config.side_prompt("query"), config.side_prompt("document")
    if names == (None, None):
        return BASE
    query, document = ("" if name is None else config.prompt(name) for name in names)
    return BASE._replace(prompts=(query, document if task == "retrieval" else query))


def both_sides(adapter: str) -> Sides:
    """Returns one adapter for both sides."""
    return Sides(adapter, adapter, adapter)


OWN_ADAPTERS = {
    "retrieval": (
        Sides("retrieval.query+retrieval.passage", "retrieval.query", "retrieval.passage"),
        both_sides("retrieval.query"),
        both_sides("retrieval.passage"),
    ),
    "classification": (both_sides("classification"),),
    "clustering": (both_sides("separation"), both_sides("classification")),
    "similarity": (both_sides("text-matching"),),
}
"""Adapters trained for each task; the first is the one to use."""


class Run(NamedTuple):
    """One task, embedded with one choice of adapters, at some dimensions."""

    task: EvalTask
    sides: Sides
    dims: tuple[int, ...]


def matryoshka_dims(config: ModelConfig) -> tuple[int, ...]:
    """Dimensions that a model is measured at, in ascending order.

    A model that lists none is measured at its full dimension.
    """
    return tuple(sorted(config.matryoshka_dims)) or (config.hidden_size,)


def planned_runs(
    task: EvalTask, adapters: Sequence[str], dims: tuple[int, ...], every_adapter: bool, base: Sides = BASE
) -> Iterator[Run]:
    """Yields runs of the base and of the task's adapters at all dimensions, others at the largest.

    Args:
        task: the task to measure.
        adapters: those that the model has.
        dims: ascending.
        every_adapter: also yields the adapters of other tasks. Those of no known task are always
            measured.
        base: the base model, with its prompts for the task.
    """
    yield Run(task, base, dims)
    own = [sides for sides in OWN_ADAPTERS[task.name] if {sides.left, sides.right} <= set(adapters)]
    yield from (Run(task, sides, dims) for sides in own)
    known = {sides for known in OWN_ADAPTERS.values() for sides in known}
    for sides in map(both_sides, adapters):
        if sides not in own and (every_adapter or sides not in known):
            yield Run(task, sides, dims[-1:])


def model_scores(
    system: System,
    embedder: Embedder,
    tasks: Sequence[EvalTask],
    adapters: Sequence[str],
    *,
    every_adapter: bool = False,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = False,
) -> list[Score]:
    """Scores of a model; each text is embedded once under each adapter and prompt that needs it.

    Raises:
        ValueError: an embedding is not finite.
    """
    config, dims = embedder.config, matryoshka_dims(embedder.config)
    runs = [run for task in tasks for run in planned_runs(task, adapters, dims, every_adapter, base_sides(config, task.name))]
    embeddings = TextEmbeddings(embedder, runs, batch_size, f"Embedding ({system})", progress, max_length)
    scores = []
    for task, sides, dims in tqdm(runs, f"Scoring ({system})", unit="run", disable=not progress):
        for dim in dims:
            left = embeddings.lookup(task.left, sides.left, dim, sides.prompts[0])
            right = embeddings.lookup(task.right, sides.right, dim, sides.prompts[1])
            value = task.score(left, right)
            scores.append(Score(system, task.name, task.subset, sides.name, dim, task.metric, value, task.n))
    return scores


class TextEmbeddings:
    """Embeddings of all texts that runs need, under the adapters and prompts that the runs use."""

    def __init__(
        self,
        embedder: Embedder,
        runs: Sequence[Run],
        batch_size: int,
        title: str,
        progress: bool,
        max_length: int | None = None,
    ):
        self._rows: dict[tuple[str | None, str | None], dict[str, int]] = {}
        for task, sides, _ in runs:
            for texts, adapter, prompt in zip((task.left, task.right), (sides.left, sides.right), sides.prompts, strict=True):
                rows = self._rows.setdefault((adapter, prompt), {})
                for text in texts:
                    rows.setdefault(text, len(rows))
        total = sum(map(len, self._rows.values()))
        with tqdm(total=total, desc=title, unit="text", disable=not progress) as bar:
            self._arrays = {
                key: np.concatenate(list(_blocks(embedder, list(rows), *key, batch_size, max_length, bar)))
                for key, rows in self._rows.items()
            }

    def lookup(
        self, texts: Sequence[str], adapter: str | None, dim: int, prompt: str | None = None
    ) -> Float[np.ndarray, "n dim"]:
        """Leading dimensions, normalised, equal to `Embedder.encode` with `truncate_dim`."""
        rows = [self._rows[adapter, prompt][text] for text in texts]
        return normalize(self._arrays[adapter, prompt][rows, :dim])


def _blocks(
    embedder: Embedder,
    texts: list[str],
    adapter: str | None,
    prompt: str | None,
    batch_size: int,
    max_length: int | None,
    bar: tqdm,
) -> Iterable[Float[np.ndarray, "n d"]]:
    full = matryoshka_dims(embedder.config)[-1]
    for start in range(0, len(texts), TEXTS_PER_CALL):
        block = texts[start : start + TEXTS_PER_CALL]
        embeddings = embedder.encode(
            block,
            adapter,
            prompt=prompt,
            batch_size=batch_size,
            truncate_dim=full,
            max_length=max_length,
            show_progress_bar=False,
        )
        if not np.isfinite(embeddings).all():
            raise ValueError(f"the model gives embeddings that are not finite (adapter: {adapter or 'none'})")
        bar.update(len(block))
        yield embeddings

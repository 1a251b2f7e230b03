"""Scores and searches of adapters beside their base, in minutes on a CPU.

Each adapter is measured on the task that it was trained for. Smaller dimensions are cut from the
same embeddings.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jina_jax import ModelConfig
from jina_jax.embed.search import top_k
from jina_jax.embed.similarity import normalize

from ..data.corpus import SEED, Package
from .bm25 import bm25_score
from .classification import classification_tasks, clustering_tasks
from .kept_embeddings import KeptEmbeddings, Side
from .model_scores import OWN_ADAPTERS, Run, Sides, base_sides
from .retrieval import Retrieval, retrieval_tasks
from .scores import Score
from .similarity import similarity_tasks
from .tasks import EvalTask

LANGUAGES = ("en", "de", "fr", "ja", "ru")
"""Languages of the titles that retrieval is measured with, where the packages have them."""

SAMPLE = 800
"""Packages that the other tasks are measured on: they need more texts a package."""

SEARCHES = (
    "edit photos and pictures",
    "Programm zum Herunterladen von Dateien aus dem Internet",
    "音楽プレーヤー",
)
"""Queries to show, in English, German (a program that downloads files from the internet) and
Japanese (a music player)."""


class Result(NamedTuple):
    """A package that was found, and the cosine of its English body with the query."""

    score: float
    id: str
    title: str


def sampled_tasks(packages: Sequence[Package], train_packages: Sequence[Package]) -> list[EvalTask]:
    """Returns retrieval of all packages, and the other tasks on a sample; all over English texts.

    Args:
        packages: those of the split to measure.
        train_packages: the classifier is fitted on a sample of these.
    """
    subsets = [language if language == "en" else f"{language}-en" for language in LANGUAGES]
    found = {task.subset: task for task in retrieval_tasks(packages)}
    order = np.random.default_rng(SEED).permutation(len(packages))[:SAMPLE]
    sample = [packages[index] for index in sorted(order)]
    return [
        *(found[subset] for subset in subsets if subset in found),
        *classification_tasks(sample, train_packages),
        *clustering_tasks(sample),
        *(task for task in similarity_tasks(sample) if task.subset == "en"),
    ]


def before_after_runs(tasks: Sequence[EvalTask], base: ModelConfig, dims: Sequence[int]) -> list[Run]:
    """Returns runs of the base, with its prompts, and of each task's own adapter."""
    return [
        Run(task, sides, tuple(dims)) for task in tasks for sides in (base_sides(base, task.name), OWN_ADAPTERS[task.name][0])
    ]


def before_after_scores(runs: Sequence[Run], embeddings: KeptEmbeddings, *, progress: bool) -> list[Score]:
    """Scores of BM25, the base and the adapters; those texts are embedded that were not yet."""
    embeddings.add((side for run in runs for side in _sides(run)), "Embedding", progress=progress)
    # A task has several runs, and one score of BM25.
    retrieval = {id(run.task): run.task for run in runs if isinstance(run.task, Retrieval)}
    return [*map(bm25_score, retrieval.values()), *(score for run in runs for score in _scores(run, embeddings))]


def search(
    queries: Sequence[str], packages: Sequence[Package], sides: Sides, embeddings: KeptEmbeddings, top: int, *, progress: bool
) -> list[list[Result]]:
    """Returns the packages whose English bodies are nearest to each query."""
    left = Side(queries, sides.left, sides.prompts[0])
    right = Side([package.text["en"].body for package in packages], sides.right, sides.prompts[1])
    embeddings.add((left, right), "Embedding", progress=progress)
    bodies = embeddings.get(right)
    return [
        [Result(hit.score, hit.id.id, hit.id.text["en"].title) for hit in top_k(query, [(packages, bodies)], top)]
        for query in embeddings.get(left)
    ]


def _scores(run: Run, embeddings: KeptEmbeddings) -> Iterator[Score]:
    left_side, right_side = _sides(run)
    left = embeddings.get(left_side)
    right = embeddings.get(right_side) if right_side.texts else left[:0]  # clusters have one side
    for dim in run.dims:
        value = run.task.score(normalize(left[:, :dim]), normalize(right[:, :dim]))
        yield Score("model", run.task.name, run.task.subset, run.sides.name, dim, run.task.metric, value, run.task.n)


def _sides(run: Run) -> tuple[Side, Side]:
    task, sides = run.task, run.sides
    return Side(task.left, sides.left, sides.prompts[0]), Side(task.right, sides.right, sides.prompts[1])

"""Scores of multilingual-e5-small on tasks of MTEB, beside those that MTEB publishes of it.

    jina-jax demo-model runs/e5-small
    JINA_JAX_MTEB_DATA=DIR python -m benchmarks.published_scores runs/e5-small \
        --json benchmarks/results/published_scores.json

The packaged weights are the published ones in 4 bits: a score may differ by a point. DIR has a
folder for each task, of records: sentence1 and sentence2, for STS with a score; text and label;
documents (id, text) and queries (id, text, doc).

The protocols are MTEB's. All texts of symmetric tasks stand behind the prompt of queries, as the
model's authors say.
"""

import json
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import f1_score

from jina_jax import Embedder
from jina_jax.command import Command
from jina_jax.text.readers import read_records
from train.evaluation.few_shot import few_shot_accuracies
from train.evaluation.retrieval import ndcg_at_10

from .machine import machine, versions

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "scikit-learn")
DATA = "JINA_JAX_MTEB_DATA"
MARGIN = 1.0
"""How many points a score may lie below the published one."""

Encode = Callable[[Sequence[str]], np.ndarray]


class Published(NamedTuple):
    """A task: how it is scored, its files, and the published score of multilingual-e5-small."""

    score: Callable[["Model", Path, str], float]
    files: str
    """Folder of the task, and the subset in it."""
    published: float


class Model(NamedTuple):
    """The ways to embed the texts of a task."""

    query: Encode
    document: Encode


def score_tasks(model: Model, data: Path, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Scores a model on tasks of `TASKS`, each in percent beside the published score."""
    rows = []
    for name in tasks:
        task = TASKS[name]
        folder, _, subset = task.files.partition("/")
        score = 100 * task.score(model, data / folder, subset)
        rows.append({"task": name, "score": round(score, 2), "published": task.published})
        click.echo(rows[-1], err=True)
    return rows


def model_of(embedder: Embedder) -> Model:
    return Model(embedder.encode_query, embedder.encode_document)


def sts(model: Model, folder: Path, subset: str) -> float:
    """Spearman correlation of cosines and scores."""
    left, right, scores = _columns(folder / f"{subset}.jsonl", "sentence1", "sentence2", "score")
    cosines = np.einsum("pd,pd->p", model.query(left), model.query(right))
    return float(spearmanr(cosines, scores)[0])  # type: ignore[arg-type]


def bitext(model: Model, folder: Path, subset: str) -> float:
    """Weighted F1 of each sentence's nearest translation."""
    left, right = _columns(folder / f"{subset}.jsonl", "sentence1", "sentence2")
    nearest = (model.query(left) @ model.query(right).T).argmax(axis=1)
    return float(f1_score(np.arange(len(left)), nearest, average="weighted", zero_division=0.0))  # type: ignore[arg-type]


def retrieval(model: Model, folder: Path, subset: str) -> float:
    """nDCG@10 of documents by their queries; queries of equal text are one."""
    ids, documents = _columns(folder / f"{subset}.docs.jsonl", "id", "text")
    queries, relevant = _columns(folder / f"{subset}.queries.jsonl", "text", "doc")
    relevant = dict(zip(queries, relevant, strict=True))
    embedded = model.document([text.strip() for text in documents])
    asked = model.query([text.strip() for text in relevant])
    index = {name: number for number, name in enumerate(ids)}
    return ndcg_at_10(lambda rows: asked[rows] @ embedded.T, np.array([index[name] for name in relevant.values()]))


def classification(model: Model, folder: Path, _: str) -> float:
    """Mean accuracy of classifiers, each fitted on another draw of eight texts a class."""
    texts, labels = _columns(folder / "train.jsonl", "text", "label")
    test_texts, test_labels = _columns(folder / "test.jsonl", "text", "label")
    return float(np.mean(few_shot_accuracies(model.query, texts, labels, test_texts, test_labels)))


TASKS = {
    "STSBenchmark": Published(sts, "stsb_multi/en.test", 83.59),
    "STS16": Published(sts, "sts16/STS16", 83.49),
    "Banking77Classification": Published(classification, "banking77/", 70.64),
    # Published is the mean of 2 of the task's 12 languages, and not which.
    "XQuADRetrieval (en)": Published(retrieval, "xquad/en", 95.1),
    "XQuADRetrieval (de)": Published(retrieval, "xquad/de", 95.1),
    "Tatoeba (deu-eng)": Published(bitext, "tatoeba/deu-eng", 97.35),
    "Tatoeba (rus-eng)": Published(bitext, "tatoeba/rus-eng", 89.92),
}
"""Scores of embeddings-benchmark/results at f4cc6c8b (CC0)."""


def _columns(file: Path, *names: str) -> list[list[Any]]:
    records = [fields for _, fields in read_records(file)]
    return [[fields[name] for fields in records] for name in names]


@click.command(cls=Command)
@click.argument("model")
@click.option("--data", type=click.Path(path_type=Path, exists=True), envvar=DATA, required=True, help=f"Default: ${DATA}.")
@click.option("--task", "tasks", type=click.Choice([*TASKS]), multiple=True, help="Default: all.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(model: str, data: Path, tasks: Sequence[str], dtype: str, out: Path | None) -> None:
    """Score MODEL, print a table, and exit with 1 if a score is more than a point below."""
    embedder = Embedder.load(model, dtype=dtype)
    rows = score_tasks(model_of(embedder), data, tasks or [*TASKS])
    click.echo("| task | score | published |\n|---|---|---|")
    for row in rows:
        click.echo(f"| {row['task']} | {row['score']:.2f} | {row['published']:.2f} |")
    if out:
        report = {"machine": machine(), "date": str(date.today()), "dtype": dtype, "versions": versions(PACKAGES)}
        out.write_text(json.dumps(report | {"tasks": rows}, indent=2) + "\n")
    raise SystemExit(any(row["score"] < row["published"] - MARGIN for row in rows))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.published_scores")

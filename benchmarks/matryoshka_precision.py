"""Retrieval with fewer dimensions and fewer bits, as in Table 7 of the paper of jina-embeddings-v3.

    jina-jax demo-model runs/e5-small
    python -m benchmarks.matryoshka_precision runs/e5-small \
        --json benchmarks/results/matryoshka_precision.json

English bodies of the bundled corpus' test split are found by their titles, in English (en) and in
the other languages (X-en, the mean over them), by nDCG@10. Embeddings are cut, normalised, then
quantised: documents and queries alike, int8 between the ends of the documents' ranges. int8 is
searched by what its steps stand for, bits by the number that differ. With rescoring, the queries in
float32 order the best of that search anew, by what the documents' codes stand for: no more is
stored of a document.
"""

import json
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import click
import numpy as np

from jina_jax import Embedder
from jina_jax.command import Command, max_length_option, model_options
from jina_jax.embed.quantize import EmbeddingPrecision, dequantize, quantize
from jina_jax.embed.similarity import normalize
from train.data.corpus import BUNDLED, read_corpus
from train.evaluation.retrieval import Retrieval, ndcg_at_10, retrieval_tasks

from .machine import machine, versions

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "scikit-learn")
DIMS = (32, 64, 128, 256)
"""Dimensions that are measured beside a model's own, where it has more."""

PRECISIONS: tuple[EmbeddingPrecision, ...] = ("float32", "int8", "binary")
RESCORED = 40
"""Documents that are ordered anew: four times those that nDCG@10 looks at."""

BELOW_ALL = -2.0
"""Score of documents that are not ordered anew; no cosine is as low."""

Search = Callable[[np.ndarray], np.ndarray]
"""Scores [q, c] of all documents for some queries."""


class Stored(NamedTuple):
    """Documents in one precision."""

    search: Search
    """By the codes of both sides."""
    rescore: Search
    """By float32 queries and what the documents' codes stand for."""
    bytes_per_text: int


def store(documents: np.ndarray, precision: EmbeddingPrecision) -> Stored:
    """Quantises documents [c, d] and returns how they are searched."""
    dim = documents.shape[1]
    ranges = np.stack([documents.min(axis=0), documents.max(axis=0)]) if precision == "int8" else None
    codes = quantize(documents, precision, ranges)
    values = normalize(dequantize(codes, precision, dim, ranges))

    def search(queries: np.ndarray) -> np.ndarray:
        own = dequantize(quantize(queries, precision, ranges), precision, dim, ranges)
        return normalize(own) @ values.T

    return Stored(search, lambda queries: queries @ values.T, codes[:1].nbytes)


def rescored(stored: Stored, most: int = RESCORED) -> Search:
    """Returns a search that orders the `most` best documents of another anew."""

    def search(queries: np.ndarray) -> np.ndarray:
        found = stored.search(queries)
        first = np.argsort(-found, axis=1, kind="stable")[:, :most]
        scores = np.full_like(found, BELOW_ALL)
        np.put_along_axis(scores, first, np.take_along_axis(stored.rescore(queries), first, axis=1), axis=1)
        return scores

    return search


def measure(embedder: Embedder, tasks: Sequence[Retrieval], max_length: int | None) -> list[dict[str, Any]]:
    """Scores of all dimensions and precisions on retrieval tasks that share their documents."""
    documents = embedder.encode_document(tasks[0].right, max_length=max_length)
    queries = [embedder.encode_query(task.left, max_length=max_length) for task in tasks]
    rows = []
    for dim in _dims(embedder, documents.shape[1]):
        cut = [normalize(each[:, :dim]) for each in queries]
        for precision in PRECISIONS:
            stored = store(normalize(documents[:, :dim]), precision)
            for again in (False,) if precision == "float32" else (False, True):
                search = rescored(stored) if again else stored.search
                scores = {task.subset: _ndcg(search, own, task) for task, own in zip(tasks, cut, strict=True)}
                others = [value for subset, value in scores.items() if subset != "en"]
                row = {"dim": dim, "precision": precision, "rescored": again, "bytes_per_text": stored.bytes_per_text}
                rows.append(row | {"en": round(100 * scores["en"], 2), "X-en": round(100 * fmean(others), 2)})
                click.echo(rows[-1], err=True)
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Table with a row for each dimension, and a column for each way to search it."""
    found = {(row["dim"], row["precision"], row["rescored"]): row for row in rows}
    ways = list(dict.fromkeys((row["precision"], row["rescored"]) for row in rows))
    headings = [f"{precision}{', rescored' if again else ''}" for precision, again in ways]
    lines = [f"| dimensions | subset | {' | '.join(headings)} |", f"|---:|---|{'---:|' * len(ways)}"]
    for dim in sorted({row["dim"] for row in rows}, reverse=True):
        for subset in ("en", "X-en"):
            cells = [f"{found[dim, *way][subset]:.2f}" for way in ways]
            lines.append(f"| {dim} | {subset} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ndcg(search: Search, queries: np.ndarray, task: Retrieval) -> float:
    return ndcg_at_10(lambda rows: search(queries[rows]), task.relevant)


def _dims(embedder: Embedder, full: int) -> list[int]:
    """The model's Matryoshka dimensions, else `DIMS` and all of them."""
    listed = embedder.config.matryoshka_dims
    return sorted(listed) if listed else [*(dim for dim in DIMS if dim < full), full]


@click.command(cls=Command)
@click.argument("model")
@model_options
@max_length_option
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(model: str, dtype: str | None, revision: str | None, max_length: int | None, out: Path | None) -> None:
    """Measure MODEL, with its adapters for retrieval where it has them, and print a table."""
    tasks = list(retrieval_tasks([package for package in read_corpus(BUNDLED, "test") if "en" in package.text]))
    embedder = Embedder.load(model, dtype=dtype, revision=revision)
    rows = measure(embedder, tasks, max_length)
    click.echo(markdown(rows))
    if out:
        report = {"machine": machine(), "date": str(date.today()), "dtype": str(np.dtype(embedder.encoder.dtype))}
        adapters = list(embedder.config.tasks)
        report |= {"model": Path(model).name, "adapters": adapters, "versions": versions(PACKAGES), "rows": rows}
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.matryoshka_precision")

"""Retrieval of whole meetings (MTEB LEMBQMSumRetrieval): cut, in chunks, in late chunks, by words.

    jina-jax demo-model runs/e5-small
    JINA_JAX_MTEB_DATA=DIR python -m benchmarks.long_documents runs/e5-small \
        --json benchmarks/results/long_documents.json

DIR/qmsum has docs.jsonl.xz (id, text) and queries.jsonl (text, doc). A query is the summary of a
part of a meeting. A meeting in chunks scores as its best chunk. Chunks cost a pass over all that is
said, so they are compared on some meetings, drawn by a fixed seed and scored among themselves;
what is cheap is scored on all, too, as MTEB does.

jina-embeddings-v3 reads 8,192 tokens at once, which is the same command with its weights; `python
-m benchmarks.cpu_inference make DIR` writes a random model of its size.
"""

import json
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from jaxtyping import Float

from jina_jax import Embedder
from jina_jax.command import Command
from jina_jax.embed.sides import side_options
from jina_jax.text.chunking import by_tokens
from jina_jax.text.readers import read_records
from train.evaluation.bm25 import bm25_score
from train.evaluation.retrieval import Retrieval, ndcg_at_10

from .machine import machine, versions

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "bm25s")
DATA = "JINA_JAX_MTEB_DATA"
LONG = 8192
PUBLISHED = {"cut": 21.51, "bm25": 83.23}
"""multilingual-e5-small and BM25 in embeddings-benchmark/results at f4cc6c8b (CC0)."""

SEED = 0
CHUNKED = {"naive": {"late": False}, "framed": {"windows": "framed"}, "plain": {"windows": "plain"}}
"""Options of `Embedder.encode_chunks`."""

NAMES = {
    "cut": "cut at the limit",
    "naive": "chunks, each by itself",
    "framed": "late chunks, framed windows",
    "plain": "late chunks, plain windows",
    "bm25": "BM25",
}
NOT_RUN = "not run: weights not at hand"


class Way(NamedTuple):
    """A way to embed meetings, and what came of it."""

    way: str
    meetings: int
    score: float
    """nDCG@10 in percent."""
    seconds: float
    vectors: int | None = None


def load_meetings(folder: Path, count: int | None = None) -> Retrieval:
    """Returns the task of all meetings, or of `count` of them, drawn by the seed."""
    documents = {fields["id"]: fields["text"] for _, fields in read_records(folder / "docs.jsonl.xz")}
    chosen = [*documents] if count is None else random.Random(SEED).sample(sorted(documents), count)
    number = {name: index for index, name in enumerate(chosen)}
    queries = [fields for _, fields in read_records(folder / "queries.jsonl") if fields["doc"] in number]
    relevant = np.array([number[query["doc"]] for query in queries])
    return Retrieval("en", [query["text"] for query in queries], [documents[name] for name in chosen], relevant)


def best_chunks(
    queries: Float[np.ndarray, "q d"], chunks: Sequence[Float[np.ndarray, "_ d"]]
) -> Callable[[slice], Float[np.ndarray, "_ c"]]:
    """Returns the scores of documents for a slice of the queries: those of their best chunks."""
    starts = np.cumsum([0, *map(len, chunks[:-1])])
    flat = np.concatenate(chunks)
    return lambda rows: np.maximum.reduceat(queries[rows] @ flat.T, starts, axis=1)


def score_model(
    embedder: Embedder, task: Retrieval, ways: Sequence[str], chunk_tokens: int, overlap: int | None
) -> Iterator[Way]:
    """Scores ways to embed the documents of a task, the queries as queries."""
    queries = embedder.encode_query(task.left) if ways else np.zeros((0, 1), np.float32)
    for way in ways:
        began = time.perf_counter()
        chunks = _embed(embedder, task.right, way, chunk_tokens, overlap)
        seconds = time.perf_counter() - began
        score = 100 * ndcg_at_10(best_chunks(queries, chunks), task.relevant)
        yield Way(way, len(task.right), round(score, 2), round(seconds, 1), sum(map(len, chunks)))


def _embed(
    embedder: Embedder, texts: Sequence[str], way: str, chunk_tokens: int, overlap: int | None
) -> list[Float[np.ndarray, "_ d"]]:
    if way == "cut":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that texts are cut
            return list(embedder.encode_document(texts)[:, None])
    chunks = [by_tokens(text, chunk_tokens, embedder.tokenizer) for text in texts]
    options = side_options(embedder.config, "document") | CHUNKED[way]
    return embedder.encode_chunks(chunks, **options, overlap=overlap)


def score_words(task: Retrieval) -> Way:
    """Scores BM25 over whole documents."""
    began = time.perf_counter()
    score = 100 * bm25_score(task).value
    return Way("bm25", len(task.right), round(score, 2), round(time.perf_counter() - began, 1))


def table(ways: Sequence[Way], limit: int) -> str:
    """Rows of ways, columns of the meetings that were drawn and of all."""
    few, all_of_them = min(way.meetings for way in ways), max(way.meetings for way in ways)
    columns = [few] if few == all_of_them else [few, all_of_them]
    score = {(way.way, way.meetings): f"{way.score:.2f}" for way in ways}
    head = ["", *(f"{count} meetings" for count in columns), "published (E5-small, BM25)", "s", "vectors"]
    if limit < LONG:
        head.append(f"jina-embeddings-v3, {LONG:,} tokens")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in NAMES:
        of_few = next((way for way in ways if way.way == name and way.meetings == few), None)
        if of_few is None:
            continue
        cells = [NAMES[name], *(score.get((name, count), "") for count in columns), str(PUBLISHED.get(name, ""))]
        cells += [f"{of_few.seconds:.0f}", "" if of_few.vectors is None else f"{of_few.vectors:,}"]
        if limit < LONG:
            cells.append("" if name == "bm25" else NOT_RUN)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command(cls=Command)
@click.argument("model")
@click.option("--data", type=click.Path(path_type=Path, exists=True), envvar=DATA, required=True, help=f"Default: ${DATA}.")
@click.option("--meetings", type=click.IntRange(min=2), help="How many are embedded in chunks; default: all.")
@click.option("--way", "ways", type=click.Choice(["cut", *CHUNKED]), multiple=True, help="Default: all.")
@click.option("--chunk-tokens", type=int, default=256, show_default=True)
@click.option("--overlap", type=int, help="Tokens that windows share; default: that of `encode_chunks`.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(
    model: str,
    data: Path,
    meetings: int | None,
    ways: Sequence[str],
    chunk_tokens: int,
    overlap: int | None,
    dtype: str,
    out: Path | None,
) -> None:
    """Score MODEL and BM25 on meetings, and print a table; with --json it resumes."""
    embedder = Embedder.load(model, dtype=dtype)
    drawn, whole = load_meetings(data / "qmsum", meetings), load_meetings(data / "qmsum")
    settings = {"model": Path(model).name, "dtype": dtype, "max_length": embedder.max_length, "seed": SEED}
    settings |= {"chunk_tokens": chunk_tokens, "overlap": overlap}
    found = _read_finished(out, settings)

    def finish(results: Iterable[Way]) -> None:
        for way in results:
            click.echo(way, err=True)
            found.append(way)
            if out:
                report = {"machine": machine(), "date": str(date.today()), "versions": versions(PACKAGES)}
                out.write_text(json.dumps(report | settings | {"ways": [each._asdict() for each in found]}, indent=2) + "\n")

    def missing(task: Retrieval, names: Sequence[str]) -> list[str]:
        done = {way.way for way in found if way.meetings == len(task.right)}
        return [name for name in names if name not in done]

    for task in [drawn] if meetings is None else [drawn, whole]:
        finish(score_words(task) for _ in missing(task, ["bm25"]))
    asked = ways or ["cut", *CHUNKED]
    if meetings is not None and "cut" in asked and embedder.max_length < LONG:
        finish(score_model(embedder, whole, missing(whole, ["cut"]), chunk_tokens, overlap))
    finish(score_model(embedder, drawn, missing(drawn, asked), chunk_tokens, overlap))
    click.echo(table(found, embedder.max_length))


def _read_finished(out: Path | None, settings: dict[str, Any]) -> list[Way]:
    """Ways that an earlier run with the same settings has finished: they take minutes each."""
    if out is None or not out.exists():
        return []
    report = json.loads(out.read_text())
    return [Way(**way) for way in report["ways"]] if settings.items() <= report.items() else []


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.long_documents")

"""`jina-jax search`: the texts nearest to a query, of files or of what `jina-jax embed` wrote."""

import json
import shutil
import sys
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, islice
from typing import Any, NamedTuple, get_args

import click
import numpy as np

from ..bulk.read_shards import ChunkId, EmbeddedShards, find_chunks, find_texts, open_shards, read_blocks
from ..bulk.run import model_fingerprint
from ..checkpoints.sources import find_model
from ..command import Command, max_length_option, model_options
from ..config import Side
from ..embed.embedder import Embedder
from ..embed.progress import progress_bar
from ..embed.results import not_finite
from ..embed.search import OTHER_SIDE, has_sides, query_side, top_k
from ..embed.sides import check_exclusive, embedded_with, side_options
from ..errors import DataError, NotFiniteError, RunError
from ..files import repeated_files
from ..storage import as_path
from ..storage.paths import expand
from ..text.readers import TextRecord, check_file, decoded_lines, file_format, parquet, read_texts, without_line_end
from ..text.unicode import lone_surrogate

STANDARD_INPUT = "-"

CALL_TEXTS = 4096
"""Texts of files embedded in one call; it bounds memory, and is enough to fill packed rows well."""

LEAST_COLUMNS = 20
"""Columns of a terminal that a text has, however long its id is."""


class Result(NamedTuple):
    """A line of the answer; the text is None where it is not to be had."""

    rank: int
    score: float
    id: str | int | ChunkId
    text: str | None

    def fields(self) -> dict[str, Any]:
        """Of the JSON object; a chunk has its number and characters beside the id of its text."""
        own = self._asdict()
        if isinstance(self.id, ChunkId):
            own |= self.id._asdict()
            own["id"] = own.pop("document")
        return own


@click.command(cls=Command, short_help="Find the texts that are nearest to a query.")
@click.argument("query")
@click.argument("files", nargs=-1, type=click.Path(allow_dash=True))
@click.option("--model", required=True, type=click.Path(), help="Directory or hub id, in any supported layout.")
@click.option(
    "--embeddings",
    type=click.Path(),
    metavar="DIR/",
    help="Search what `jina-jax embed --output DIR/` wrote, in place of FILES.",
)
@click.option("--top", type=int, default=5, show_default=True, help="How many results.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="A JSON object a line: rank, score, id, the text in full, and where it is a chunk, its number and characters.",
)
@click.option("--task", help="FILES: adapter of both query and texts; default: those, or the prompts, of the two sides.")
@click.option(
    "--side", type=click.Choice(get_args(Side)), help="Side that QUERY is on; default: query, or the other one than DIR/ is on."
)
@click.option("--dim", type=int, help="Leading dimensions to compare; default: all, or those of --embeddings.")
@max_length_option
@model_options
@click.option("--batch-size", type=int, default=32, show_default=True, help="In texts; bounds memory.")
@click.option("--field", help="FILES: field or column with the text; outer.inner for one inside another.  [default: text]")
@click.option("--id-field", help="FILES: the one with the id; default: FILE:NUMBER of the row.")
def search(query: str, files: Sequence[str], embeddings: str | None, top: int, as_json: bool, **options: Any) -> None:
    """Print the texts that are nearest to QUERY, by the cosine of their embeddings.

    FILES are .txt, .jsonl, .csv, .tsv, also as .gz or .xz, and .parquet; - is the lines of standard
    input. They are embedded anew each time. What is searched often is embedded once, by `jina-jax
    embed FILES --side document --output DIR/`, and searched with --embeddings DIR/: in the dtype
    of its embeddings, with the query on the other side.
    """
    _check_query(query, top)
    files = [file for pattern in files for file in expand(pattern)]
    if bool(files) == bool(embeddings):
        raise ValueError("give either FILES to search, or --embeddings DIR/")
    if embeddings:
        results = _search_shards(query, embeddings, top, **options)
    else:
        results = _search_files(query, files, top, **options)
    for result in results:
        click.echo(json.dumps(result.fields(), ensure_ascii=False) if as_json else _line(result))


def _check_query(query: str, top: int) -> None:
    if not query.strip():
        raise ValueError("the query is empty")
    if (position := lone_surrogate(query)) is not None:
        raise ValueError(f"the query is not valid Unicode: a lone surrogate at position {position}")
    if top < 1:
        raise ValueError(f"--top must be at least 1, not {top}")


# ---- files


def _search_files(
    query: str,
    files: Sequence[str],
    top: int,
    *,
    model: str,
    task: str | None,
    side: Side | None,
    dim: int | None,
    max_length: int | None,
    dtype: str | None,
    revision: str | None,
    batch_size: int,
    field: str | None,
    id_field: str | None,
) -> list[Result]:
    check_exclusive(task=task, prompt=None, prompt_name=None, side=side)
    _check_files(files, id_field)
    rows = _rows(files, field or "text", id_field)
    first = next(rows, None)
    if first is None:
        raise DataError(f"there is nothing to search: {', '.join(files)} without a row")
    embedder = Embedder.load(model, dtype=dtype, revision=revision)
    common = {"truncate_dim": dim, "max_length": max_length, "batch_size": batch_size}
    of_query, of_texts = _both_options(embedder, task, side or "query")
    embedding = np.asarray(embedder.encode(query, **of_query | common))
    with progress_bar(None, "Searching", "text", show=sys.stderr.isatty()) as bar:
        hits = top_k(embedding, _embedded(embedder, chain([first], rows), of_texts | common, bar), top)
    return [Result(rank, hit.score, hit.id.id, hit.id.text) for rank, hit in enumerate(hits, 1)]


def _check_files(files: Sequence[str], id_field: str | None) -> None:
    named = [file for file in files if file != STANDARD_INPUT]
    for file in named:
        check_file(file, id_field)
    if len(named) < len(files) and id_field is not None:
        raise ValueError(f"{STANDARD_INPUT} is plain text, which has no field {id_field!r}")
    twice = [" = ".join(dict.fromkeys(same)) for same in repeated_files(named)]
    if len(files) - len(named) > 1:
        twice.append(STANDARD_INPUT)
    if twice:
        raise ValueError(f"files are given twice: {', '.join(twice)}")
    if any(file_format(file) == ".parquet" for file in named):
        parquet()


def _rows(files: Sequence[str], field: str, id_field: str | None) -> Iterator[TextRecord]:
    for file in files:
        if file == STANDARD_INPUT:
            for place, line in decoded_lines(sys.stdin.buffer, file):
                yield TextRecord(place, without_line_end(line))
        else:
            yield from read_texts(file, field, id_field)


def _both_options(embedder: Embedder, task: str | None, side: Side) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `encode` for a query on a side and for texts on the other, or of one task."""
    if task is not None:
        return {"task": task}, {"task": task}
    return side_options(embedder.config, side), side_options(embedder.config, OTHER_SIDE[side])


def _embedded(
    embedder: Embedder, rows: Iterator[TextRecord], options: dict[str, Any], bar: Any
) -> Iterator[tuple[list[TextRecord], np.ndarray]]:
    """Yields the rows with their embeddings, CALL_TEXTS at a time."""
    while block := list(islice(rows, CALL_TEXTS)):
        try:
            embeddings = np.asarray(embedder.encode([row.text for row in block], **options, show_progress_bar=False))
        except NotFiniteError as error:
            wrong = [block[index].id for index in error.indices]
            raise not_finite(error.indices, f"{len(wrong)} of the texts, by id", wrong) from error
        yield block, embeddings
        bar.update(len(block))


# ---- shards


def _search_shards(
    query: str,
    embeddings: str,
    top: int,
    *,
    model: str,
    side: Side | None,
    dim: int | None,
    max_length: int | None,
    dtype: str | None,
    revision: str | None,
    batch_size: int,
    **of_files: str | None,
) -> list[Result]:
    if given := [f"--{name.replace('_', '-')}" for name, value in of_files.items() if value is not None]:
        raise ValueError(f"{', '.join(given)}: only with FILES; {embeddings} has its own")
    opened = open_shards(as_path(embeddings))
    if dim not in (None, opened.dim):
        raise RunError(f"{embeddings} holds embeddings of {opened.dim} dimensions, not of {dim}")
    directory = find_model(model, revision)
    if model_fingerprint(directory) != opened.fingerprint:
        raise RunError(f"{embeddings} holds embeddings of another model: its files differ from those of {model}")
    embedder = Embedder.load(directory, dtype=dtype or opened.dtype)
    options = _query_options(embedder, opened, side)
    options |= {"truncate_dim": opened.dim, "max_length": max_length, "batch_size": batch_size}
    embedding = np.asarray(embedder.encode(query, **options))
    with progress_bar(opened.rows, "Searching", "text", show=sys.stderr.isatty()) as bar:
        hits = top_k(embedding, _counted(read_blocks(opened), bar), top)
    found = {hit.row: hit.id for hit in hits}
    texts = find_chunks(opened, found) if opened.is_chunked else find_texts(opened, found)
    if len(texts) < len(hits):
        lacking = len(hits) - len(texts)
        why = "their files are gone, or other than when embedded" + (", or their ids are not unique" * opened.is_chunked)
        click.echo(f"{lacking} of {len(hits)} texts are not shown: {why}", err=True)
    return [Result(rank, hit.score, hit.id, texts.get(hit.row)) for rank, hit in enumerate(hits, 1)]


def _query_options(embedder: Embedder, opened: EmbeddedShards, side: Side | None) -> dict[str, Any]:
    """Arguments of `encode` for a query to the shards: those of the side, or the same as theirs."""
    config, embedded = embedder.config, opened.embedded
    if embedded is None:
        embedded = embedded_with(config, task=opened.task, prompt=None, prompt_name=None, side=None)
    other_side = query_side(config, embedded)
    if (side := side or other_side) is not None:
        return side_options(config, side)
    if embedded["task"] is None and has_sides(config):
        click.echo(
            f"{opened.directory} was embedded without a side, and so is the query; this model embeds queries and documents "
            "differently: `jina-jax embed --side document` makes embeddings that are searched better",
            err=True,
        )
    return {"task": embedded["task"], "prompt": embedded["prompt"]}


def _counted(blocks: Iterable[tuple[list[Any], np.ndarray]], bar: Any) -> Iterator[tuple[list[Any], np.ndarray]]:
    for ids, embeddings in blocks:
        yield ids, embeddings
        bar.update(len(ids))


# ---- lines


def _line(result: Result) -> str:
    """Line of a result, with as much of the text as the terminal is wide."""
    start = f"{result.rank}  {result.score:.4f}  {_printable(str(result.id))}"
    if result.text is None:
        return start
    columns = shutil.get_terminal_size().columns - _ends(start)[-1] - 2
    return f"{start}  {_shortened(_printable(result.text), max(columns, LEAST_COLUMNS))}"


def _printable(text: str) -> str:
    """Text on one line, without control characters, which could steer a terminal."""
    return " ".join("".join(" " if unicodedata.category(char) == "Cc" else char for char in text).split())


def _shortened(text: str, columns: int) -> str:
    ends = _ends(text)
    return text if not ends or ends[-1] <= columns else text[: bisect_right(ends, columns - 1)] + "…"


def _ends(text: str) -> list[int]:
    """Column at which each character ends: marks take none, wide characters two."""
    return list(accumulate(_columns(char) for char in text))


def _columns(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1

"""`jina-jax embed`: the lines of one file, or the rows of many as Parquet shards."""

import contextlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np

from ..bulk import run as bulk
from ..bulk.parquet_shards import CHUNK_COLUMNS, embedding_column
from ..checkpoints.sources import find_model
from ..command import Command, max_length_option, model_options
from ..config import Side
from ..embed.chunk_rows import ChunkRows, check_chunk_options, chunker, embed_in_chunks
from ..embed.embedder import Embedder
from ..embed.quantize import EMBEDDING_PRECISIONS, EmbeddingPrecision
from ..embed.sides import check_exclusive, encode_options
from ..files import atomic_write, check_not_input, check_output_file
from ..storage import StoragePath, as_path
from ..storage.paths import expand
from ..text.readers import decoded_lines, without_line_end

NUM_PROCESSES = "DIR/: how many share the work; default: as JAX_NUM_PROCESSES or Slurm says, else 1."
LATE = "Chunks in the context of their text, or each by itself.  [default: --late-chunking]"
PROCESS_ID = "DIR/: which of them this is, from 0; default: as JAX_PROCESS_ID or Slurm says."


@click.command(cls=Command, short_help="Embed the lines of a file, or the rows of many.")
@click.argument("files", nargs=-1, required=True, type=click.Path(allow_dash=True))
@click.option("--model", required=True, type=click.Path(), help="Directory or hub id, in any supported layout.")
@model_options
@click.option("--task", help="Adapter; default: the base model.")
@click.option("--prompt", help="Text put before every input, in place of the task's instruction.")
@click.option("--prompt-name", help="The same by its name in the model.")
@click.option(
    "--side",
    type=click.Choice(get_args(Side)),
    help="Embed as queries or documents: with the model's task, else its prompt, for that side.",
)
@max_length_option
@click.option("--dim", type=int, help="Leading dimensions to keep; default: all.")
@click.option("--precision", type=click.Choice(EMBEDDING_PRECISIONS), default="float32", show_default=True)
@click.option("--chunk-tokens", type=int, help="Embed chunks of so many tokens: a row a chunk, with its number and characters.")
@click.option("--chunk-sentences", type=int, help="The same of so many sentences.")
@click.option("--late-chunking/--no-late-chunking", default=None, help=LATE)
@click.option("--batch-size", type=int, default=32, show_default=True, help="In texts; bounds memory.")
@click.option(
    "--output",
    required=True,
    type=click.Path(allow_dash=True),
    help="FILE.npy, FILE.parquet (text and embedding), - for JSON lines, or DIR/ for Parquet shards.",
)
@click.option("--field", help="DIR/: field or column with the text; outer.inner for one inside another.  [default: text]")
@click.option("--id-field", help="DIR/: the one with the id; default: FILE:NUMBER of the row.")
@click.option("--shard-rows", type=int, help=f"DIR/: rows of a shard.  [default: {bulk.SHARD_ROWS}]")
@click.option("--num-processes", type=int, default=1, envvar=["JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS"], help=NUM_PROCESSES)
@click.option("--process-id", type=int, envvar=["JAX_PROCESS_ID", "SLURM_PROCID"], help=PROCESS_ID)
def embed(files: Sequence[str], model: str, output: str, num_processes: int, process_id: int | None, **options: Any) -> None:
    """Embed the lines of one file (UTF-8, one text each), or of standard input with -.

    With --output DIR/ embed the rows of many files (.txt, .jsonl, .csv, .tsv, also as .gz or .xz,
    and .parquet) as Parquet shards. Both may be in a bucket, as gs://b/texts/*.parquet. However a
    run ended, it resumes when it is started again. Several processes, each with its own
    --process-id, share the shards.

    With --chunk-tokens or --chunk-sentences a row is a chunk of a text: its id, the chunk's number
    and its first and last character (from 0, the last exclusive). A text without a token has none.
    """
    files = [file for pattern in files for file in expand(pattern)]
    if output.endswith("/") or (Path(output).suffix not in (".npy", ".parquet") and as_path(output).is_dir()):
        _embed_files(files, model, output, num_processes, process_id, **options)
        return
    directory_options = {name: options.pop(name) for name in ("field", "id_field", "shard_rows")}
    if given := [f"--{name.replace('_', '-')}" for name, value in directory_options.items() if value is not None]:
        raise ValueError(f"{', '.join(given)}: only with --output DIR/")
    if len(files) > 1:
        raise ValueError("several files are embedded with --output DIR/")
    _embed_lines(as_path(files[0]), model, output, **options)


def _embed_lines(
    file: StoragePath,
    model: str,
    output: str,
    *,
    dtype: str | None,
    revision: str | None,
    task: str | None,
    prompt: str | None,
    prompt_name: str | None,
    side: Side | None,
    max_length: int | None,
    dim: int | None,
    precision: EmbeddingPrecision,
    batch_size: int,
    chunk_tokens: int | None,
    chunk_sentences: int | None,
    late_chunking: bool | None,
) -> None:
    check_exclusive(task=task, prompt=prompt, prompt_name=prompt_name, side=side)
    check_chunk_options(chunk_tokens, chunk_sentences, late_chunking)
    suffix = Path(output).suffix
    is_chunked = chunk_tokens is not None or chunk_sentences is not None
    if is_chunked and suffix == ".npy":
        raise ValueError(f"{output} would hold embeddings without their chunks; --output must end in .parquet, or be - or DIR/")
    if output != "-" and suffix not in (".npy", ".parquet"):
        raise ValueError(f"--output must end in .npy or .parquet, or be - or a directory DIR/, not {output!r}")
    if output != "-":
        check_output_file(as_path(output))
        check_not_input(as_path(output), [file])
    texts = _lines(file)
    embedder = Embedder.load(model, dtype=dtype, revision=revision)
    options = encode_options(embedder.config, task=task, prompt=prompt, prompt_name=prompt_name, side=side)
    options |= {"truncate_dim": dim, "precision": precision, "batch_size": batch_size, "max_length": max_length}
    options["show_progress_bar"] = sys.stderr.isatty()
    if cut := chunker(embedder.tokenizer, chunk_tokens, chunk_sentences):
        found = embed_in_chunks(embedder, texts, cut, late=late_chunking is not False, **options)
        embeddings, columns = found.embeddings, _chunk_columns(file, texts, found)
    else:
        embeddings = np.asarray(embedder.encode(texts, **options))
        columns = {"text": texts}
    if output == "-":
        for row, embedding in enumerate(embeddings.tolist()):
            fields = {name: values[row] for name, values in columns.items() if name != "text"}
            click.echo(json.dumps(fields | {"embedding": embedding} if is_chunked else embedding, ensure_ascii=False))
        return
    with atomic_write(as_path(output)) as target:
        if suffix == ".npy":
            with target.open("wb") as stream:
                np.save(stream, embeddings)
        else:
            _write_parquet(target, columns, embeddings)
    click.echo(f"{output}: {len(embeddings)} embeddings of {embeddings.shape[1]} dimensions", err=True)


def _chunk_columns(file: StoragePath, texts: list[str], rows: ChunkRows) -> dict[str, list[Any]]:
    """Columns of chunks: as those of DIR/, and the text."""
    of_text, starts, ends = rows.texts.tolist(), rows.starts.tolist(), rows.ends.tolist()
    cut = [texts[index][start:end] for index, start, end in zip(of_text, starts, ends, strict=True)]
    ids = [f"{file}:{index + 1}" for index in of_text]
    return {"id": ids, "chunk": rows.numbers.tolist(), "start": starts, "end": ends, "text": cut}


def _embed_files(
    files: Sequence[str],
    model: str,
    output: str,
    processes: int,
    process: int | None,
    *,
    dtype: str | None,
    revision: str | None,
    **given: Any,
) -> None:
    if process is None and processes > 1:
        raise ValueError("--num-processes needs a --process-id for each of them")
    process = process or 0
    options = bulk.BulkOptions(**{name: value for name, value in given.items() if value is not None})
    bulk.check_arguments(files, options, process, processes)
    on_terminal = sys.stderr.isatty()
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger(bulk.__name__).setLevel(logging.WARNING if on_terminal else logging.INFO)
    directory = find_model(model, revision)
    done = bulk.embed_files(
        bulk.load_on_this_host(directory, dtype=dtype),
        bulk.model_fingerprint(directory),
        files,
        as_path(output),
        options,
        process=process,
        processes=processes,
        progress=on_terminal,
    )
    state = "complete" if done.complete else f"process {process} of {processes} has done its part; others have not yet"
    click.echo(f"{output}: {done.rows} rows in {done.shards} shards; {state}", err=True)


def _lines(file: StoragePath) -> list[str]:
    with contextlib.nullcontext(sys.stdin.buffer) if str(file) == "-" else file.open("rb") as lines:
        return [without_line_end(line) for _, line in decoded_lines(lines, file)]


def _write_parquet(path: Path, columns: dict[str, list[Any]], embeddings: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = dict(CHUNK_COLUMNS)
    arrays = {name: pa.array(values, types.get(name, "string")) for name, values in columns.items()}
    pq.write_table(pa.table(arrays | {"embedding": embedding_column(embeddings)}), path)

"""Opens the Parquet shards of a finished run, and reads them block by block."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..config import SIDE_TASKS
from ..embed.sides import Embedded
from ..errors import DataError, RunError
from ..files import file_stamp, read_json, sha256
from ..storage import StoragePath, as_path, is_bucket
from ..storage.cache import fetch_file
from ..text.readers import TextRecord, open_parquet, parquet
from .inputs import read_rows
from .parquet_shards import CHUNK_COLUMNS, RUN, Shard, split_into_shards
from .run import FORMAT, MANIFEST, VERSION

BLOCK_ROWS = 4096
"""Rows in memory at once; shards are written in row groups of as many."""

_STRING_OR_NONE = (str, type(None))


class WrittenFile(NamedTuple):
    """A shard, or an input of its run, as the manifest describes it."""

    path: StoragePath
    rows: int
    bytes: int
    sha256: str


class ChunkId(NamedTuple):
    """What a row that is a chunk is known by."""

    document: str | int
    """Id of the text that it is of."""
    chunk: int
    """Its number there, from 0."""
    start: int
    end: int
    """Its characters, the end exclusive."""

    def __str__(self) -> str:
        return f"{self.document}:{self.start}-{self.end}"


class EmbeddedShards(NamedTuple):
    """A finished run of bulk embedding in float32, by its manifest."""

    directory: StoragePath
    fingerprint: str
    """`run.model_fingerprint` of the model."""
    dtype: str
    """In which the model computed."""
    task: str | None
    """Adapter; None = the base model."""
    embedded: Embedded | None
    """Task, prompt and side; None = not recorded, by an earlier version, which knew tasks alone."""
    field: str
    id_field: str | None
    is_chunked: bool
    """Rows are chunks of texts, and not texts."""
    shard_rows: int
    """Texts whose rows a shard holds; the last may hold fewer."""
    rows: int
    dim: int
    shards: tuple[WrittenFile, ...]
    inputs: tuple[WrittenFile, ...]


def open_shards(directory: StoragePath) -> EmbeddedShards:
    """Opens what `run.embed_files` wrote.

    It compares the size of every shard with the manifest; `read_blocks` compares the hash.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such directory.
        RunError: its run is not finished or not in float32, or it holds no embeddings of this
            program.
        DataError: there are no rows, or the manifest or a shard is damaged.
    """
    manifest = _read_manifest(directory)
    path = directory / MANIFEST
    options, model = _get(manifest, "options", dict, path), _get(manifest, "model", dict, path)
    if (precision := _get(options, "precision", str, path)) != "float32":
        raise RunError(
            f"{directory} holds embeddings of precision {precision}, whose order is not that of the cosine; "
            "to search, embed the texts again with --precision float32"
        )
    is_chunked = any(options.get(name) is not None for name in ("chunk_tokens", "chunk_sentences"))
    shards = _written_files(manifest, "shards", path)
    inputs = _written_files(manifest, "inputs", path)
    rows = _get(manifest, "rows", int, path)
    texts = _get(manifest, "documents", int, path) if is_chunked else rows
    if sum(file.rows for file in shards) != rows or sum(file.rows for file in inputs) != texts:
        raise DataError(f"{path} is damaged: its shards, its inputs and the run have different numbers of rows")
    if not rows:
        raise DataError(f"{directory} holds no rows: there is nothing to search")
    shards = tuple(shard._replace(path=directory / shard.path.name) for shard in shards)
    for shard in shards:
        if not shard.path.is_file() or file_stamp(shard.path)["bytes"] != shard.bytes:
            raise _damaged(shard)
    return EmbeddedShards(
        directory,
        fingerprint=_get(model, "sha256", str, path),
        dtype=_dtype(model, path),
        task=_get(options, "task", _STRING_OR_NONE, path),
        embedded=_embedded(manifest, path) if "embedded" in manifest else None,
        field=_get(options, "field", str, path),
        id_field=_get(options, "id_field", _STRING_OR_NONE, path),
        is_chunked=is_chunked,
        shard_rows=_get(options, "shard_rows", int, path),
        rows=rows,
        dim=_dimensions(shards[0]),
        shards=shards,
        inputs=inputs,
    )


def read_blocks(opened: EmbeddedShards) -> Iterator[tuple[list[Any], Float[np.ndarray, "n d"]]]:
    """Yields ids and embeddings of all rows in order, up to BLOCK_ROWS at a time.

    The ids are `ChunkId` where rows are chunks.

    Raises:
        DataError: a shard is not the file that was written.
    """
    for shard in opened.shards:
        path = fetch_file(shard.path) if is_bucket(shard.path) else shard.path
        if sha256(path) != shard.sha256:
            raise _damaged(shard)
        with open_parquet(path) as file:
            named = ["id", *(name for name, _ in CHUNK_COLUMNS)] if opened.is_chunked else ["id"]
            for batch in file.iter_batches(BLOCK_ROWS, columns=[*named, "embedding"]):
                embeddings = batch.column("embedding").flatten().to_numpy()
                columns = [batch.column(name).to_pylist() for name in named]
                ids = [ChunkId(*row) for row in zip(*columns, strict=True)] if opened.is_chunked else columns[0]
                yield ids, embeddings.reshape(-1, opened.dim)


def find_texts(opened: EmbeddedShards, rows: Iterable[int]) -> dict[int, str]:
    """Returns the texts of some rows, numbered from 0 over the run, from its input files.

    A row whose file is gone or has changed since the run is left out.
    """
    wanted = [Shard(0, row, row + 1) for row in sorted(rows)]
    return {row: record.text for row, record in _records(opened, wanted)}


def find_chunks(opened: EmbeddedShards, rows: Mapping[int, ChunkId]) -> dict[int, str]:
    """Returns the texts of some rows that are chunks, as `find_texts` does.

    One of a text whose id others have, too, is left out.
    """
    ends = list(accumulate(shard.rows for shard in opened.shards))
    shards = split_into_shards(sum(file.rows for file in opened.inputs), opened.shard_rows)
    wanted, texts = {chunk.document for chunk in rows.values()}, dict[str | int, str | None]()
    for _, record in _records(opened, [shards[number] for number in sorted({bisect_right(ends, row) for row in rows})]):
        if record.id in wanted:
            texts[record.id] = None if record.id in texts else record.text
    return {
        row: text[chunk.start : chunk.end] for row, chunk in rows.items() if (text := texts.get(chunk.document)) is not None
    }


def _records(opened: EmbeddedShards, parts: list[Shard]) -> Iterator[tuple[int, TextRecord]]:
    """Yields number and text of the rows of the input in some parts, from unchanged files."""
    there, base = [], 0
    for file in opened.inputs:
        end = base + file.rows
        inside = [Shard(0, max(part.first, base), min(part.end, end)) for part in parts if part.first < end and part.end > base]
        if inside and _is_unchanged(file):
            there += inside
        base = end
    rows = [row for part in there for row in range(part.first, part.end)]
    inputs = [{"file": str(file.path), "rows": file.rows} for file in opened.inputs]
    names = [known["file"] for known in inputs]
    yield from zip(rows, read_rows(inputs, names, there, opened.field, opened.id_field), strict=True)


def _is_unchanged(file: WrittenFile) -> bool:
    return file.path.is_file() and file_stamp(file.path)["bytes"] == file.bytes and sha256(file.path) == file.sha256


# ---- the manifest


def _read_manifest(directory: StoragePath) -> dict[str, Any]:
    if not directory.exists():
        raise FileNotFoundError(f"there is no directory {directory}")
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file, not a directory with embeddings")
    path = directory / MANIFEST
    if not path.exists() and (directory / RUN / "run.json").exists():
        raise RunError(f"{directory} is not finished: run the same `jina-jax embed` again, which resumes it")
    if not path.exists():
        raise RunError(f"{directory} holds no embeddings; give the DIR/ of a `jina-jax embed FILES --output DIR/`")
    manifest = read_json(path, DataError)
    if manifest.get("format") != FORMAT:
        raise RunError(f"{path} is of another program: its format is {manifest.get('format')!r}, not {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise RunError(f"{path} is of version {manifest.get('version')!r}, and this program reads version {VERSION}")
    return manifest


def _written_files(manifest: dict[str, Any], name: str, path: StoragePath) -> tuple[WrittenFile, ...]:
    return tuple(
        WrittenFile(
            as_path(_get(file, "file", str, path)),
            _get(file, "rows", int, path),
            _get(file, "bytes", int, path),
            _get(file, "sha256", str, path),
        )
        for file in _get(manifest, name, list, path)
    )


def _embedded(manifest: dict[str, Any], path: StoragePath) -> Embedded:
    embedded = _get(manifest, "embedded", dict, path)
    if (side := embedded.get("side")) not in (*SIDE_TASKS, None):
        raise DataError(f"{path} is damaged: side is {side!r}")
    return {"task": _get(embedded, "task", _STRING_OR_NONE, path), "prompt": _get(embedded, "prompt", str, path), "side": side}


def _dtype(model: dict[str, Any], path: StoragePath) -> str:
    name = _get(model, "dtype", str, path)
    try:
        known = jnp.issubdtype(jnp.dtype(name), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise DataError(f"{path} is damaged: dtype is {name!r}")
    return name


def _get(fields: Any, name: str, kind: Any, path: StoragePath) -> Any:
    """Value of a field of the manifest; raises DataError if it is of another type."""
    value = fields.get(name) if isinstance(fields, dict) else None
    if not isinstance(value, kind):
        raise DataError(f"{path} is damaged: {name} is {value!r}")
    return value


def _dimensions(shard: WrittenFile) -> int:
    """Dimensions of the embeddings in a shard, by its schema alone."""
    parquet()
    import pyarrow as pa

    try:
        with open_parquet(shard.path) as file:
            return file.schema_arrow.field("embedding").type.list_size
    except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
        raise _damaged(shard) from error


def _damaged(shard: WrittenFile) -> DataError:
    return DataError(
        f"{shard.path} is missing or damaged: it is not what the manifest describes; "
        "run the same `jina-jax embed` again, which makes it anew"
    )

"""Shards of a bulk run on disk: atomic writes, and a hash of each that a restart verifies.

OUTPUT/part-00000.parquet     rows of the input, in its order: id, embedding; or their chunks: id,
                              chunk (its number, from 0), start and end (its characters), embedding
OUTPUT/_run/part-00000.json   its row count, size and hash; written after it
"""

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from ..files import atomic_write, file_stamp, read_json_or_empty, sha256, write_json
from ..storage import StoragePath, is_bucket
from ..storage.store import CONCURRENT_REQUESTS
from ..text.readers import parquet

logger = logging.getLogger(__name__)

RUN = "_run"

TAG = "tag"
"""Field of a record in a bucket: the store's tag of the shard."""

CHUNK_COLUMNS = (("chunk", "int32"), ("start", "int64"), ("end", "int64"))
"""What a row that is a chunk has beside id and embedding, and the types."""


class Shard(NamedTuple):
    """Rows `first` to `end`, exclusive, of all rows of the input; it holds as many, or their
    chunks."""

    number: int
    first: int
    end: int

    @property
    def name(self) -> str:
        return f"part-{self.number:05d}"

    @property
    def rows(self) -> int:
        return self.end - self.first

    def file(self, output: StoragePath) -> StoragePath:
        return output / f"{self.name}.parquet"

    def record(self, output: StoragePath) -> StoragePath:
        return output / RUN / f"{self.name}.json"


def split_into_shards(rows: int, shard_rows: int) -> list[Shard]:
    """Splits `rows` rows into shards; the last may have fewer than `shard_rows`."""
    return [Shard(i, first, min(first + shard_rows, rows)) for i, first in enumerate(range(0, rows, shard_rows))]


def embedding_column(embeddings: np.ndarray) -> Any:
    """Arrow array of embeddings [rows, dim], as lists of fixed size."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1])


def shard_schema(ids: str, embeddings: np.ndarray, columns: Sequence[tuple[str, str]] = ()) -> Any:
    """Arrow schema of a shard: ids of the type named, vectors like those of `embeddings`, and
    columns in between."""
    parquet()
    import pyarrow as pa

    vector = pa.list_(pa.from_numpy_dtype(embeddings.dtype), embeddings.shape[1])
    return pa.schema([("id", ids), *columns, ("embedding", vector)])


def write_shard(output: StoragePath, shard: Shard, schema: Any, batches: Iterable[tuple[int, dict[str, Any]]]) -> None:
    """Writes a shard and then its record, each atomically.

    Args:
        output: the run's directory.
        shard: the shard to write.
        schema: from `shard_schema`.
        batches: for some of its rows of the input how many they are, and the columns of what is
            written of them, embeddings as [rows, dim].

    Raises:
        DataError: there are fewer rows of the input than the shard has.
    """
    import pyarrow as pa

    read = written = 0
    with atomic_write(shard.file(output)) as target:
        with parquet().ParquetWriter(target, schema, use_dictionary=False) as writer:
            for rows, values in batches:
                columns = [
                    embedding_column(values[field.name])
                    if field.name == "embedding"
                    else pa.array(values[field.name], field.type)
                    for field in schema
                ]
                writer.write_table(pa.table(columns, schema=schema))
                read += rows
                written += len(columns[0])
        if read != shard.rows:
            raise DataError(f"an input has become shorter: there are {read} of the {shard.rows} rows of {shard.name}")
        record = {"rows": written, "bytes": target.stat().st_size, "sha256": sha256(target)}
    file = shard.file(output)
    if is_bucket(file):
        record[TAG] = file.info().tag
    write_json(shard.record(output), record)


def is_finished(output: StoragePath, shard: Shard) -> bool:
    """True if a shard matches its recorded hash; removes the record of a damaged one.

    An object is read only if the store does not say that it is the one that was written.
    """
    file = shard.file(output)
    record = _record(file, shard.record(output))
    if not record:
        return False
    if (is_bucket(file) and file.info().tag == record.get(TAG)) or sha256(file) == record.get("sha256"):
        return True
    logger.warning("%s is damaged, and made again", file)
    shard.record(output).unlink()
    return False


def records_if_all_there(output: StoragePath, shards: Sequence[Shard]) -> list[dict[str, Any]] | None:
    """Records of all shards, as the manifest lists them; None if one is not finished."""
    if is_bucket(output):
        # A listing tells without a request for each.
        there = {path.relative_to(output).as_posix() for path, _ in output.objects()}
        if not all({shard.file(output).name, f"{RUN}/{shard.name}.json"} <= there for shard in shards):
            return None
    with ThreadPoolExecutor(CONCURRENT_REQUESTS if is_bucket(output) else 1) as pool:
        records = list(pool.map(lambda shard: _record(shard.file(output), shard.record(output)), shards))
    return [{name: record[name] for name in ("rows", "bytes", "sha256")} for record in records] if all(records) else None


def _record(file: StoragePath, record: StoragePath) -> dict[str, Any]:
    """Record of a shard if its file has the recorded size, else {}."""
    fields = read_json_or_empty(record)
    try:
        return fields if fields and file_stamp(file)["bytes"] == fields.get("bytes") else {}
    except FileNotFoundError:
        return {}


def rows_done(output: StoragePath, shards: Iterable[Shard]) -> int:
    """Number of input rows of the shards that have a record, whichever process wrote it."""
    there = {path.stem for path in (output / RUN).glob("part-*.json")}
    return sum(shard.rows for shard in shards if shard.name in there)


def remove_unfinished(output: StoragePath, shards: Iterable[Shard]) -> None:
    """Removes the partial files of these shards that killed processes left.

    In a bucket there are none.
    """
    if is_bucket(output):
        return
    names = {shard.file(output).name for shard in shards}
    for partial in output.glob(".part-*.partial-*"):
        if partial.name[1:].partition(".partial-")[0] in names:
            partial.unlink(missing_ok=True)

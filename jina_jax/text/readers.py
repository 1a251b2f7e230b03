"""Rows of text, JSON-lines and Parquet files, read as a stream: no more than a batch of them is in memory."""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError

COMPRESSED = {".gz": gzip.open, ".xz": lzma.open}
KINDS = (".txt", ".jsonl", ".parquet")

PARQUET_BATCH = 1024
"""Rows of a Parquet file decoded at once."""

PARQUET_BUFFER = 2**20
"""Bytes of a column read ahead. Without it a row group, which may be a whole file, is read at once."""

EVERYTHING = ((0, None),)


class TextRecord(NamedTuple):
    """A text and what it is called: the value of a field, else FILE:NUMBER, counted from 1."""

    id: str | int
    text: str


def check_file(file: str, id_field: str | None) -> None:
    """FileNotFoundError or ValueError where `file` is not one of `read_rows`."""
    if "://" in file:
        raise ValueError(f"{file} is remote; mount it or copy it first")
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {file}")
    if _kind(file) == ".txt" and id_field is not None:
        raise ValueError(f"{file} is plain text, which has no field {id_field!r}")


def read_rows(
    file: str, field: str, id_field: str | None = None, ranges: Sequence[tuple[int, int | None]] = EVERYTHING
) -> Iterator[TextRecord]:
    """Rows of a file, in its order.

    Args:
        file: .txt, a text a line; .jsonl, an object a line; both also as .gz or .xz; or .parquet.
        field: of an object, or column, that has the text; one inside another as outer.inner.
        id_field: the one that has the name, a string or a whole number of 64 bits; None = FILE:NUMBER.
        ranges: ascending (first, end) of the rows to read, counted from 0; what is between them is passed over quickly.

    Raises:
        RowError: a row is malformed, or the file is damaged.
    """
    kind = _kind(file)
    if kind == ".txt":
        for number, line in _lines(file, ranges):
            place = f"{file}:{number}"
            yield TextRecord(place, _decoded(line, place).removesuffix("\n").removesuffix("\r"))
        return
    rows = _parquet_rows(file, field, id_field, ranges) if kind == ".parquet" else _json_rows(file, ranges)
    for number, fields in rows:
        place = f"{file}:{number}"
        yield TextRecord(place if id_field is None else _id(fields, id_field, place), _text(fields, field, place))


def parquet() -> Any:
    """pyarrow's module for Parquet, which an extra brings."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("Parquet needs an extra: pip install 'jina-jax[cli]'") from error
    return pyarrow.parquet


def _kind(file: str) -> str:
    path = Path(file)
    kind = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    if kind not in KINDS or (kind == ".parquet" and path.suffix in COMPRESSED):
        raise ValueError(f"{file} is of no known type; valid are .txt and .jsonl, also as .gz or .xz, and .parquet")
    return kind


def _lines(file: str, ranges: Sequence[tuple[int, int | None]]) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of the ranges."""
    opened = COMPRESSED.get(Path(file).suffix, open)
    try:
        with opened(file, "rb") as lines:
            at = 0
            for first, end in ranges:
                for _ in islice(lines, first - at):
                    pass
                yield from enumerate(islice(lines, None if end is None else end - first), first + 1)
                at = end or 0
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _json_rows(file: str, ranges: Sequence[tuple[int, int | None]]) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(file, ranges):
        place = f"{file}:{number}"
        text = _decoded(line, place)
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:  # also numbers of too many digits
            raise DataError(f"{place}: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise DataError(f"{place}: a row is a JSON object, not {type(fields).__name__}")
        yield number, fields


def _parquet_rows(
    file: str, field: str, id_field: str | None, ranges: Sequence[tuple[int, int | None]]
) -> Iterator[tuple[int, Any]]:
    """Row groups without a row of the ranges are not read."""
    pq = parquet()
    import pyarrow

    columns = list(dict.fromkeys([field] if id_field is None else [field, id_field]))
    try:
        with pq.ParquetFile(file, buffer_size=PARQUET_BUFFER, pre_buffer=False) as source:
            for name in columns:
                if not {name, name.partition(".")[0]} & set(source.schema_arrow.names):
                    raise DataError(f"{file} has no column {name!r}; it has {source.schema_arrow.names}")
            at = 0
            for group in range(source.num_row_groups):
                end = at + source.metadata.row_group(group).num_rows
                if own := _overlap(ranges, at, end):
                    for batch in source.iter_batches(PARQUET_BATCH, row_groups=[group], columns=columns):
                        for first, stop in _overlap(own, at, at + len(batch)):
                            yield from enumerate(batch.slice(first - at, stop - first).to_pylist(), first + 1)
                        at += len(batch)
                at = end
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _overlap(ranges: Sequence[tuple[int, int | None]], first: int, end: int) -> list[tuple[int, int]]:
    """What of the ranges lies in first..end."""
    cut = [(max(low, first), end if high is None else min(high, end)) for low, high in ranges]
    return [(low, high) for low, high in cut if low < high]


def _text(fields: dict[str, Any], field: str, place: str) -> str:
    text = _value(fields, field, place)
    if not isinstance(text, str):
        raise DataError(f"{place}: {field} is no string but {type(text).__name__}")
    return _unicode(text, field, place)


def _id(fields: dict[str, Any], id_field: str, place: str) -> str | int:
    value = _value(fields, id_field, place)
    if isinstance(value, str):
        return _unicode(value, id_field, place)
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise DataError(f"{place}: {id_field} is {value!r}, neither a string nor a whole number of 64 bits")
    return value


def _value(fields: dict[str, Any], field: str, place: str) -> Any:
    """Of a field by its name, or by its path."""
    if field in fields:
        return fields[field]
    value: Any = fields
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            raise DataError(f"{place}: no field {field!r}; there are {list(fields)}")
        value = value[name]
    return value


def _unicode(text: str, field: str, place: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: {field} is not valid Unicode: a lone surrogate at position {error.start}") from error
    return text


def _decoded(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text ({error.reason})") from error

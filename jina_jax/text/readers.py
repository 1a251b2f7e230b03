"""Streams records from text, JSON lines, CSV, TSV and Parquet files.

No more than a batch of records is in memory. A record is named by its place, FILE:NUMBER: the line
on which it begins, or its row in Parquet, counted from 1.
"""

import contextlib
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError, how_to_install
from ..storage import StoragePath, as_path, is_bucket
from ..storage.paths import check_file as check_path
from .unicode import lone_surrogate

COMPRESSED = {".gz": gzip.open, ".xz": lzma.open}
FORMATS = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
KNOWN = ".txt, .jsonl, .csv and .tsv, also as .gz or .xz, and .parquet"

PARQUET_BATCH = 1024
"""Rows of a Parquet file decoded at once."""

PARQUET_BUFFER = 2**20
"""Bytes of a column read ahead. Without it, a row group, maybe an entire file, is read at once."""

LONGEST_FIELD = 2**31 - 1
"""Maximum characters of a CSV field. Python's default, 131,072, is too low for long texts."""

Ranges = Sequence[tuple[int, int | None]]
"""Ascending (first, end) of records, counted from 0, end exclusive; None = the end of the file."""

EVERYTHING: Ranges = ((0, None),)


class Record(NamedTuple):
    """Fields of one record, and its place, FILE:NUMBER."""

    place: str
    fields: dict[str, Any]


class TextRecord(NamedTuple):
    """A text and its id, which is the value of a field, else FILE:NUMBER."""

    id: str | int
    text: str


def check_file(file: str, id_field: str | None) -> None:
    """Raises FileNotFoundError or ValueError if `read_texts` cannot read `file`."""
    check_path(as_path(file))
    if file_format(file) == ".txt" and id_field is not None:
        raise ValueError(f"{file} is plain text, which has no field {id_field!r}")


def file_format(file: str | StoragePath) -> str:
    """Format of a file, one of FORMATS, by its suffix; raises ValueError for any other."""
    path = Path(str(file))
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    if suffix not in FORMATS or (suffix == ".parquet" and path.suffix in COMPRESSED):
        raise ValueError(f"{file} is of no known type; valid are {KNOWN}")
    return suffix


def read_texts(
    file: str | StoragePath, field: str = "text", id_field: str | None = None, ranges: Ranges = EVERYTHING
) -> Iterator[TextRecord]:
    """Yields the text and the id of each record, in the order of the file.

    Args:
        file: of one of FORMATS; each line of a .txt is a text.
        field: field or column with the text; outer.inner for a nested one.
        id_field: field or column with the id, a string or a 64-bit integer; None = FILE:NUMBER.
        ranges: records to read; those in between are skipped quickly.

    Raises:
        DataError: a record is malformed, or the file is damaged.
    """
    if file_format(file) == ".txt":
        field = "text"
    columns = list(dict.fromkeys([field] if id_field is None else [field, id_field]))
    for place, fields in read_records(file, columns=columns, ranges=ranges):
        yield TextRecord(place if id_field is None else _id(fields, id_field, place), _text(fields, field, place))


def read_records(
    file: str | StoragePath, *, columns: Sequence[str] | None = None, ranges: Ranges = EVERYTHING
) -> Iterator[Record]:
    """Yields the records of a file, in its order.

    A line of a .txt is the field `text`; fields of CSV and TSV are strings.

    Args:
        file: of one of FORMATS.
        columns: columns of a Parquet file to read, nested ones as outer.inner; None = all. Other
            formats yield every field.
        ranges: records to read.

    Raises:
        DataError: a record is malformed, or the file is damaged.
    """
    match file_format(file):
        case ".txt":
            return _text_records(file, ranges)
        case ".jsonl":
            return _json_records(file, ranges)
        case ".parquet":
            return _parquet_records(file, columns, ranges)
        case suffix:
            return _csv_records(file, "\t" if suffix == ".tsv" else ",", ranges)


def decoded_lines(lines: Iterable[bytes], file: str | StoragePath, first: int = 1) -> Iterator[tuple[str, str]]:
    """Yields (FILE:NUMBER, line) of UTF-8 lines, without a byte order mark.

    Args:
        lines: the encoded lines.
        file: its name, for FILE.
        first: number of the first line.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, line in enumerate(lines, first):
        place = f"{file}:{number}"
        try:
            yield place, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            how = "convert the file first: iconv -f ENCODING -t UTF-8"
            raise DataError(f"{place}: not UTF-8 text ({error.reason}); {how}") from error


def parquet() -> Any:
    """Imports pyarrow's module for Parquet, which an extra installs."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"Parquet needs an extra: {how_to_install('cli')}") from error
    return pyarrow.parquet


@contextlib.contextmanager
def open_parquet(file: str | StoragePath, **options: Any) -> Iterator[Any]:
    """Opens a Parquet file; of one in a bucket only what is used is read."""
    path = as_path(file)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(path.open("rb")) if is_bucket(path) else path
        yield stack.enter_context(parquet().ParquetFile(source, pre_buffer=False, **options))


# ---- one function for each format


def _text_records(file: str | StoragePath, ranges: Ranges) -> Iterator[Record]:
    for place, line in _lines(file, ranges):
        yield Record(place, {"text": without_line_end(line)})


def _json_records(file: str | StoragePath, ranges: Ranges) -> Iterator[Record]:
    for place, line in _lines(file, ranges):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:  # also numbers with too many digits
            raise DataError(f"{place}: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise DataError(f"{place}: a record is a JSON object, not {type(fields).__name__}")
        yield Record(place, fields)


def _csv_records(file: str | StoragePath, delimiter: str, ranges: Ranges) -> Iterator[Record]:
    """Yields CSV records. One may span several lines, so those before a range are parsed too."""
    csv.field_size_limit(LONGEST_FIELD)
    rows = csv.reader((line for _, line in _lines(file, EVERYTHING)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    wanted, index = list(ranges), 0
    while wanted:
        begins = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{file}:{begins}: not CSV: {error}") from error
        if header is None:
            header = row
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise DataError(f"{file} has columns of the same name: {twice}")
            continue
        if len(row) != len(header):
            raise DataError(f"{file}:{begins}: {len(row)} fields; the header has {len(header)}: {header}")
        first, end = wanted[0]
        if first <= index:
            yield Record(f"{file}:{begins}", dict(zip(header, row, strict=True)))
        index += 1
        if end is not None and index >= end:
            wanted.pop(0)


def _parquet_records(file: str | StoragePath, columns: Sequence[str] | None, ranges: Ranges) -> Iterator[Record]:
    """Yields Parquet records; row groups without a row in the ranges are not read."""
    parquet()
    import pyarrow

    try:
        with open_parquet(file, buffer_size=PARQUET_BUFFER) as source:
            for name in columns or ():
                if not {name, name.partition(".")[0]} & set(source.schema_arrow.names):
                    raise DataError(f"{file} has no column {name!r}; it has {source.schema_arrow.names}")
            at = 0
            for group in range(source.num_row_groups):
                end = at + source.metadata.row_group(group).num_rows
                if own := _overlap(ranges, at, end):
                    for batch in source.iter_batches(PARQUET_BATCH, row_groups=[group], columns=columns):
                        for first, stop in _overlap(own, at, at + len(batch)):
                            for number, fields in enumerate(batch.slice(first - at, stop - first).to_pylist(), first + 1):
                                yield Record(f"{file}:{number}", fields)
                        at += len(batch)
                at = end
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


# ---- lines and fields


def without_line_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _lines(file: str | StoragePath, ranges: Ranges) -> Iterator[tuple[str, str]]:
    path = as_path(file)
    try:
        with path.open("rb") as raw, COMPRESSED.get(path.suffix, contextlib.nullcontext)(raw) as lines:
            for first, some in _line_ranges(lines, ranges):
                yield from decoded_lines(some, file, first + 1)
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _line_ranges(lines: Iterable[bytes], ranges: Ranges) -> Iterator[tuple[int, Iterator[bytes]]]:
    rest, at = iter(lines), 0
    for first, end in ranges:
        for _ in islice(rest, first - at):
            pass
        yield first, islice(rest, None if end is None else end - first)
        at = end or 0


def _overlap(ranges: Ranges, first: int, end: int) -> list[tuple[int, int]]:
    """Intersection of the ranges with first..end."""
    cut = [(max(low, first), end if high is None else min(high, end)) for low, high in ranges]
    return [(low, high) for low, high in cut if low < high]


def _text(fields: dict[str, Any], field: str, place: str) -> str:
    text = _value(fields, field, place)
    if not isinstance(text, str):
        raise DataError(f"{place}: {field} is no string but {type(text).__name__}")
    return _checked_unicode(text, field, place)


def _id(fields: dict[str, Any], id_field: str, place: str) -> str | int:
    value = _value(fields, id_field, place)
    if isinstance(value, str):
        return _checked_unicode(value, id_field, place)
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise DataError(f"{place}: {id_field} is {value!r}, neither a string nor an integer of 64 bits")
    return value


def _value(fields: dict[str, Any], field: str, place: str) -> Any:
    """Value of `field`, which may be a dotted path."""
    if field in fields:
        return fields[field]
    value: Any = fields
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            raise DataError(f"{place}: no field {field!r}; there are {list(fields)}")
        value = value[name]
    return value


def _checked_unicode(text: str, field: str, place: str) -> str:
    if (position := lone_surrogate(text)) is not None:
        raise DataError(f"{place}: {field} is not valid Unicode: a lone surrogate at position {position}")
    return text

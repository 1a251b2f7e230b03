"""Reads training records from the named columns of a table: CSV, TSV, JSON lines or Parquet."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jina_jax.errors import DataError, did_you_mean
from jina_jax.text.readers import check_file, file_format, read_records
from jina_jax.text.unicode import lone_surrogate

from ..config import RecordKind
from ..data.records import KINDS, LabelledText, Pair, Record, check_record

NAMED = 5
"""Places, labels or columns that a message lists before it only counts them."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold a task: text and label, or anchor and positive."""

    text: str | None = None
    label: str | None = None
    anchor: str | None = None
    positive: str | None = None
    negative: str | None = None

    def __post_init__(self) -> None:
        given = {name for name, column in vars(self).items() if column is not None}
        if given not in ({"text", "label"}, {"anchor", "positive"}, {"anchor", "positive", "negative"}):
            listed = ", ".join(f"--{name}" for name in vars(self) if name in given)
            raise ValueError(
                "name the columns of labelled texts, --text and --label, or of pairs, --anchor and --positive, "
                f"perhaps with --negative; given: {listed or 'none'}"
            )
        if len(set(self.named.values())) < len(given):
            raise ValueError(f"a column is named twice: {self.named}")

    @property
    def named(self) -> dict[str, str]:
        """Columns by the option that names them."""
        return {name: column for name, column in vars(self).items() if column is not None}

    @property
    def kind(self) -> RecordKind:
        if self.label is not None:
            return "labelled_text"
        return "pair" if self.negative is None else "triplet"


class Row(NamedTuple):
    """Values of the named columns of one row, by option, and its place."""

    place: str
    values: dict[str, Any]


def read_table(file: Path, columns: Columns) -> list[Record]:
    """Reads the records of a table: labelled texts, pairs, or triplets.

    Labels may be integers and booleans; blanks around a label are no part of it. A negative is a
    text, or where the format has lists, a list of texts.

    Args:
        file: .jsonl, .csv or .tsv, also as .gz or .xz, or .parquet.
        columns: its columns to read.

    Raises:
        DataError: the file lacks a column, has no rows, is damaged or not UTF-8, or a value is
            empty or of another type; the message names the places, or the nearest columns.
        FileNotFoundError: no such file.
        ValueError: the file is of another type.
    """
    check_table(file)
    rows = list(_rows(file, columns))
    if not rows:
        raise DataError(f"{file} has no rows")
    _refuse_empty(file, rows)
    make = {"labelled_text": _labelled, "pair": _pair, "triplet": _triplet}[columns.kind]
    return [check_record(KINDS[columns.kind], columns.kind, make(row), row.place) for row in rows]


def check_table(file: Path) -> None:
    """Raises FileNotFoundError or ValueError if a file is missing, or of a type without columns."""
    check_file(str(file), None)
    if file_format(file) == ".txt":
        raise ValueError(f"{file} is plain text, which has no columns; valid are .csv, .tsv, .jsonl and .parquet")


def check_classes(file: Path, records: Sequence[LabelledText]) -> None:
    """Raises DataError if there is one class, or a class of one text: it has no pair to learn
    from."""
    texts: dict[str, set[str]] = defaultdict(set)
    for record in records:
        texts[record.label].add(record.text)
    if len(texts) < 2:
        raise DataError(f"{file} has one class, {next(iter(texts))!r}; an adapter learns to tell classes apart: at least 2")
    lone = sorted(label for label, own in texts.items() if len(own) < 2)
    if lone:
        raise DataError(
            f"{file}: {len(lone)} of {len(texts)} classes have one text ({_listed(lone)}); a class needs at least 2 different "
            "texts: add some, join classes, or leave these rows out"
        )


def check_labels(file: Path, tested: Sequence[LabelledText], trained: Sequence[LabelledText]) -> None:
    """Raises DataError if labels of the texts to measure on are not among those to train on."""
    known = {record.label for record in trained}
    if strange := sorted({record.label for record in tested} - known):
        raise DataError(f"{file} has {len(strange)} labels that are not trained on: {_listed(strange)}; there are {len(known)}")


def check_candidates(file: Path, tested: Sequence[Pair]) -> None:
    """Raises DataError if there are fewer than 2 positives to rank."""
    if len({pair.positive for pair in tested}) < 2:
        raise DataError(f"{file} has one positive, and a ranking needs at least 2")


def _rows(file: Path, columns: Columns) -> Iterator[Row]:
    """Yields the values of the columns. The first row is read with all columns, to know them."""
    first = next(iter(read_records(file)), None)
    if first is None:
        return
    _check_columns(str(file), columns, list(first.fields))
    # A name with a dot is a nested one to the reader.
    wanted = None if any("." in column for column in columns.named.values()) else list(columns.named.values())
    for place, fields in read_records(file, columns=wanted):
        if file_format(file) == ".jsonl":  # each line names its own fields
            _check_columns(place, columns, list(fields))
        yield Row(place, {name: fields[column] for name, column in columns.named.items()})


def _check_columns(place: str, columns: Columns, names: list[str]) -> None:
    for option, column in columns.named.items():
        if column not in names:
            raise DataError(f"{place} has no column {column!r} (--{option}){_nearest(column, names)}")


def _nearest(column: str, names: list[str]) -> str:
    """End of a message about a missing column: the nearest names, and those that there are."""
    if len(names) == 1 and (separator := next((mark for mark in ";\t|," if mark in names[0]), None)):
        return f"; its only column is {names[0]!r}: is it separated by {separator!r}? .csv has commas, .tsv tabs"
    return f"{did_you_mean(column, names) or ';'} it has {_listed([repr(name) for name in names], most=20)}"


def _refuse_empty(file: Path, rows: Sequence[Row]) -> None:
    """Raises DataError if values are missing, or of white space alone."""
    empty: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for option, value in row.values.items():
            if _is_empty(value):
                empty[option].append(row.place.removeprefix(f"{file}:"))
    if empty:
        found = "; ".join(f"{len(places)} with an empty {option}, at {_listed(places)}" for option, places in empty.items())
        raise DataError(f"{file}: of {len(rows)} rows {found}; fill them, or leave these rows out")


def _is_empty(value: Any) -> bool:
    if isinstance(value, list):
        return not value or any(map(_is_empty, value))
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _labelled(row: Row) -> dict[str, Any]:
    return {"text": _text(row, "text"), "label": _label(row)}


def _pair(row: Row) -> dict[str, Any]:
    return {"anchor": _text(row, "anchor"), "positive": _text(row, "positive")}


def _triplet(row: Row) -> dict[str, Any]:
    negatives = row.values["negative"]
    listed = negatives if isinstance(negatives, list) else [negatives]
    return _pair(row) | {"negatives": [_checked_text(each, row.place, "negative") for each in listed]}


def _text(row: Row, option: str) -> str:
    return _checked_text(row.values[option], row.place, option)


def _checked_text(value: Any, place: str, option: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: the {option} is no text but {type(value).__name__}: {value!r}")
    if (position := lone_surrogate(value)) is not None:
        raise DataError(f"{place}: the {option} is not valid Unicode: a lone surrogate at position {position}")
    return value


def _label(row: Row) -> str:
    value = row.values["label"]
    if isinstance(value, str):
        return _checked_text(value, row.place, "label").strip()
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float) and value.is_integer():  # integers, in a column that had gaps
        return str(int(value))
    raise DataError(f"{row.place}: the label is {value!r}; a label is a text or an integer")


def _listed(names: Sequence[str], most: int = NAMED) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

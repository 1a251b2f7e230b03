"""The five kinds of training records, and the functions that read and write them.

The fields have sentence-transformers' names. Every kind may also have `language`, by which batches
of one language are formed, and `group`: texts of equal group are never negatives of one another.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from jina_jax.errors import DataError
from jina_jax.storage import StoragePath, as_path
from jina_jax.storage.paths import check_file
from jina_jax.text import readers

Text = Annotated[str, Field(min_length=1)]


class Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", hide_input_in_errors=True)

    language: str = ""
    group: str = ""


class PlainText(Record):
    """A single text, for MLM."""

    text: Text


class Pair(Record):
    """Two texts that belong together."""

    anchor: Text
    positive: Text

    @model_validator(mode="before")
    @classmethod
    def _own_texts_are_no_negatives(cls, fields: dict[str, Any]) -> dict[str, Any]:
        negatives = fields.get("negatives")
        for number, text in enumerate(negatives if isinstance(negatives, list | tuple) else (), 1):
            for own in ("anchor", "positive"):
                if text == fields.get(own):
                    raise PydanticCustomError("own_text", f"negative {number} is the {own} itself")  # type: ignore[arg-type]
        return fields


class Triplet(Pair):
    """A pair, and negatives: texts that look alike but do not belong to the anchor.

    `negative_groups` are the groups of the negatives, "" where one has none; () = not known.
    """

    negatives: Annotated[tuple[Text, ...], Field(min_length=1, strict=False)]
    negative_groups: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @field_validator("negative_groups")
    @classmethod
    def _belong_to_the_negatives(cls, groups: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        own, negatives = info.data.get("group"), info.data.get("negatives", groups)
        if groups and len(groups) != len(negatives):
            raise PydanticCustomError("length", f"{len(groups)} for {len(negatives)} negatives")  # type: ignore[arg-type]
        if own and own in groups:
            message = f"negative {groups.index(own) + 1} is of the record's own group"
            raise PydanticCustomError("own_group", message)  # type: ignore[arg-type]
        return groups


class ScoredPair(Record):
    """Two texts and a score of their similarity; only the order of scores matters."""

    sentence1: Text
    sentence2: Text
    score: Annotated[float, Field(strict=False, allow_inf_nan=False)]


class LabelledText(Record):
    """A text and the label of its class."""

    text: Text
    label: Text


KINDS: dict[str, type[Record]] = {
    "text": PlainText,
    "pair": Pair,
    "triplet": Triplet,
    "scored_pair": ScoredPair,
    "labelled_text": LabelledText,
}
"""Record kinds by the name that configurations and the command line use."""


def kind_named(name: str) -> type[Record]:
    """Returns the record class of a kind.

    Raises:
        ValueError: unknown kind; the message lists the kinds.
    """
    if name not in KINDS:
        raise ValueError(f"unknown record kind {name!r}; valid are {list(KINDS)}")
    return KINDS[name]


def read_records(file: str | StoragePath, kind: str) -> Iterator[Record]:
    """Yields the records of a file in any format of `jina_jax.text.readers`, one by one.

    Raises:
        DataError: a record lacks a field, has one of another type, or has its own anchor or
            positive among its negatives; the message names file and line.
        ValueError: unknown kind or file type.
        FileNotFoundError: no such file.
    """
    record = kind_named(kind)
    check_file(as_path(file))
    for place, fields in readers.read_records(file):
        yield check_record(record, kind, fields, place)


def write_records(file: str | Path, records: Iterator[Record]) -> int:
    """Writes records as JSON lines; returns their number."""
    count = 0
    with Path(file).open("w", encoding="utf-8") as lines:
        for record in records:
            lines.write(json.dumps(record.model_dump(exclude_defaults=True), ensure_ascii=False) + "\n")
            count += 1
    return count


def check_record(record: type[Record], kind: str, fields: dict[str, Any], place: str) -> Record:
    """Returns the record of some fields; raises DataError, which names the place, if it is none."""
    present = {name: value for name, value in fields.items() if value is not None}
    try:
        return record.model_validate(present)
    except ValidationError as error:
        details = "; ".join(": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"]))) for e in error.errors())
        needed = [name for name, field in record.model_fields.items() if field.is_required()]
        raise DataError(f"{place}: not a {kind} record ({details}); it needs {needed}") from error

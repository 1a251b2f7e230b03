"""Reads the fields of a request. An error names the field and says what would be valid; null is a
field that is absent, and a field that no schema has is passed over."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import orjson

from ...text.unicode import lone_surrogate
from ..errors import ApiError, invalid

T = TypeVar("T")

TOKEN_IDS = (
    "holds token ids, which are another tokenizer's: send strings. "
    "In LangChain's OpenAIEmbeddings set check_embedding_ctx_length=False"
)


def json_object(body: bytes) -> dict[str, Any]:
    """Returns the object that a body holds.

    Raises:
        ApiError: it is no JSON, or another value.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        value = _with_lone_surrogates(body, error)
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type_name(value)}", code="invalid_json")
    return value


def _with_lone_surrogates(body: bytes, error: orjson.JSONDecodeError) -> Any:
    """Reads a body that only half a surrogate pair keeps from being JSON: the field's own error
    then names the text."""
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def get(body: Mapping[str, Any], *names: str) -> tuple[str, Any]:
    """Returns name and value of the first field that is there, else the first name and None."""
    return next(((name, body[name]) for name in names if body.get(name) is not None), (names[0], None))


def boolean(body: Mapping[str, Any], name: str, default: bool) -> bool:
    """Returns a field that is true or false."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(name, f"must be true or false, not {shown(value)}")
    return default if value is None else value


def string(body: Mapping[str, Any], *names: str) -> tuple[str, str | None]:
    """Returns name and value of a field that is a string."""
    name, value = get(body, *names)
    if value is not None and not isinstance(value, str):
        raise invalid(name, f"must be a string, not {shown(value)}")
    return name, value


def integer(body: Mapping[str, Any], low: int, high: int, *names: str) -> int | None:
    """Returns a field that is an integer between bounds, both included."""
    name, value = get(body, *names)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise invalid(name, f"must be an integer in {low}..{high}, not {shown(value)}")
    return value


def choice(body: Mapping[str, Any], valid: Mapping[str, T], default: str, *names: str) -> T:
    """Returns what a field with one of a few values stands for."""
    name, value = string(body, *names)
    if value is not None and value not in valid:
        raise invalid(name, f"must be one of {[*valid]}, not {shown(value)}")
    return valid[default if value is None else value]


def texts(value: Any, name: str, most: int) -> tuple[list[str], bool]:
    """Returns the texts of a field, and whether it was one alone.

    A text is a string, or an object whose field `text` is one. The empty text is a text.

    Raises:
        ApiError: there are none or too many, or one is not a text; the message names it.
    """
    if value is None:
        raise invalid(name, "is missing: a text, or a list of texts")
    if isinstance(value, str | dict):
        return [text(value, name)], True
    if not isinstance(value, list):
        raise invalid(name, f"must be a text or a list of texts, not {shown(value)}")
    if not value:
        raise invalid(name, "is empty: it must hold at least one text", "empty")
    if len(value) > most:
        raise invalid(name, f"holds {len(value):,} texts; the limit is {most:,} (--max-texts)", "too_many_texts")
    if all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        raise invalid(name, TOKEN_IDS, "token_ids")
    return [text(each, f"{name}[{index}]") for index, each in enumerate(value)], False


def names(field: str, single: bool) -> Callable[[int], str]:
    """Returns what a request calls the texts of a field, by their index."""
    return (lambda _: field) if single else (lambda index: f"{field}[{index}]")


def text(value: Any, name: str) -> str:
    """Returns one text.

    Raises:
        ApiError: it is none, or not valid Unicode.
    """
    if isinstance(value, list) and value and all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        raise invalid(name, TOKEN_IDS, "token_ids")
    if isinstance(value, dict):
        found = value.get("text")
        if found is None:
            raise invalid(name, f"has no field text: this model embeds text alone; its fields are {shown([*value])}")
        value, name = found, f"{name}.text"
    if not isinstance(value, str):
        raise invalid(name, f"must be a string, not {shown(value)}")
    if (position := lone_surrogate(value)) is not None:
        raise invalid(name, f"is not valid Unicode: a lone surrogate at position {position}", "invalid_unicode")
    return value


def without_surrogates(body: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises ApiError if a field that is echoed is not valid Unicode."""
    for name in names:
        if isinstance(value := body.get(name), str) and lone_surrogate(value) is not None:
            raise invalid(name, "is not valid Unicode: it has a lone surrogate", "invalid_unicode")


def shown(value: Any) -> str:
    """Returns a value as messages show it: as JSON, and not all of a long one."""
    written = json.dumps(value, ensure_ascii=True, default=str) if not isinstance(value, list | dict) else type_name(value)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        written = json.dumps(value, ensure_ascii=True)
    return written if len(written) <= 80 else f"{written[:77]}..."


def type_name(value: Any) -> str:
    """Returns JSON's name of a value's type."""
    names = {bool: "a boolean", str: "a string", dict: "an object", list: "a list", int: "a number", float: "a number"}
    return names.get(type(value), "null")

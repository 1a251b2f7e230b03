"""`/v2/embed` and `/v1/embed`: Cohere's schema."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..call import EmbedCall, ServedModel
from ..errors import ApiError, invalid
from ..tasks import COHERE_INPUT_TYPES, known_tasks, resolve_task, split_model_name
from ..texts import Limits, Truncate
from ..vectors import FORMS
from . import fields

TRUNCATE: dict[str, Truncate] = {"NONE": "none", "START": "start", "END": "end"}

_FEWEST_TOKENS = 64
"""Least `max_tokens`: room for every instruction, and some text."""


def parse(body: Mapping[str, Any], model: ServedModel) -> EmbedCall:
    """Returns what a body of either version asks for.

    Raises:
        ApiError: a field is not valid.
    """
    fields.without_surrogates(body, ["model"])
    types(body)
    limit = model.max_length
    truncate = fields.choice(body, TRUNCATE, "END", "truncate")
    name, texts = _texts(body, model.max_texts)
    return EmbedCall(
        texts=texts,
        task=resolve_task(*_task(body, model)),
        limits=Limits(
            min(fields.integer(body, min(_FEWEST_TOKENS, limit), 2**31, "max_tokens") or limit, limit),
            truncate,
            fields.names(name, False),
            'Send "truncate": "END"',
        ),
        dim=fields.integer(body, 1, model.config.hidden_size, "output_dimension") or model.dim,
    )


def _texts(body: Mapping[str, Any], most: int) -> tuple[str, list[str]]:
    """Name of the field with the texts, and the texts."""
    if body.get("images"):
        raise invalid("images", "are not embedded: this model embeds text alone")
    name, value = fields.get(body, "texts", "inputs")
    if value is not None and not isinstance(value, list):
        raise invalid(name, f"must be a list, not {fields.shown(value)}")
    if name == "texts" or not value or len(value) > most:
        return name, fields.texts(value, name, most)[0]
    return name, [_content(each, f"inputs[{index}]") for index, each in enumerate(value)]


def _content(value: Any, name: str) -> str:
    """The text of an object of `inputs`: its content has one part, a text."""
    parts = value.get("content") if isinstance(value, dict) else None
    if not isinstance(parts, list) or len(parts) != 1:
        raise invalid(f"{name}.content", "must be a list of one part: the text to embed")
    return fields.text(parts[0], f"{name}.content[0]")


def _task(body: Mapping[str, Any], model: ServedModel) -> tuple[str | None, Any, str]:
    """Name of the task, the model's configuration, and the field that named it."""
    field, task = fields.string(body, "input_type")
    if task is None:
        field, (_, task) = "model", split_model_name(fields.string(body, "model")[1] or "", model.config)
    elif task not in known_tasks(model.config):
        if task not in COHERE_INPUT_TYPES:
            valid = [*COHERE_INPUT_TYPES, *known_tasks(model.config)]
            raise invalid(field, f"must be one of {valid}, not {fields.shown(task)}", "unknown_task")
        task = COHERE_INPUT_TYPES[task]
    return model.default_task if task is None else task, model.config, field


def types(body: Mapping[str, Any]) -> list[str] | None:
    """Returns the forms of the embeddings that a body asks for; None = it does not say."""
    value = body.get("embedding_types")
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise invalid("embedding_types", f"must be a list of some of {[*FORMS]}, not {fields.shown(value)}")
    for index, each in enumerate(value):
        if not isinstance(each, str) or each not in FORMS:
            raise invalid(f"embedding_types[{index}]", f"must be one of {[*FORMS]}, not {fields.shown(each)}")
    return [*dict.fromkeys(value)]


def answer(
    body: Mapping[str, Any], call: EmbedCall, embeddings: np.ndarray, tokens: int, request_id: str, version: str
) -> dict[str, Any]:
    """Returns the answer to a body of version "1" or "2", with its embeddings [n, dim]."""
    asked = types(body) or (["float"] if version == "2" else None)
    by_type = {name: FORMS[name](embeddings) for name in asked or ()}
    return {
        "response_type": "embeddings_floats" if asked is None else "embeddings_by_type",
        "id": request_id,
        "embeddings": embeddings if asked is None else by_type,
        "texts": call.texts,
        "meta": {
            "api_version": {"version": version},
            "billed_units": {"input_tokens": tokens},
            "tokens": {"input_tokens": tokens},
        },
    }


def error_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """Returns an error as Cohere's clients read it."""
    return {"message": str(error), "id": request_id}

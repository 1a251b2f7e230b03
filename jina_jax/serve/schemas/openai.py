"""`/v1/embeddings` and `/v1/models`: OpenAI's schema and Jina's, which cannot be told apart."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..call import EmbedCall, ServedModel
from ..errors import ApiError, invalid
from ..tasks import COHERE_INPUT_TYPES, known_tasks, resolve_task, split_model_name
from ..texts import Limits
from ..vectors import FORMS
from . import fields

FORM_FIELDS = ("embedding_type", "embedding_types", "encoding_type", "encoding_format")
"""Names of one field in Jina's and OpenAI's clients. The first that is there counts: official ones
add `encoding_format` by themselves."""

TYPES = ("float", "base64", "binary", "ubinary")


def parse(body: Mapping[str, Any], model: ServedModel) -> EmbedCall:
    """Returns what a body asks for.

    Raises:
        ApiError: a field is not valid.
    """
    fields.without_surrogates(body, ["model"])
    texts, single = fields.texts(body.get("input"), "input", model.max_texts)
    truncate = "end" if fields.boolean(body, "truncate", False) else "none"
    form(body)
    return EmbedCall(
        texts=texts,
        task=resolve_task(*_task(body, model)),
        limits=Limits(model.max_length, truncate, fields.names("input", single), 'Send "truncate": true'),
        dim=fields.integer(body, 1, model.config.hidden_size, "dimensions", "output_dimension") or model.dim,
        normalized=fields.boolean(body, "normalized", True),
        late_chunking=fields.boolean(body, "late_chunking", False),
    )


def _task(body: Mapping[str, Any], model: ServedModel) -> tuple[str | None, Any, str]:
    """Name of the task, the model's configuration, and the field that named it."""
    field, task = fields.string(body, "task", "task_type", "input_type")
    if task is None:
        field, (_, task) = "model", split_model_name(fields.string(body, "model")[1] or "", model.config)
    elif task not in known_tasks(model.config):
        task = COHERE_INPUT_TYPES.get(task, task)
    return model.default_task if task is None else task, model.config, field


def form(body: Mapping[str, Any]) -> str:
    """Returns the form of the embeddings that a body asks for, one of TYPES."""
    name, value = fields.get(body, *FORM_FIELDS)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is not None and (not isinstance(value, str) or value not in TYPES):
        raise invalid(name, f"must be one of {[*TYPES]}, not {fields.shown(value)}")
    return value or "float"


def answer(body: Mapping[str, Any], model: ServedModel, embeddings: np.ndarray, tokens: int) -> dict[str, Any]:
    """Returns the answer to a body, with its embeddings [n, dim]."""
    items = FORMS[form(body)](embeddings)
    return {
        "object": "list",
        "model": body.get("model") or model.names[0],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "data": [{"object": "embedding", "index": index, "embedding": item} for index, item in enumerate(items)],
    }


def models(model: ServedModel) -> dict[str, Any]:
    """Returns the names of the model, and those with a task at their end."""
    names = [*model.names, *(f"{name}:{task}" for name in model.names for task in known_tasks(model.config))]
    listed = [{"id": name, "object": "model", "created": model.created, "owned_by": "jina-jax"} for name in names]
    return {"object": "list", "data": listed}


def error_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """Returns an error as clients of OpenAI (`error`), Jina (`detail`) and Cohere (`message`) read
    it."""
    message = str(error)
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    described = {"message": message, "type": kind, "param": error.param, "code": error.code}
    return {"error": described, "detail": message, "message": message, "request_id": request_id}

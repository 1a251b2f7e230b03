"""`/embed`, `/embed_all`, `/similarity`, `/tokenize` and `/info`: the schema of Hugging Face's
text-embeddings-inference."""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from ..call import EmbedCall, ServedModel
from ..errors import ApiError, invalid
from ..tasks import Task, resolve_prompt_name, resolve_task
from ..texts import CHARACTERS_PER_TOKEN, Limits, Truncate
from . import fields

if TYPE_CHECKING:
    import tokenizers

DIRECTIONS: dict[str, Truncate] = {"Right": "end", "Left": "start", "right": "end", "left": "start"}


def parse(body: Mapping[str, Any], model: ServedModel, *, states: bool = False) -> EmbedCall:
    """Returns what a body of /embed asks for, or with `states` one of /embed_all.

    Raises:
        ApiError: a field is not valid.
    """
    texts, single = fields.texts(body.get("inputs"), "inputs", model.max_texts)
    fields.choice(body, {"float": None}, "float", "encoding_format")
    return EmbedCall(
        texts=texts,
        task=_task(body, model),
        limits=_limits(body, model, fields.names("inputs", single)),
        dim=fields.integer(body, 1, model.config.hidden_size, "dimensions") or model.dim,
        normalized=fields.boolean(body, "normalize", True),
        states=states,
    )


def parse_similarity(body: Mapping[str, Any], model: ServedModel) -> EmbedCall:
    """Returns what a body of /similarity asks for: the sentence and then those that it is compared
    with.

    Raises:
        ApiError: a field is not valid.
    """
    inputs, parameters = body.get("inputs"), body.get("parameters") or {}
    if not isinstance(inputs, dict):
        raise invalid("inputs", f"must be an object with source_sentence and sentences, not {fields.shown(inputs)}")
    if not isinstance(parameters, dict):
        raise invalid("parameters", f"must be an object, not {fields.shown(parameters)}")
    source, sentences = inputs.get("source_sentence"), inputs.get("sentences")
    if not isinstance(source, str):
        raise invalid("inputs.source_sentence", f"must be a string, not {fields.shown(source)}")
    if not isinstance(sentences, list):
        raise invalid("inputs.sentences", f"must be a list of texts, not {fields.shown(sentences)}")
    others, _ = fields.texts(sentences, "inputs.sentences", model.max_texts)
    return EmbedCall(
        texts=[fields.text(source, "inputs.source_sentence"), *others],
        task=_task(parameters, model),
        limits=_limits(parameters, model, _name_of_sentence),
        dim=model.dim,
    )


def _name_of_sentence(index: int) -> str:
    return f"inputs.sentences[{index - 1}]" if index else "inputs.source_sentence"


def similarities(embeddings: np.ndarray) -> np.ndarray:
    """Returns the cosines of the first embedding, of length 1 as all, with the others."""
    return embeddings[1:] @ embeddings[0]


def tokenize(body: Mapping[str, Any], model: ServedModel, backend: "tokenizers.Tokenizer") -> list[list[dict[str, Any]]]:
    """Returns the tokens of each text of a body of /tokenize.

    Raises:
        ApiError: a field is not valid.
    """
    texts, single = fields.texts(body.get("inputs"), "inputs", model.max_texts)
    prefix = _task(body, model).prefix
    special = fields.boolean(body, "add_special_tokens", True)
    limits, most = _limits(body, model, fields.names("inputs", single)), CHARACTERS_PER_TOKEN * model.max_length
    if long := [index for index, text in enumerate(texts) if len(text) > most]:
        raise invalid(limits.name(long[0]), f"has {len(texts[long[0]]):,} characters; the limit is {most:,}")
    encodings = backend.encode_batch([prefix + text for text in texts], add_special_tokens=special)
    return [_tokens(prefix + text, encoding) for text, encoding in zip(texts, encodings, strict=True)]


def _tokens(text: str, encoding: Any) -> list[dict[str, Any]]:
    parts = zip(encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True)
    return [
        {"id": id_, "text": token, "special": True, "start": None, "stop": None}
        if special
        else {"id": id_, "text": text[start:stop], "special": False, "start": start, "stop": stop}
        for id_, token, special, (start, stop) in parts
    ]


def info(model: ServedModel) -> dict[str, Any]:
    """Returns what the server is."""
    return {
        "model_id": model.names[0],
        "model_sha": None,
        "model_dtype": model.dtype,
        "served_model_name": model.names[0],
        "model_type": {"embedding": {"pooling": "mean"}},
        "max_concurrent_requests": None,
        "max_input_length": model.max_length,
        "max_batch_tokens": model.max_batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": model.max_texts,
        "auto_truncate": False,
        "tokenization_workers": 1,
        "version": version("jina-jax"),
        "sha": None,
        "docker_label": None,
    }


def _task(body: Mapping[str, Any], model: ServedModel) -> Task:
    """What a body's texts are embedded with: `task`, which only this server knows, or
    `prompt_name`."""
    field, task = fields.string(body, "task")
    if task is not None:
        return resolve_task(task, model.config, field)
    field, prompt = fields.string(body, "prompt_name")
    if prompt is not None:
        return resolve_prompt_name(prompt, model.config, field)
    return resolve_task(model.default_task, model.config, "prompt_name")


def _limits(body: Mapping[str, Any], model: ServedModel, name: Callable[[int], str]) -> Limits:
    direction = fields.choice(body, DIRECTIONS, "Right", "truncation_direction")
    truncate: Truncate = direction if fields.boolean(body, "truncate", False) else "none"
    return Limits(model.max_length, truncate, name, 'Send "truncate": true')


def status(error: ApiError) -> int:
    """Returns text-embeddings-inference's status of an error: 422 for what is not valid."""
    if error.status == 400 and error.code not in ("empty", "invalid_json"):
        return 422
    return 424 if error.status == 500 else error.status


def error_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """Returns an error as clients of text-embeddings-inference read it."""
    kinds = {429: "Overloaded", 503: "Unhealthy", 500: "Backend"}
    kind = "Empty" if error.code == "empty" else kinds.get(error.status, "Validation")
    return {"error": str(error), "error_type": kind, "request_id": request_id}

"""`/v2/embed` and `/v1/embed`, over HTTP."""

import base64

import jax.numpy as jnp
import numpy as np
import pytest

from jina_jax.serve.tasks import COHERE_INPUT_TYPES

TEXTS = ["a text editor", "", "ein Spiel"]


@pytest.mark.parametrize("input_type", [*COHERE_INPUT_TYPES, "text-matching", "retrieval.query"])
def test_input_types_are_adapters(served, input_type):
    body = served.post("/v2/embed", model="embed-v4.0", texts=TEXTS, input_type=input_type).json()
    expected = served.embedder.encode(TEXTS, COHERE_INPUT_TYPES.get(input_type, input_type))
    np.testing.assert_allclose(np.float32(body["embeddings"]["float"]), expected, atol=1e-6)
    assert body["response_type"] == "embeddings_by_type" and body["texts"] == TEXTS and body["id"]
    assert isinstance(body["meta"]["billed_units"]["input_tokens"], int) and body["meta"]["api_version"] == {"version": "2"}


def test_every_type_at_once_and_only_those_that_are_asked_for(served):
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    inputs = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
    body = served.post("/v2/embed", inputs=inputs, embedding_types=types, output_dimension=24, priority=1).json()
    given, expected = body["embeddings"], served.embedder.encode(TEXTS, truncate_dim=24)
    assert [*given] == types
    floats = np.float32(given["float"])
    np.testing.assert_allclose(floats, expected, atol=1e-6)
    np.testing.assert_array_equal([np.frombuffer(base64.b64decode(item), "<f4") for item in given["base64"]], floats)
    np.testing.assert_array_equal(given["int8"], np.rint(floats * 127))
    np.testing.assert_array_equal(given["uint8"], np.rint((floats + 1) * np.float32(127.5)))
    np.testing.assert_array_equal(given["ubinary"], np.packbits(floats > 0, axis=-1))
    np.testing.assert_array_equal(given["binary"], np.packbits(floats > 0, axis=-1).astype(int) - 128)


def test_the_first_version(served):
    plain = served.post("/v1/embed", texts=TEXTS, truncate=None, input_type=None, model=None).json()
    assert plain["response_type"] == "embeddings_floats"
    np.testing.assert_allclose(np.float32(plain["embeddings"]), served.embedder.encode(TEXTS), atol=1e-6)
    typed = served.post("/v1/embed", texts=TEXTS, embedding_types=["float"], input_type="clustering").json()
    assert typed["response_type"] == "embeddings_by_type"
    expected = served.embedder.encode(TEXTS, "separation")
    np.testing.assert_allclose(np.float32(typed["embeddings"]["float"]), expected, atol=1e-6)


def test_truncation_keeps_the_start_or_the_end_behind_the_instruction(served):
    limit, tokenizer = 64, served.embedder.tokenizer
    text, prefix = " ".join(f"word{i}" for i in range(200)), served.embedder.config.prompt("retrieval.passage")
    fields = {"texts": ["short", text], "input_type": "search_document", "max_tokens": limit}
    refused = served.post("/v2/embed", truncate="NONE", **fields)
    assert refused.status_code == 400 and refused.json()["message"].startswith("texts[1] is too long")
    whole, head = tokenizer(prefix + text)["input_ids"], tokenizer(prefix.strip())["input_ids"][:-1]
    kept = {
        "END": whole[: limit - 1] + whole[-1:],
        "START": head + whole[len(whole) - (limit - len(head)) :],
    }
    assert whole[: len(head)] == head
    for truncate in ("START", "END", None):
        answer = served.post("/v2/embed", truncate=truncate, **fields).json()
        ids = np.array([kept[truncate or "END"]])
        assert ids.shape == (1, limit)
        inputs = map(jnp.asarray, (ids, np.ones_like(ids), np.arange(limit)[None], np.array([[1]])))
        states = np.asarray(served.embedder.encoder(*inputs))[0]
        expected = states.mean(0) / np.linalg.norm(states.mean(0))
        np.testing.assert_allclose(np.float32(answer["embeddings"]["float"][1]), expected, atol=1e-5)
        short = len(tokenizer(prefix + "short")["input_ids"])
        assert answer["meta"]["tokens"]["input_tokens"] == short + limit


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"texts": []}, "texts is empty"),
        ({"texts": "a"}, "texts must be a list"),
        ({}, "texts is missing"),
        ({"texts": ["a", 5]}, "texts[1] must be a string, not 5"),
        ({"texts": ["a"], "input_type": "image"}, "input_type must be one of"),
        ({"texts": ["a"], "embedding_types": ["float", "int4"]}, "embedding_types[1] must be one of"),
        ({"texts": ["a"], "embedding_types": "float"}, "embedding_types must be a list"),
        ({"texts": ["a"], "truncate": "MIDDLE"}, "truncate must be one of"),
        ({"texts": ["a"], "output_dimension": 33}, "output_dimension must be an integer in 1..32, not 33"),
        ({"texts": ["a"], "max_tokens": 3}, "max_tokens must be an integer in 64.."),
        ({"images": ["data:"]}, "images are not embedded"),
        ({"inputs": [{"content": [{"type": "image_url"}]}]}, "inputs[0].content[0] has no field text"),
        ({"inputs": [{"content": []}]}, "inputs[0].content must be a list of one part"),
    ],
)
def test_what_is_not_valid_is_named(served, fields, message):
    for path in ("/v1/embed", "/v2/embed"):
        response = served.post(path, model="m", **fields)
        assert response.status_code == 400 and response.json()["message"].startswith(message), response.text
        assert response.json().keys() == {"message", "id"}

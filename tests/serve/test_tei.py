"""The routes of text-embeddings-inference, over HTTP."""

import numpy as np
import pytest

TEXTS = ["a text editor", "", "ein Spiel"]


def test_embed(served):
    encode = served.embedder.encode
    for inputs in (TEXTS, TEXTS[0]):
        given = np.float32(served.post("/embed", inputs=inputs).json())
        np.testing.assert_allclose(given, np.atleast_2d(encode(inputs)), atol=1e-6)
    raw = np.float32(served.post("/embed", inputs=TEXTS, normalize=False, dimensions=9).json())
    np.testing.assert_allclose(raw, encode(TEXTS, normalize_embeddings=False, truncate_dim=9), atol=1e-5)
    for fields in ({"prompt_name": "separation"}, {"task": "separation"}):
        given = np.float32(served.post("/embed", inputs=TEXTS, **fields).json())
        np.testing.assert_allclose(given, encode(TEXTS, "separation"), atol=1e-6)


def test_embed_all_gives_the_states_of_every_token(served):
    given = served.post("/embed_all", inputs=TEXTS, prompt_name="retrieval.query").json()
    expected = served.embedder.encode(TEXTS, "retrieval.query", output_value="token_embeddings")
    for states, wanted in zip(given, expected, strict=True):
        np.testing.assert_allclose(np.float32(states), wanted, atol=1e-5)


def test_token_states_are_bounded(served):
    response = served.post("/embed_all", inputs=["word " * 6000] * 3)
    assert response.status_code == 413 and "18,006 tokens; the limit for token states is 16,384" in response.json()["error"]


def test_similarity(served):
    inputs = {"source_sentence": "a game", "sentences": TEXTS}
    given = served.post("/similarity", inputs=inputs, parameters={"prompt_name": "text-matching"}).json()
    vectors = served.embedder.encode(["a game", *TEXTS], "text-matching")
    np.testing.assert_allclose(given, vectors[1:] @ vectors[0], atol=1e-6)


def test_tokenize(served):
    text = "ein Spiel für zwei"
    tokens = served.post("/tokenize", inputs=[text]).json()[0]
    assert [token["id"] for token in tokens] == served.embedder.tokenizer(text)["input_ids"]
    assert tokens[0] == {"id": 0, "text": "<s>", "special": True, "start": None, "stop": None}
    assert all(text[token["start"] : token["stop"]] == token["text"] for token in tokens[1:-1])
    bare = served.post("/tokenize", inputs=text, add_special_tokens=False).json()[0]
    assert bare == tokens[1:-1]


def test_info(served):
    info = served.http.get("/info").json()
    assert info["model_id"] == "tiny" and info["max_input_length"] == 8194 and info["max_client_batch_size"] == 2048


def test_truncation_by_direction(served):
    long = "word " * 9000
    refused = served.post("/embed", inputs=["a", long])
    assert refused.status_code == 422 and refused.json()["error"].startswith("inputs[1] is too long")
    right, left = (
        served.post("/embed", inputs=long, truncate=True, truncation_direction=side).json() for side in ("Right", "left")
    )
    np.testing.assert_allclose(right, left, atol=1e-6)  # all its words are one


@pytest.mark.parametrize(
    ("path", "fields", "status", "kind", "message"),
    [
        ("/embed", {"inputs": []}, 400, "Empty", "inputs is empty"),
        ("/embed", {}, 422, "Validation", "inputs is missing"),
        ("/embed", {"inputs": [[1, 2]]}, 422, "Validation", "inputs[0] holds token ids"),
        ("/embed", {"inputs": "a", "prompt_name": "nope"}, 422, "Validation", "prompt_name 'nope' is no prompt"),
        ("/embed", {"inputs": "a", "dimensions": 0}, 422, "Validation", "dimensions must be an integer in 1..32, not 0"),
        ("/embed", {"inputs": "a", "normalize": "yes"}, 422, "Validation", 'normalize must be true or false, not "yes"'),
        ("/embed", {"inputs": "a", "encoding_format": "base64"}, 422, "Validation", "encoding_format must be one of"),
        ("/embed_all", {"inputs": 3}, 422, "Validation", "inputs must be a text or a list of texts, not 3"),
        ("/similarity", {"inputs": "a"}, 422, "Validation", "inputs must be an object"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 400, "Empty", "inputs.sentences is empty"),
        ("/similarity", {"inputs": {"source_sentence": 1, "sentences": ["a"]}}, 422, "Validation", "inputs.source_sentence"),
        ("/tokenize", {"inputs": ["a", None]}, 422, "Validation", "inputs[1] must be a string, not null"),
    ],
)
def test_what_is_not_valid_is_named(served, path, fields, status, kind, message):
    response = served.post(path, **fields)
    assert response.status_code == status, response.text
    assert response.json()["error_type"] == kind and response.json()["error"].startswith(message), response.text

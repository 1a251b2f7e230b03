"""`/v1/embeddings` and `/v1/models`, over HTTP: what OpenAI's and Jina's clients send."""

import base64
import json

import numpy as np
import pytest

TEXTS = ["a text editor", "", "ein Spiel", "日本語\u0000 🎲"]
LONG = "word " * 9000


def vectors(response) -> np.ndarray:
    return np.array([item["embedding"] for item in response.json()["data"]], np.float32)


def test_vectors_order_index_and_usage(served):
    response = served.post("/v1/embeddings", input=TEXTS, model="anything", task="retrieval.query", user="u", unknown={"a": 1})
    body = response.json()
    expected = served.embedder.encode(TEXTS, "retrieval.query")
    np.testing.assert_allclose(vectors(response), expected, atol=1e-6)
    assert [item["index"] for item in body["data"]] == [0, 1, 2, 3]
    assert body["object"] == "list" and body["model"] == "anything" and body["data"][0]["object"] == "embedding"
    prefix = served.embedder.config.prompt("retrieval.query")
    tokens = sum(len(served.embedder.tokenizer(prefix + text)["input_ids"]) for text in TEXTS)
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings", "/v1/embeddings/"])
def test_a_string_and_objects_with_text(served, path):
    expected = served.embedder.encode(["ein Spiel"])
    for given in ("ein Spiel", {"text": "ein Spiel"}, [{"text": "ein Spiel"}]):
        np.testing.assert_allclose(served.embeddings(path, input=given), expected, atol=1e-6)


def test_every_task_every_alias_and_the_end_of_a_models_name(served):
    for task in served.embedder.config.tasks:
        expected = served.embedder.encode(["ein Spiel"], task)
        for fields in ({"task": task}, {"task_type": task}, {"model": f"text-embedding-3-small:{task}"}):
            np.testing.assert_allclose(served.embeddings(input="ein Spiel", **fields), expected, atol=1e-6)
    query = served.embedder.encode(["ein Spiel"], "retrieval.query")
    np.testing.assert_allclose(served.embeddings(input="ein Spiel", input_type="search_query"), query, atol=1e-6)
    both = served.embeddings(input="ein Spiel", model="m:separation", task="retrieval.query")
    np.testing.assert_allclose(both, query, atol=1e-6)  # the field goes before the name
    plain = served.embedder.encode(["ein Spiel"])
    np.testing.assert_allclose(served.embeddings(input="ein Spiel", model="llama3:8b"), plain, atol=1e-6)


def test_base64_is_little_endian_float32_of_the_same_bits(served):
    floats = served.embeddings(input=TEXTS)
    for name in ("encoding_format", "embedding_type"):
        data = served.post("/v1/embeddings", input=TEXTS, **{name: "base64"}).json()["data"]
        decoded = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in data]
        np.testing.assert_array_equal(decoded, floats)


@pytest.mark.parametrize("dim", [1, 7, 32])
def test_any_dimension_is_cut_then_normalised_then_quantised(served, dim):
    expected = served.embedder.encode(TEXTS, truncate_dim=dim)
    np.testing.assert_allclose(served.embeddings(input=TEXTS, dimensions=dim), expected, atol=1e-6)
    # Codes may differ where a value is 0 within its rounding.
    sure = np.packbits(np.abs(expected) > 1e-6, axis=-1)
    bits = served.embeddings(input=TEXTS, dimensions=dim, embedding_type="ubinary", encoding_format="base64").astype(np.uint8)
    np.testing.assert_array_equal(bits & sure, served.embedder.encode(TEXTS, truncate_dim=dim, precision="ubinary") & sure)
    signed = served.embeddings(input=TEXTS, dimensions=dim, encoding_type="binary")
    np.testing.assert_array_equal(signed, bits.astype(int) - 128)


def test_normalized_false_and_a_list_of_one_type(served):
    raw = served.embeddings(input=TEXTS, normalized=False, embedding_type=["float"])
    np.testing.assert_allclose(raw, served.embedder.encode(TEXTS, normalize_embeddings=False), atol=1e-5)


def test_nulls_are_fields_that_are_absent(served):
    nulls = dict.fromkeys(
        ["task", "dimensions", "embedding_type", "encoding_format", "truncate", "normalized", "user", "model"]
    )
    np.testing.assert_allclose(served.embeddings(input=TEXTS, **nulls), served.embedder.encode(TEXTS), atol=1e-6)


def test_a_long_text_is_an_error_that_says_how_to_cut_it(served):
    response = served.post("/v1/embeddings", input=["a", LONG])
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == "input[1]" and error["code"] == "INPUT_TOKEN_LIMIT_EXCEEDED"
    tokens = len(served.embedder.tokenizer(LONG, truncation=False)["input_ids"])
    assert f"{tokens:,} tokens" in error["message"] and "8,194" in error["message"] and '"truncate": true' in error["message"]
    response = served.post("/v1/embeddings", input=["a", LONG], truncate=True)
    assert response.json()["usage"]["prompt_tokens"] == 3 + 8194
    with pytest.warns(UserWarning, match="longer than 8194 tokens"):
        expected = served.embedder.encode(["a", LONG])
    np.testing.assert_allclose(vectors(response), expected, atol=1e-6)
    assert served.metric("truncated_texts_total") >= 1


def test_models(served):
    listed = [model["id"] for model in served.http.get("/v1/models").json()["data"]]
    assert listed == ["tiny", *(f"tiny:{task}" for task in served.embedder.config.tasks)]


def test_one_error_body_suits_all_clients(served):
    response = served.post("/v1/embeddings", input=[1, 2, 3])
    body = response.json()
    message = body["error"]["message"]
    assert "check_embedding_ctx_length=False" in message and body["detail"] == body["message"] == message
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert served.post("/v1/embeddings", input=[[1, 2], [3]]).json()["error"]["param"] == "input[0]"


def test_request_ids_are_taken_and_given(served):
    response = served.http.post("/v1/embeddings", json={"input": "a"}, headers={"x-request-id": "mine-7"})
    assert response.headers["x-request-id"] == "mine-7"
    other = served.http.post("/v1/embeddings", json={"input": 5}, headers={"x-request-id": "a b"})
    assert len(other.headers["x-request-id"]) == 32 and other.json()["request_id"] == other.headers["x-request-id"]


def test_routes_that_there_are_not(served):
    for method, path, status in (("GET", "/v1/embeddings", 405), ("POST", "/v1/nothing", 404), ("GET", "/", 404)):
        response = served.http.request(method, path)
        assert response.status_code == status and path in response.json()["error"]["message"]


def test_probes_and_metrics(served):
    assert served.http.get("/health").status_code == served.http.get("/ready").status_code == 200
    before = served.metric("requests_total", route="/v1/embeddings", status="200")
    served.embeddings(input=TEXTS)
    assert served.metric("requests_total", route="/v1/embeddings", status="200") == before + 1
    text = served.http.get("/metrics").text
    for name in ("queued_tokens 0.0", "compilations_since_ready 0.0", "ready 1.0", 'dropped_total{reason="overload"}'):
        assert f"jina_jax_{name}" in text
    assert json.loads(served.http.get("/ready").content) == {"status": "ready"}


def test_late_chunking_is_that_of_encode_chunks(served):
    chunks = ["An image editor. ", "It opens photos, ", "and ", "zeichnet Bilder."] * 3
    for task in ("retrieval.passage", None):
        given = served.embeddings(input=chunks, task=task, late_chunking=True)
        np.testing.assert_allclose(given, served.embedder.encode_chunks([chunks], task)[0], atol=1e-6)
    assert not np.allclose(given, served.embedder.encode(chunks), atol=0.01)
    refused = served.post("/v1/embeddings", input=["a", " ", "b"], late_chunking=True)
    assert refused.status_code == 400 and "chunk 1 of document 0 has no token of its own" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("count", "words"),
    [(40, 8), pytest.param(600, 3, marks=pytest.mark.slow), pytest.param(30, 200, marks=pytest.mark.slow)],
)
def test_late_chunking_of_more_chunks_than_a_row_holds_and_over_the_limit(served, count, words):
    """40 chunks are more than a row of 512 slots holds, 600 more than any."""
    chunks = [f"word{i} " * words for i in range(count)]
    fields = {"input": chunks, "task": "retrieval.passage", "late_chunking": True}
    tokens = len(served.embedder.tokenizer("".join(chunks), truncation=False)["input_ids"])
    if tokens > 8194:
        refused = served.post("/v1/embeddings", **fields)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "INPUT_TOKEN_LIMIT_EXCEEDED"
        assert "tokens in all" in refused.json()["detail"]
    answer = served.post("/v1/embeddings", truncate=True, **fields)
    expected = served.embedder.encode_chunks([chunks], "retrieval.passage")[0]
    np.testing.assert_allclose(vectors(answer), expected, atol=1e-6)
    assert 0 < answer.json()["usage"]["prompt_tokens"] - tokens < 20
    assert served.metric("compilations_since_ready") == 0

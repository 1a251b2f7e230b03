"""Official clients, as their users install them, with nothing changed but the URL."""

import numpy as np
import pytest

from helpers.serving import serving
from jina_jax import Embedder

TEXTS = ["how do I edit a photo?", "ein Bildbearbeitungsprogramm"]
KEY = "secret-key"


def check(given, expected):
    np.testing.assert_allclose(np.asarray(given, np.float32), expected, atol=1e-5)


@pytest.fixture(scope="module")
def real(demo_model):
    """multilingual-e5-small behind a key; it has no adapters, and its prompts stand for the two
    sides."""
    with serving(Embedder.load(demo_model), keys=(KEY,), max_batch_tokens=512) as server:
        yield server


def test_openai(real):
    import openai

    encode = real.embedder.encode
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key=KEY) as client:
        create = client.embeddings.create
        answer = create(model="text-embedding-3-small", input=TEXTS)
        check([item.embedding for item in answer.data], encode(TEXTS))
        floats = create(model="m", input=TEXTS, encoding_format="float")
        check([item.embedding for item in floats.data], encode(TEXTS))
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 10 and answer._request_id
        cut = create(model="m", input=TEXTS, dimensions=100)
        check([item.embedding for item in cut.data], encode(TEXTS, truncate_dim=100))
        sides = {"retrieval.query": real.embedder.encode_query, "retrieval.passage": real.embedder.encode_document}
        for task, side in sides.items():
            check([item.embedding for item in create(model="m", input=TEXTS, extra_body={"task": task}).data], side(TEXTS))
            check([item.embedding for item in create(model=f"m:{task}", input=TEXTS).data], side(TEXTS))
        assert [model.id for model in client.models.list()][0] == "tiny"
        with pytest.raises(openai.BadRequestError, match="input is empty"):
            create(model="m", input=[])
        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
            create(model="m", input=[[1, 2]])
        with pytest.raises(openai.BadRequestError, match="'classification' is no task of this model") as refused:
            create(model="m", input="a", extra_body={"task": "classification"})
        assert refused.value.param == "task" and refused.value.code == "unknown_task"
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError, match="a valid key is needed"):
            client.embeddings.create(model="m", input="a")


def test_cohere(real):
    import cohere
    import httpx

    sides = {"search_query": real.embedder.encode_query, "search_document": real.embedder.encode_document}
    with httpx.Client(timeout=120) as http:  # cohere never closes its own
        client = cohere.ClientV2(api_key=KEY, base_url=real.url, httpx_client=http)
        for input_type, side in sides.items():
            types = ["float", "ubinary"]
            answer = client.embed(texts=TEXTS, model="embed-v4.0", input_type=input_type, embedding_types=types)
            check(answer.embeddings.float_, side(TEXTS))
            assert len(answer.embeddings.ubinary[0]) == 48 and answer.meta.billed_units.input_tokens > 10
        with pytest.raises(cohere.errors.BadRequestError, match="is no task of this model"):
            client.embed(texts=TEXTS, model="m", input_type="clustering")
        with pytest.raises(cohere.errors.UnauthorizedError):
            wrong = cohere.ClientV2(api_key="wrong", base_url=real.url, httpx_client=http)
            wrong.embed(texts=TEXTS, model="m", input_type="search_query")
        first = cohere.Client(api_key=KEY, base_url=real.url, httpx_client=http)
        many = [f"text {i}" for i in range(100)]  # it sends 96 and 4, at once
        embedded = first.embed(texts=many, model="m", input_type="search_query")
        check(embedded.embeddings, real.embedder.encode_query(many))


def test_huggingface_hub(real, monkeypatch):
    from huggingface_hub import InferenceClient, constants
    from huggingface_hub.errors import HfHubHTTPError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # else it sends nothing, to any address
    client = InferenceClient(model=f"{real.url}/embed", token=KEY)
    check(client.feature_extraction(TEXTS), real.embedder.encode(TEXTS))
    query = client.feature_extraction(TEXTS, prompt_name="query", normalize=True, truncate=True)
    check(query, real.embedder.encode_query(TEXTS))
    similar = InferenceClient(model=f"{real.url}/similarity", token=KEY).sentence_similarity(TEXTS[0], other_sentences=TEXTS)
    vectors = real.embedder.encode(TEXTS)
    check(similar, vectors @ vectors[0])
    with pytest.raises(HfHubHTTPError, match="is no prompt of this model"):
        client.feature_extraction(TEXTS, prompt_name="nope")

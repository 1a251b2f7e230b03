"""One client of an embedding server: embeds two texts and prints the vectors as JSON.

    python python_clients.py NAME URL KEY

With sides it prints `query` and `passage`, else `plain`; each is a list of two vectors.
"""

import json
import logging
import os
import sys
from collections.abc import Callable

os.environ |= {"HF_HUB_OFFLINE": "0", "ANONYMIZED_TELEMETRY": "False", "HAYSTACK_TELEMETRY_ENABLED": "False"}
TEXTS = ["how do I edit a photo?", "ein Bildbearbeitungsprogramm"]
TASKS = {"query": "retrieval.query", "passage": "retrieval.passage"}
Vectors = dict[str, list[list[float]]]


def langchain_openai(url: str, key: str) -> Vectors:
    from langchain_openai import OpenAIEmbeddings

    def model(name: str) -> OpenAIEmbeddings:
        return OpenAIEmbeddings(base_url=f"{url}/v1", api_key=key, model=name, check_embedding_ctx_length=False)

    found = {side: model(f"m:{task}").embed_documents(TEXTS) for side, task in TASKS.items()}
    return found | {"plain": [model("m").embed_query(text) for text in TEXTS]}


def langchain_community_jina(url: str, key: str) -> Vectors:
    import langchain_community.embeddings.jina as jina

    jina.JINA_API_URL = f"{url}/v1/embeddings"
    return {"plain": jina.JinaEmbeddings(jina_api_key=key, model_name="jina-embeddings-v3").embed_documents(TEXTS)}


def langchain_cohere(url: str, key: str) -> Vectors:
    from langchain_cohere import CohereEmbeddings

    model = CohereEmbeddings(cohere_api_key=key, base_url=url, model="embed-multilingual-v3.0")
    return {"query": [model.embed_query(text) for text in TEXTS], "passage": model.embed_documents(TEXTS)}


def llama_index_jinaai(url: str, key: str) -> Vectors:
    from llama_index.embeddings.jinaai import JinaEmbedding

    found = {}
    for side, task in TASKS.items():
        model = JinaEmbedding(api_key=key, model="jina-embeddings-v3", task=task)
        model._api.api_url = f"{url}/v1/embeddings"
        found[side] = model.get_text_embedding_batch(TEXTS)
    return found


def llama_index_openai_like(url: str, key: str) -> Vectors:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    model = OpenAILikeEmbedding(model_name="m", api_base=f"{url}/v1", api_key=key)
    return {"plain": model.get_text_embedding_batch(TEXTS)}


def llama_index_cohere(url: str, key: str) -> Vectors:
    from llama_index.embeddings.cohere import CohereEmbedding

    model = CohereEmbedding(api_key=key, model_name="embed-multilingual-v3.0", base_url=url)
    return {"query": [model.get_query_embedding(text) for text in TEXTS], "passage": model.get_text_embedding_batch(TEXTS)}


def llama_index_tei(url: str, key: str) -> Vectors:
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    model = TextEmbeddingsInference(
        base_url=url, model_name="m", auth_token=key, query_instruction="query:", text_instruction="passage:"
    )
    return {"query": [model.get_query_embedding(text) for text in TEXTS], "passage": model.get_text_embedding_batch(TEXTS)}


def haystack_openai(url: str, key: str) -> Vectors:
    from haystack.components.embedders import OpenAITextEmbedder
    from haystack.utils import Secret

    model = OpenAITextEmbedder(api_base_url=f"{url}/v1", api_key=Secret.from_token(key), model="m")
    return {"plain": [model.run(text)["embedding"] for text in TEXTS]}


def haystack_jina(url: str, key: str) -> Vectors:
    from haystack.utils import Secret
    from haystack_integrations.components.embedders.jina import JinaTextEmbedder

    def model(task: str) -> JinaTextEmbedder:
        token = Secret.from_token(key)
        return JinaTextEmbedder(api_key=token, model="jina-embeddings-v3", base_url=f"{url}/v1/embeddings", task=task)

    return {side: [model(task).run(text)["embedding"] for text in TEXTS] for side, task in TASKS.items()}


def haystack_cohere(url: str, key: str) -> Vectors:
    from haystack import Document
    from haystack.utils import Secret
    from haystack_integrations.components.embedders.cohere import CohereDocumentEmbedder, CohereTextEmbedder

    query = CohereTextEmbedder(api_key=Secret.from_token(key), model="m", api_base_url=url)
    passage = CohereDocumentEmbedder(api_key=Secret.from_token(key), model="m", api_base_url=url, progress_bar=False)
    documents = passage.run([Document(content=text) for text in TEXTS])["documents"]
    return {
        "query": [query.run(text)["embedding"] for text in TEXTS],
        "passage": [document.embedding for document in documents],
    }


def chromadb_openai(url: str, key: str) -> Vectors:
    from chromadb.utils.embedding_functions import OpenAIEmbeddingFunction

    found = OpenAIEmbeddingFunction(api_key=key, api_base=f"{url}/v1", model_name="m")(TEXTS)
    return {"plain": [vector.tolist() for vector in found]}


def chromadb_jina(url: str, key: str) -> Vectors:
    from chromadb.utils.embedding_functions import JinaEmbeddingFunction

    found = {}
    for side, task in TASKS.items():
        model = JinaEmbeddingFunction(api_key=key, model_name="jina-embeddings-v3", task=task)
        model._api_url = f"{url}/v1/embeddings"
        found[side] = [vector.tolist() for vector in model(TEXTS)]
    return found


def chromadb_tei(url: str, key: str) -> Vectors:
    from chromadb.utils.embedding_functions import HuggingFaceEmbeddingServer

    return {"plain": [vector.tolist() for vector in HuggingFaceEmbeddingServer(url=f"{url}/embed", api_key=key)(TEXTS)]}


def litellm_openai(url: str, key: str) -> Vectors:
    import litellm

    answer = litellm.embedding(model="openai/m", input=TEXTS, api_base=f"{url}/v1", api_key=key)
    return {"plain": [item["embedding"] for item in answer.data]}


def litellm_jina(url: str, key: str) -> Vectors:
    import litellm

    answer = litellm.embedding(model="jina_ai/m", input=TEXTS, api_base=f"{url}/v1", api_key=key)
    return {"plain": [item["embedding"] for item in answer.data]}


def huggingface_hub(url: str, key: str) -> Vectors:
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=f"{url}/embed", token=key)
    return {
        "plain": client.feature_extraction(TEXTS).tolist(),
        "query": client.feature_extraction(TEXTS, prompt_name="query").tolist(),
    }


CLIENTS: tuple[Callable[[str, str], Vectors], ...] = (
    langchain_openai,
    langchain_community_jina,
    langchain_cohere,
    llama_index_jinaai,
    llama_index_openai_like,
    llama_index_cohere,
    llama_index_tei,
    haystack_openai,
    haystack_jina,
    haystack_cohere,
    chromadb_openai,
    chromadb_jina,
    chromadb_tei,
    litellm_openai,
    litellm_jina,
    huggingface_hub,
)

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    name, url, key = sys.argv[1:]
    print(json.dumps(next(client for client in CLIENTS if client.__name__ == name)(url, key), default=list))

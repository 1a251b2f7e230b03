"""A plain embedding server: sentence-transformers behind Starlette, one call at a time.

    python -m benchmarks.serving_peer MODEL PORT

It is what one writes in an afternoon, and what `benchmarks.serving` compares with.
"""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from sentence_transformers import SentenceTransformer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


def main() -> None:
    """Serve a model's embeddings."""
    model, pool = SentenceTransformer(sys.argv[1], device="cpu"), ThreadPoolExecutor(1)

    async def embeddings(request: Request) -> JSONResponse:
        body = await request.json()
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        encode = model.encode_query if body.get("input_type") == "query" else model.encode_document
        found = await asyncio.get_running_loop().run_in_executor(pool, lambda: encode(texts, show_progress_bar=False))
        data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(found.tolist())]
        return JSONResponse({"object": "list", "data": data})

    async def ready(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ready"})

    app = Starlette(routes=[Route("/v1/embeddings", embeddings, methods=["POST"]), Route("/ready", ready)])
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", timeout_keep_alive=75)


if __name__ == "__main__":
    main()

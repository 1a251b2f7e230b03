"""The routes: what is read, which schema reads it, and how the answer is written."""

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from .call import EmbedCall
from .envelope import Envelope
from .errors import ApiError
from .options import is_allowed
from .reading import Bodies
from .schemas import cohere, openai, tei
from .schemas.fields import json_object
from .service import Service
from .state import State
from .vectors import finished

logger = logging.getLogger(__name__)

Body = dict[str, Any]
Handle = Callable[[Service, Request, Body], Awaitable[Any]]

CLIENT_GONE = 499
"""Status in log and metrics of a request whose client has left; nobody receives it."""


class Schema(NamedTuple):
    """How a vendor's errors look."""

    error_body: Callable[[ApiError, str], Any]
    status: Callable[[ApiError], int]


OPENAI = Schema(openai.error_body, lambda error: error.status)
COHERE = Schema(cohere.error_body, lambda error: error.status)
TEI = Schema(tei.error_body, tei.status)


def make_app(state: State) -> Starlette:
    """Makes the application; it answers from the first moment, and embeds once `state.service` is
    there."""
    bodies = Bodies(state.options.max_body, state.options.deadline)

    def post(path: str, schema: Schema, handle: Handle) -> Route:
        return Route(path, functools.partial(_answered, state, schema, bodies, handle), methods=["POST"])

    def get(path: str, schema: Schema, handle: Handle) -> Route:
        return Route(path, functools.partial(_answered, state, schema, None, handle), methods=["GET"])

    routes = [
        post("/v1/embeddings", OPENAI, _openai),
        post("/embeddings", OPENAI, _openai),
        get("/v1/models", OPENAI, _models),
        get("/models", OPENAI, _models),
        post("/v2/embed", COHERE, functools.partial(_cohere, version="2")),
        post("/v1/embed", COHERE, functools.partial(_cohere, version="1")),
        post("/embed", TEI, _embed),
        post("/embed_all", TEI, _embed_all),
        post("/similarity", TEI, _similarity),
        post("/tokenize", TEI, _tokenize),
        get("/info", TEI, _info),
        Route("/health", functools.partial(_health, state)),
        Route("/ready", functools.partial(_ready, state)),
        Route("/metrics", functools.partial(_metrics, state)),
    ]
    middleware = [Middleware(Envelope, state=state)]
    if origins := state.options.cors_origins:
        headers = ["authorization", "content-type", "x-request-id"]
        cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=headers)
        middleware.append(cors)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _no_route})
    app.router.redirect_slashes = False  # POST is not repeated after a redirect; Envelope takes the slash
    return app


async def _answered(state: State, schema: Schema, bodies: Bodies | None, handle: Handle, request: Request) -> Response:
    """Answers a request, or writes its error as its schema does."""
    try:
        service = _service(state, request)
        if bodies is None:
            return _json(await handle(service, request, {}))
        service.batcher.check_room()
        async with bodies.read(request) as data:
            body = json_object(data)
            del data
            content = await handle(service, request, body)
        return content if isinstance(content, Response) else _json(content)
    except ApiError as error:
        return _error(schema, error, request)
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)
    except Exception:
        logger.exception("request %s failed", request.state.id)
        return _error(schema, ApiError(500, "the server has failed; its log says why", code="internal"), request)


def _service(state: State, request: Request) -> Service:
    if not is_allowed(state.options.keys, request.headers.get("authorization")):
        raise ApiError(401, "a valid key is needed: Authorization: Bearer KEY", code="invalid_api_key")
    if state.service is None:
        raise ApiError(503, "the model is not loaded yet", code="loading", retry_after=5)
    return state.service


async def _openai(service: Service, request: Request, body: Body) -> Any:
    call = openai.parse(body, service.model)
    return await _embeddings(service, request, call, lambda e, tokens: openai.answer(body, service.model, e, tokens))


async def _models(service: Service, request: Request, body: Body) -> Any:
    return openai.models(service.model)


async def _cohere(service: Service, request: Request, body: Body, version: str) -> Any:
    call = cohere.parse(body, service.model)
    id_ = request.state.id
    return await _embeddings(service, request, call, lambda e, tokens: cohere.answer(body, call, e, tokens, id_, version))


async def _embed(service: Service, request: Request, body: Body) -> Any:
    return await _embeddings(service, request, tei.parse(body, service.model), lambda e, _: e)


async def _embed_all(service: Service, request: Request, body: Body) -> Any:
    call = tei.parse(body, service.model, states=True)
    embedded = await service.embed(request, call)
    request.state.texts, request.state.tokens = len(call.texts), embedded.tokens
    return await service.answer(embedded.tokens, lambda: _json([*map(np.ascontiguousarray, embedded.results)]))


async def _similarity(service: Service, request: Request, body: Body) -> Any:
    call = tei.parse_similarity(body, service.model)
    return await _embeddings(service, request, call, lambda e, _: tei.similarities(e))


async def _tokenize(service: Service, request: Request, body: Body) -> Any:
    return await service.tokenizer(tei.tokenize, body, service.model, service.backend)


async def _info(service: Service, request: Request, body: Body) -> Any:
    return tei.info(service.model)


async def _embeddings(
    service: Service, request: Request, call: EmbedCall, answer: Callable[[np.ndarray, int], Any]
) -> Response:
    embedded = await service.embed(request, call)
    request.state.texts, request.state.tokens = len(call.texts), embedded.tokens

    def write() -> Response:
        return _json(answer(finished(embedded.results, call.dim, normalized=call.normalized), embedded.tokens))

    return await service.answer(len(call.texts), write)


async def _health(state: State, request: Request) -> Response:
    return _json({"status": "alive"}) if state.alive else _json({"status": "dead"}, 503)


async def _ready(state: State, request: Request) -> Response:
    if state.ready:
        return _json({"status": "ready"})
    return _json({"status": "draining" if state.draining else "loading"}, 503, {"retry-after": "5"})


async def _metrics(state: State, request: Request) -> Response:
    state.metrics.ready.set(state.ready)
    return Response(state.metrics.text(), media_type="text/plain; version=0.0.4")


async def _no_route(request: Request, error: Exception) -> Response:
    """Answers a path or a method that there is not."""
    assert isinstance(error, HTTPException)
    known = sorted(route.path for route in request.app.routes)
    message = f"{request.method} {request.url.path} is not served: {error.detail}; routes are {known}"
    response = _error(OPENAI, ApiError(error.status_code, message, code="not_found"), request)
    response.headers.update(error.headers or {})
    return response


def _error(schema: Schema, error: ApiError, request: Request) -> Response:
    return _json(schema.error_body(error, request.state.id), schema.status(error), error.headers)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    data = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(data, status, headers, media_type="application/json")

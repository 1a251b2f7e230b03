"""What is around every request: its id, its line in the log, its count and its time."""

import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import ROUTES
from .state import State

logger = logging.getLogger(__name__)

PROBES = ("/health", "/ready", "/metrics")
_ALIASES = {"/embeddings": "/v1/embeddings", "/models": "/v1/models"}


class Envelope:
    """ASGI middleware. It is none of Starlette's base class, behind which a handler never sees that
    its client has left."""

    def __init__(self, app: ASGIApp, state: State):
        """Wraps `app`."""
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, headers = time.perf_counter(), Headers(scope=scope)
        path = scope["path"].rstrip("/") or "/"
        scope["path"] = path
        known: dict[str, Any] = {"id": _request_id(headers), "texts": 0, "tokens": 0}
        scope["state"] = {**scope.get("state", {}), **known}
        status = 0

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent = MutableHeaders(scope=message)
                sent["x-request-id"] = known["id"]
                if self._state.draining:
                    sent["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, answered)
        finally:
            if path not in PROBES:
                self._record(scope, headers, _ALIASES.get(path, path), status, time.perf_counter() - began)

    def _record(self, scope: Scope, headers: Headers, path: str, status: int, seconds: float) -> None:
        route = path if path in ROUTES else "other"
        self._state.metrics.requests.labels(route, str(status)).inc()
        self._state.metrics.request_seconds.observe(seconds)
        fields = {
            "id": scope["state"]["id"],
            "route": route,
            "status": status,
            "texts": scope["state"]["texts"],
            "tokens": scope["state"]["tokens"],
            "ms": round(1000 * seconds, 1),
        }
        if trace := re.fullmatch(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}", headers.get("traceparent", "")):
            fields["trace"] = trace[1]
        logger.info(" ".join(f"{name}={value}" for name, value in fields.items()), extra={"fields": fields})


def _request_id(headers: Headers) -> str:
    """The client's id of a request where it is one of up to 128 printable characters, else a new
    one."""
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(r"[!-~]{1,128}", given) else uuid.uuid4().hex

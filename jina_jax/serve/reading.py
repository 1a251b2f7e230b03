"""Reads bodies: within their limit, within their time, and not too many at once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from .errors import ApiError

_AT_ONCE = 8
"""Bodies of the largest size that are held at the same time."""


class Bodies:
    """The bodies of the requests that are being answered."""

    def __init__(self, most: int, seconds: float):
        """Limits a body to `most` bytes, and to `seconds` in which it must arrive."""
        self._most, self._seconds, self._held = most, seconds, 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Gives the body of a request, and counts it while it is answered.

        Raises:
            ApiError: it is compressed (415), too large (413), too slow (408), or too many others
                are held (429).
        """
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise ApiError(415, f"content-encoding {encoding!r} is not read: send the body as it is", code="encoding")
        if int(request.headers.get("content-length", 0)) > self._most:
            raise self._too_large()
        held = 0
        try:
            chunks = []
            try:
                async with asyncio.timeout(self._seconds):
                    async for chunk in request.stream():
                        held, self._held = held + len(chunk), self._held + len(chunk)
                        self._check(held)
                        chunks.append(chunk)
            except TimeoutError:
                raise ApiError(408, f"the body did not arrive within {self._seconds:g} s", code="slow_body") from None
            yield b"".join(chunks)
        finally:
            self._held -= held

    def _check(self, held: int) -> None:
        if held > self._most:
            raise self._too_large()
        if self._held > _AT_ONCE * self._most:
            raise ApiError(429, "too many requests are being read; try again in 1 s", code="overloaded", retry_after=1)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._most:,} bytes (--max-body)", code="body_too_large")

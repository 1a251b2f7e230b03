"""A server of a small random model, in a thread, on a port of this machine."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx2 as httpx
import numpy as np

from jina_jax import Embedder
from jina_jax.serve.lifecycle import Address, Server
from jina_jax.serve.options import ServeOptions
from jina_jax.serve.state import State

NAME = "tiny"


class Served(NamedTuple):
    """A running server, and the embedder behind it."""

    url: str
    state: State
    embedder: Embedder
    http: httpx.Client

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def embeddings(self, path: str = "/v1/embeddings", **body: Any) -> np.ndarray:
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        return np.array([item["embedding"] for item in response.json()["data"]], np.float32)

    def metric(self, name: str, **labels: str) -> float:
        return self.state.metrics.registry.get_sample_value(f"jina_jax_{name}", labels) or 0.0


@contextlib.contextmanager
def serving(embedder: Embedder, address: Address | None = None, **options: Any) -> Iterator[Served]:
    """Serves an embedder until the block ends."""
    state = State(ServeOptions(**{"names": (NAME,)} | options))
    server = Server(lambda: embedder, state, address or Address(port=0))
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        wait_until(lambda: state.service is not None or state.failure is not None)
        assert state.failure is None, state.failure
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield Served(f"http://127.0.0.1:{port}", state, embedder, client)
    finally:
        server.should_exit = True
        thread.join(20)
        if state.service is not None:
            assert state.service.close(seconds=20.0)
    assert not thread.is_alive()


def wait_until(condition, seconds: float = 120.0) -> None:
    """Waits until a condition holds."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it never came to be"
        time.sleep(0.01)

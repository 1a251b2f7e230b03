"""From the open port to the last answer.

The port opens first: /health answers while the model is loaded, and /ready says when requests are
taken. After SIGTERM /ready fails at once, requests are still taken for a quarter of the drain time,
in which load balancers learn of it, then accepted ones are finished; SIGINT leaves the quarter out.
A second signal ends the process now.
"""

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from ..embed.embedder import Embedder
from .app import make_app
from .batcher import shutting_down
from .service import Service
from .state import State

logger = logging.getLogger(__name__)

_KEEP_ALIVE = 75
"""Seconds that an idle connection is kept: longer than clients and load balancers keep theirs,
which then never send into one that is being closed."""


@dataclass(frozen=True)
class Address:
    """Where the server listens; with a certificate and its key it speaks TLS."""

    host: str = "127.0.0.1"
    port: int = 8080
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65_536:
            raise ValueError(f"--port must be in 0..65535, not {self.port}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together")
        for file in (self.tls_cert, self.tls_key):
            if file is not None and not file.is_file():
                raise FileNotFoundError(f"{file} does not exist")


def run(load: Callable[[], Embedder], state: State, address: Address) -> int:
    """Serves until a signal, and returns the exit status: 0, or 1 if the worker has died.

    Args:
        load: loads the model; called in a thread, once the port is open.
        state: of the server, fresh.
        address: where to listen.

    Raises:
        ValueError, OSError: the model cannot be loaded, or the port not be opened.
    """
    server = Server(load, state, address)
    try:
        server.run()
    except SystemExit as error:
        raise OSError(f"{address.host}:{address.port} cannot be listened on; the log says why") from error
    if state.failure is not None:
        raise state.failure
    ended = state.service is None or state.service.close(seconds=1.0)
    if server.loader.is_alive() or not ended:
        # A thread in XLA ends with its program only, and Python would wait for it.
        sys.stderr.flush()
        os._exit(server.status)
    return server.status


class Server(uvicorn.Server):
    """uvicorn, which here drains before it closes its port, and ends with status 0."""

    def __init__(self, load: Callable[[], Embedder], state: State, address: Address):
        config = uvicorn.Config(
            make_app(state),
            host=address.host,
            port=address.port,
            http="httptools",
            loop="auto",  # uvloop, where it is there
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            ssl_certfile=address.tls_cert,
            ssl_keyfile=address.tls_key,
        )
        super().__init__(config)
        self.status = 0
        self.loader = threading.Thread(target=self._load, args=(load,), name="loader", daemon=True)
        self._state = state
        self._drain_ends = 0.0
        self._closes = 0.0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes the signals while the server runs; uvicorn's own raises them again at the end."""
        taken = (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain; at the second signal ends the process."""
        if self._state.draining:
            os._exit(128 + sig)
        self.drain(at_once=sig == signal.SIGINT)

    def drain(self, *, at_once: bool) -> None:
        """Turns readiness off, and has the port closed at once or after a quarter of the time."""
        seconds, now = self._state.options.drain, time.monotonic()
        self._drain_ends = now + seconds
        self._closes = now if at_once or self._state.service is None else now + seconds / 4
        self._state.draining = True

    async def startup(self, sockets: list | None = None) -> None:
        """Opens the port, and then begins to load the model."""
        await super().startup(sockets)
        if self.started:
            self.loader.start()

    async def on_tick(self, counter: int) -> bool:
        """Returns whether to close the port; called ten times a second."""
        if not self._state.alive and not self._state.draining:
            logger.error("the server cannot go on and ends")
            self.status = 1
            self.drain(at_once=True)
        closes = self._state.draining and time.monotonic() >= self._closes
        return await super().on_tick(counter) or closes

    async def shutdown(self, sockets: list | None = None) -> None:
        """Closes the port, finishes what was accepted, and refuses what is left in the end."""
        left = max(self._drain_ends - time.monotonic(), 0)
        timer = asyncio.get_running_loop().call_later(left, self._refuse_the_rest)
        self.config.timeout_graceful_shutdown = int(left) + 1
        await super().shutdown(sockets)
        timer.cancel()

    def _refuse_the_rest(self) -> None:
        if self._state.service is not None:
            self._state.service.batcher.fail_all(shutting_down())

    def _load(self, load: Callable[[], Embedder]) -> None:
        began = time.perf_counter()
        try:
            self._state.service = Service(load(), self._state.options, self._state.metrics)
        except BaseException as error:
            self._state.failure = error
            return
        logger.info("ready after %.1f s", time.perf_counter() - began)

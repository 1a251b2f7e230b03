"""The process: its port, its signals, its exit status."""

import concurrent.futures
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
from click.testing import CliRunner

from helpers.serving import serving, wait_until
from jina_jax.cli import main
from jina_jax.embed.mixed_rows import MixedRows
from jina_jax.serve.lifecycle import Address
from jina_jax.serve.options import KEYS_VARIABLE, is_allowed, read_keys

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def directory(five, tmp_path_factory):
    directory = tmp_path_factory.mktemp("serve") / "model"
    five.save(directory)
    return directory


class Process:
    """`jina-jax serve`, and the lines of its log."""

    def __init__(self, *arguments: object):
        command = [sys.executable, "-m", "jina_jax.cli", "serve", "--port", "0", "--max-batch-tokens", "512"]
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
        self.process.stderr.close()

    def url(self) -> str:
        wait_until(lambda: self.process.poll() is not None or re.search(r"running on \S+", "".join(self.lines)))
        found = re.search(r"running on (\S+)", "".join(self.lines))
        assert found, "".join(self.lines)
        return found[1].strip('"')

    def end(self) -> int:
        status = self.process.wait(60)
        self.reader.join(10)
        return status


@pytest.fixture
def start(directory):
    """Starter of processes, none of which outlives the test."""
    running = []

    def start(*arguments: object) -> Process:
        running.append(Process("--model", directory, *arguments))
        return running[-1]

    yield start
    for process in running:
        process.process.kill()
        process.end()


def test_sigterm_under_load_loses_no_accepted_request(start, five):
    process = start("--drain", "8", "--log-format", "json", "--served-model-name", "m")
    url, texts = process.url(), ["an image editor " * 20] * 40
    with httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/health").status_code == 200  # from the first moment
        while (ready := client.get("/ready")).status_code != 200:
            assert ready.json() == {"status": "loading"} and ready.headers["retry-after"] == "5"
            early = client.post("/v1/embeddings", json={"input": "a"})
            assert early.status_code == 503 or early.status_code == 200
            time.sleep(0.05)
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            calls = [pool.submit(httpx.post, f"{url}/v1/embeddings", json={"input": texts}, timeout=60) for _ in range(24)]
            time.sleep(0.3)
            process.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            wait_until(lambda: client.get("/ready").status_code == 503)
            assert time.monotonic() - began < 2 and client.get("/health").status_code == 200
            answers = [call.result() for call in calls]
    assert process.end() == 0 and time.monotonic() - began < 12
    expected = five.encode(texts[:1])[0]
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        given = np.float32([item["embedding"] for item in answer.json()["data"]])
        np.testing.assert_allclose(given, np.broadcast_to(expected, given.shape), atol=1e-5)
    logged = [json.loads(line) for line in process.lines if line.startswith("{")]
    assert sum(line.get("status") == 200 and line.get("route") == "/v1/embeddings" for line in logged) >= 24


def test_a_second_signal_ends_at_once_and_the_first_one_while_loading(start):
    process = start()
    process.url()
    process.process.send_signal(signal.SIGTERM)
    assert process.end() == 0  # whether it was loading still, or ready
    process = start("--drain", "60")
    url = process.url()
    wait_until(lambda: httpx.get(f"{url}/ready").status_code == 200)
    process.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.process.poll() is None
    process.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.end() == 128 + signal.SIGTERM and time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--default-task", "nope"], "--default-task 'nope' is no task of this model"),
        (["--port", "70000"], "--port must be in 0..65535"),
        (["--deadline", "0"], "--deadline must be above 0"),
        (["--max-texts", "0"], "--max-texts must be at least 1"),
        (["--tls-cert", "cert.pem"], "--tls-cert and --tls-key go together"),
        (["--api-key-file", "missing"], "No such file"),
        (["--model", "runs/no-such-model"], "runs/no-such-model"),
    ],
)
def test_a_mistake_is_one_line(directory, arguments, message):
    given = arguments if "--model" in arguments else ["--model", str(directory), *arguments]
    given = given if "--port" in given else [*given, "--port", "0"]
    result = CliRunner().invoke(main, ["serve", *given])
    assert result.exit_code == 1 and message in result.output, result.output
    assert len([line for line in result.output.splitlines() if line.startswith("Error: ")]) == 1


def test_a_dead_worker_is_seen_and_ends_the_server(five, monkeypatch):
    """Not ready, not alive, and the loop of the server ends by itself with status 1."""

    def lost(self, batch, adapter_ids):
        raise RuntimeError("the device is lost")

    with serving(five, max_batch_tokens=512) as served:
        monkeypatch.setattr(MixedRows, "start", lost)
        for _ in range(8):
            response = served.post("/v1/embeddings", input="a")
            assert response.status_code in (500, 503)
        wait_until(lambda: not served.state.alive)
        assert not served.state.ready
        wait_until(lambda: _refuses(served.url))
        monkeypatch.undo()


def _refuses(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.TransportError:
        return True
    return False


def test_tls(five, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    request = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*request.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    with serving(five, address=Address(port=0, tls_cert=cert, tls_key=key), max_batch_tokens=512) as served:
        with httpx.Client(verify=ssl.create_default_context(cafile=cert)) as client:
            answer = client.post(f"{served.url.replace('http', 'https')}/embed", json={"inputs": "a"})
            np.testing.assert_allclose(answer.json()[0], five.encode("a"), atol=1e-6)


def test_keys_come_from_a_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# of the team\nfirst\n\nsecond  \n")
    assert read_keys(file, {KEYS_VARIABLE: "third,first"}) == ("first", "second", "third")
    assert read_keys(None, {}) == ()
    assert is_allowed((), None) and is_allowed(("a", "b"), "Bearer b") and not is_allowed(("a",), "Bearer ab")
    assert not is_allowed(("a",), "Bearer \udcff")
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_keys(file, {})
    with pytest.raises(ValueError, match=f"{KEYS_VARIABLE}: key 2 is not printable ASCII"):
        read_keys(None, {KEYS_VARIABLE: "a,b c"})

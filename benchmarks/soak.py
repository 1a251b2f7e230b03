"""An hour of mixed requests against `jina-jax serve`: does its memory grow?

    make quickstart
    python -m benchmarks.soak --model runs/quickstart/model --json benchmarks/results/soak.json

Requests leave at random times (Poisson): 1 to 16 texts of 1 to 600 words, any of the model's tasks,
any dimension, floats or base64; some are malformed, and some clients hang up before the answer. The
server's resident memory is read every ten seconds. The mean of the last tenth is compared with that
of the second tenth: in the first, it loads and touches every program for the first time.
"""

import asyncio
import base64
import json
import random
import time
from datetime import date
from pathlib import Path
from typing import Any

import click
import httpx2 as httpx
import numpy as np

from jina_jax import Embedder
from jina_jax.command import Command
from train.data.corpus import BUNDLED, read_corpus

from .machine import machine, resident_bytes, versions
from .serving import running_server, serve_command

PACKAGES = ("jax", "starlette", "uvicorn", "orjson")
EVERY = 10
"""Seconds between two readings of the memory."""

GROWTH = 0.02
"""Most that the memory may have grown, as a fraction."""

MALFORMED = ({"input": []}, {"input": [1.5]}, {"input": "a", "task": "none"}, {"input": "a", "dimensions": 0}, {})


@click.command(cls=Command)
@click.option("--model", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--minutes", type=float, default=60, show_default=True)
@click.option("--rate", type=float, default=2, show_default=True, help="Requests a second.")
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(model: Path, minutes: float, rate: float, out: Path | None) -> None:
    """Load the server, print its memory, and exit with 1 if it has grown."""
    bodies = _bodies(Embedder.load(model).config.tasks)
    with running_server(serve_command(model)) as (url, process):
        memory, statuses = asyncio.run(_load(url, process.pid, bodies, 60 * minutes, rate))
        compilations = _compilations(url)
    tenth = max(len(memory) // 10, 1)
    early, late = float(np.mean(memory[tenth : 2 * tenth])), float(np.mean(memory[-tenth:]))
    found = {"minutes": minutes, "early_mb": round(early, 1), "late_mb": round(late, 1), "compilations": compilations}
    click.echo(json.dumps(found | {"statuses": statuses}))
    if out:
        report = {"machine": machine(), "date": str(date.today()), "versions": versions(PACKAGES)}
        out.write_text(json.dumps(report | found | {"rate": rate, "statuses": statuses, "memory_mb": memory}) + "\n")
    raise SystemExit(late > (1 + GROWTH) * early)


def _bodies(tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    """10,000 bodies of requests: each text is other than all before."""
    rng = random.Random(0)
    words = " ".join(package.text["en"].body for package in read_corpus(BUNDLED, "test")).split()
    return [_body(rng, words, tasks) for _ in range(10_000)]


def _body(rng: random.Random, words: list[str], tasks: tuple[str, ...]) -> dict[str, Any]:
    if rng.random() < 0.1:
        return dict(rng.choice(MALFORMED))
    lengths = [min(int(rng.paretovariate(0.7)), 600) for _ in range(rng.choice([1, 1, 1, 2, 4, 16]))]
    body: dict[str, Any] = {"input": [" ".join(rng.choices(words, k=length)) for length in lengths], "truncate": True}
    if (task := rng.choice([None, *tasks])) is not None:
        body["task"] = task
    if rng.random() < 0.5:
        body["dimensions"] = rng.randint(1, 384)
    if rng.random() < 0.5:
        body["encoding_format"] = "base64"
    return body


async def _load(
    url: str, server: int, bodies: list[dict[str, Any]], seconds: float, rate: float
) -> tuple[list[float], dict[str, int]]:
    """Sends requests; returns the readings of the memory in MB, and counts of statuses."""
    rng, began, at, memory = random.Random(1), time.monotonic(), 0.0, []
    statuses: dict[str, int] = {}
    running: set[asyncio.Task[None]] = set()
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while (at := at + rng.expovariate(rate)) < seconds:
            await asyncio.sleep(max(began + at - time.monotonic(), 0))
            patience = 0.01 if rng.random() < 0.05 else 60
            task = asyncio.create_task(_request(client, rng.choice(bodies), patience, statuses))
            running.add(task)
            task.add_done_callback(running.discard)
            if at > EVERY * len(memory):
                memory.append(resident_bytes(server) / 1e6)
        await asyncio.gather(*running)
    return memory, dict(sorted(statuses.items()))


async def _request(client: httpx.AsyncClient, body: dict[str, Any], patience: float, statuses: dict[str, int]) -> None:
    try:
        response = await client.post("/v1/embeddings", json=body, timeout=patience)
        status = str(response.status_code)
        if status == "200":
            _check(response.json(), body)
    except httpx.TimeoutException:
        status = "hung up"
    statuses[status] = statuses.get(status, 0) + 1


def _check(answer: dict[str, Any], body: dict[str, Any]) -> None:
    assert [item["index"] for item in answer["data"]] == list(range(len(body["input"])))
    for item in answer["data"]:
        vector = item["embedding"]
        values = np.frombuffer(base64.b64decode(vector), "<f4") if isinstance(vector, str) else np.array(vector, np.float32)
        assert len(values) == body.get("dimensions", len(values)) and abs(np.linalg.norm(values) - 1) < 1e-3


def _compilations(url: str) -> int:
    """Programs that the server has compiled since it was ready."""
    text = httpx.get(f"{url}/metrics").text
    line = next(line for line in text.splitlines() if line.startswith("jina_jax_compilations_since_ready"))
    return int(float(line.split()[-1]))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.soak")

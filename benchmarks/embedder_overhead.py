"""Overhead of the embedder as a fraction of a call, and the number of programs it compiles.

    python -m benchmarks.embedder_overhead --json benchmarks/results/embedder_overhead.json

A call of 512 descriptions of the corpus is timed with a stand-in for the compiled program: a device
that computes nothing and takes the program's time. For a TPU this time is the estimate of
benchmarks/results/tpu_estimate.json, and passes batch after batch, while the host works on, as on a
real TPU. The time of the call beyond that is the embedder's: tokenizing the first texts, packing,
and putting the vectors in their places. On CPU host and device are one: all of the host's work
counts, and is added to the time in benchmarks/results/cpu_inference.json. Programs are counted with
a tiny encoder over all texts of the test split.
"""

import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jina_jax import Embedder, Encoder, ModelConfig
from jina_jax.embed import batch_runner
from jina_jax.embed.forward import text_embeddings
from jina_jax.text.packing import max_texts
from jina_jax.text.tokenizer import load_tokenizer, private_backend, tokenize
from train.aot.topology import parse_topology
from train.data.corpus import BUNDLED, read_corpus

from .cpu_inference import corpus_sample
from .machine import machine, versions

PACKAGES = ("jax", "numpy", "tokenizers", "transformers")
RESULTS = Path(__file__).resolve().parent / "results"
TEXTS = 512
TINY = ModelConfig(vocab_size=16_000, hidden_size=8, num_heads=1, num_layers=1, mlp_size=8)
WIDE = ModelConfig(vocab_size=16_000, num_layers=1, mlp_size=8)
"""Model whose vectors have the published size; it is never computed."""


@click.command()
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(out: Path | None) -> None:
    """Measure, print a table, and write the numbers as JSON."""
    report = {"machine": machine(), "date": str(date.today()), "versions": versions(PACKAGES)} | overhead() | programs()
    click.echo(_table(report))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


class Pending(NamedTuple):
    """Vectors that a device has ready at a point in time of `time.perf_counter`."""

    ready: float
    vectors: np.ndarray

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        time.sleep(max(0.0, self.ready - time.perf_counter()))
        return self.vectors


def overhead(runs: int = 25) -> dict[str, Any]:
    """Median seconds of the host's work for a call, and of a call beside each device."""
    embedder, texts = _embedder(WIDE), corpus_sample(TEXTS)
    limit = embedder.max_length
    host, slots = _call(embedder, texts, 0.0, runs)
    backend = private_backend(embedder.tokenizer)
    tokenizing = statistics.median(_seconds(lambda: tokenize(backend, texts, limit)) for _ in range(runs))
    tokens = sum(len(ids) for ids in tokenize(backend, texts, limit)[0])
    devices = {name: {"encoder": seconds, "call": seconds + host} for name, seconds in _on_cpu(tokens).items()}
    for name, per_slot in _on_tpus().items():
        devices[name] = {"encoder": per_slot * slots, "call": _call(embedder, texts, per_slot, runs)[0]}
    return {
        "texts": TEXTS,
        "tokens": tokens,
        "slots": slots,
        "host_seconds": host,
        "tokenizing_seconds": tokenizing,
        "device_seconds": devices,
    }


def _call(embedder: Embedder, texts: list[str], per_slot: float, runs: int) -> tuple[float, int]:
    """Median seconds of a call, and the token slots of a call.

    The call is made beside a device that takes `per_slot` seconds for a token slot.
    """
    # Made once for each shape: this is the device's work, not the embedder's.
    vectors = lru_cache(partial(np.ones, dtype=np.float32))
    slots, free_at = 0, 0.0

    def compute(encoder: Encoder, ids: np.ndarray, *_: Any, **__: Any) -> Pending:
        nonlocal slots, free_at
        slots += ids.size
        free_at = max(free_at, time.perf_counter()) + per_slot * ids.size
        return Pending(free_at, vectors((ids.shape[0], max_texts(ids.shape[1]), WIDE.hidden_size)))

    with patch.object(batch_runner, "text_embeddings", compute):
        seconds = statistics.median(_seconds(lambda: embedder.encode(texts)) for _ in range(runs))
    return seconds, slots // runs


def programs() -> dict[str, int]:
    """Numbers of programs compiled by two passes over all texts of the test split.

    The second pass has the texts in another order.
    """
    embedder = _embedder(TINY)
    texts = [text.body for package in read_corpus(BUNDLED, "test") for text in package.text.values()]
    counts = [text_embeddings.programs(embedder.encoder)]
    for order in (texts, texts[::-1]):
        embedder.encode(order)
        counts.append(text_embeddings.programs(embedder.encoder))
    return {"corpus_texts": len(texts), "programs_first_pass": counts[1] - counts[0], "programs_later": counts[2] - counts[1]}


def _embedder(config: ModelConfig) -> Embedder:
    encoder = Encoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    return Embedder(encoder, config, load_tokenizer(Path("data/tokenizer"), config))


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _on_cpu(tokens: float) -> dict[str, float]:
    measured = json.loads((RESULTS / "cpu_inference.json").read_text("utf-8"))["results"]
    return {
        f"CPU, {each['dtype']}": tokens / each["tokens_per_s"]
        for each in measured
        if each["system"] == "jina-jax" and "tokens_per_s" in each
    }


def _on_tpus() -> dict[str, float]:
    """Seconds per token slot of each TPU, from the estimate of a forward pass."""
    estimated = json.loads((RESULTS / "tpu_estimate.json").read_text("utf-8"))["results"]
    return {
        f"{each['topology'].partition(':')[0]}, one chip": 1e6
        * each["mcycles"]
        / parse_topology(each["topology"]).chip.clock
        / (16 * 512)
        for each in estimated
        if each["program"] == "forward 16 x 512"
    }


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['texts']} texts of {report['tokens']:,} tokens in {report['slots']:,} slots: "
        f"{1000 * report['host_seconds']:.0f} ms of the host, {1000 * report['tokenizing_seconds']:.0f} of them for tokens",
        "",
        "| device | encoder, ms | call, ms | overhead |",
        "|---|---|---|---|",
    ]
    for name, seconds in report["device_seconds"].items():
        encoder, call = seconds["encoder"], seconds["call"]
        lines.append(f"| {name} | {1000 * encoder:,.0f} | {1000 * call:,.0f} | {1 - encoder / call:.1%} |")
    lines += [
        "",
        f"{report['corpus_texts']:,} texts: {report['programs_first_pass']} programs compiled, then {report['programs_later']}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.embedder_overhead")

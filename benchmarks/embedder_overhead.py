"""What the embedder does beside the encoder, as a share of a call; and how many programs it compiles.

    python -m benchmarks.embedder_overhead --json benchmarks/results/embedder_overhead.json

A call of 512 descriptions of the corpus is timed with the compiled program replaced by one that is done at once: what is left
is tokenising, by all cores of the host, packing, and putting the vectors in their places. On the other side stands the
encoder's own time for the same rows: on CPU that of benchmarks/results/cpu_inference.json, on a TPU the estimate of
benchmarks/results/tpu_estimate.json. Programs are counted with a tiny encoder over all texts of the test split.
"""

import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jina_jax import Embedder, Encoder, ModelConfig
from jina_jax.inference import embed_rows
from jina_jax.packing import max_texts
from jina_jax.tokenizer import load_tokenizer, tokenize
from train.corpus import BUNDLED, read_corpus
from train.tpu_chips import parse_topology

from .cpu_inference import corpus_sample
from .machine import machine, versions

PACKAGES = ("jax", "numpy", "tokenizers", "transformers")
RESULTS = Path(__file__).resolve().parent / "results"
TEXTS = 512
TINY = ModelConfig(vocab_size=16_000, hidden_size=8, num_heads=1, num_layers=1, mlp_size=8)
WIDE = ModelConfig(vocab_size=16_000, num_layers=1, mlp_size=8)
"""Its vectors have the published size. It is never computed."""


@click.command()
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(out: Path | None) -> None:
    """Measure, print a table, and write the numbers as JSON."""
    report = {"machine": machine(), "date": str(date.today()), "versions": versions(PACKAGES)} | overhead() | programs()
    click.echo(_table(report))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def overhead(runs: int = 7) -> dict[str, Any]:
    """Seconds of a call without the encoder, and the encoder's by device."""
    embedder, texts, slots, tokens = _embedder(WIDE), corpus_sample(TEXTS), [], []
    vectors = lru_cache(partial(np.ones, dtype=np.float32))  # made once for each shape: the device's work, not the embedder's

    def done_at_once(encoder: Encoder, ids: np.ndarray, segments: np.ndarray, *_: Any, **__: Any) -> np.ndarray:
        slots.append(ids.size)
        tokens.append(int((segments > 0).sum()))
        return vectors((ids.shape[0], max_texts(ids.shape[1]), WIDE.hidden_size))

    with patch("jina_jax.embedder.embed_rows", done_at_once):
        seconds = statistics.median(_seconds(lambda: embedder.encode(texts)) for _ in range(runs))
    limit = embedder.max_length
    tokenizing = statistics.median(_seconds(lambda: tokenize(embedder.tokenizer, texts, limit)) for _ in range(runs))
    slots_of_call, tokens_of_call = sum(slots) / runs, sum(tokens) / runs
    return {
        "texts": TEXTS,
        "tokens": tokens_of_call,
        "slots": slots_of_call,
        "seconds": seconds,
        "tokenizing_seconds": tokenizing,
        "encoder_seconds": _on_cpu(tokens_of_call) | _on_tpus(slots_of_call),
    }


def programs() -> dict[str, int]:
    """Compiled by a first pass over all texts of the test split, and by a second one in another order."""
    embedder = _embedder(TINY)
    texts = [text.body for package in read_corpus(BUNDLED, "test") for text in package.text.values()]
    counts = [embed_rows._cache_size()]  # type: ignore[attr-defined]
    for order in (texts, texts[::-1]):
        embedder.encode(order)
        counts.append(embed_rows._cache_size())  # type: ignore[attr-defined]
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


def _on_tpus(slots: float) -> dict[str, float]:
    estimated = json.loads((RESULTS / "tpu_estimate.json").read_text("utf-8"))["results"]
    return {
        f"{each['topology'].partition(':')[0]}, one chip": slots
        / (16 * 512)
        * (1e6 * each["mcycles"] / parse_topology(each["topology"]).chip.clock)
        for each in estimated
        if each["program"] == "forward 16 x 512"
    }


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['texts']} texts of {report['tokens']:,.0f} tokens in {report['slots']:,.0f} slots: "
        f"{1000 * report['seconds']:.0f} ms beside the encoder, {1000 * report['tokenizing_seconds']:.0f} of them for tokens",
        "",
        "| device | encoder, s | share of the rest | without tokenising |",
        "|---|---|---|---|",
    ]
    for name, encoder in report["encoder_seconds"].items():
        rests = report["seconds"], report["seconds"] - report["tokenizing_seconds"]
        shares = " | ".join(f"{rest / (rest + encoder):.1%}" for rest in rests)
        lines.append(f"| {name} | {encoder:.3f} | {shares} |")
    lines += [
        "",
        f"{report['corpus_texts']:,} texts: {report['programs_first_pass']} programs compiled, then {report['programs_later']}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.embedder_overhead")

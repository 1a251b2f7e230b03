"""Embedding on CPU with a full-size model, compared with sentence-transformers on the same weights.

    python -m benchmarks.cpu_inference --json benchmarks/results/cpu_inference.json
    python -m benchmarks.cpu_inference --model runs/e5-small \
        --json benchmarks/results/cpu_e5_small.json
    python -m benchmarks.cpu_inference long --json benchmarks/results/cpu_long_text.json

The second is of real weights, which `jina-jax demo-model runs/e5-small` writes.

`long` embeds one text of 8,192 tokens, with four layers in place of 24: all layers take the same
time. Its systems take turns three times, and the fastest time of each counts: on a machine with
neighbours a single time may be off by a quarter.

Every system runs in a separate process, one after the other: load, first embedding, then the texts.
Without --model it has the size of jina-embeddings-v3 (24 layers of 1,024, 250,002 words) and random
bfloat16 weights, written once in a layout that both libraries read; the texts are descriptions from
the corpus' test split in all languages.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import click

from train.data.corpus import BUNDLED, read_corpus

from .machine import machine, versions

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "sentence-transformers", "transformers", "torch")
LONG_LAYERS = 4
LONG_ROUNDS = 3
QUERY = "how do I edit a photo?"
SYSTEMS = [
    # (name, library, dtype, whether an earlier run has filled the compilation cache)
    ("jina-jax, cold", "jina-jax", "float32", False),
    ("jina-jax", "jina-jax", "float32", True),
    ("sentence-transformers", "sentence-transformers", "float32", False),
    ("jina-jax, cold", "jina-jax", "bfloat16", False),
    ("jina-jax", "jina-jax", "bfloat16", True),
    ("sentence-transformers", "sentence-transformers", "bfloat16", False),
]


@click.group(invoke_without_command=True)
@click.option("--texts", type=int, default=512, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), help="Made there if it does not exist. Default: temporary.")
@click.pass_context
def main(context: click.Context, texts: int, out: Path | None, model: Path | None) -> None:
    """Measure all systems, print a table, and write the numbers as JSON."""
    if context.invoked_subcommand:
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = model or Path(scratch) / "model"
        if not directory.exists():
            subprocess.run([sys.executable, "-m", "benchmarks.cpu_inference", "make", str(directory)], check=True)
        results = []
        for name, library, dtype, warm in SYSTEMS:
            # A cold run measures only the first embedding: the texts would cost as much as in the
            # warm run.
            count = texts if warm or library != "jina-jax" else 0
            cache = Path(scratch) / "compiled" / dtype
            results.append({"system": name, "dtype": dtype} | _measured(library, directory, dtype, count, cache))
            click.echo(results[-1], err=True)
    report = {
        "machine": machine(),
        "date": str(date.today()),
        "texts": texts,
        "versions": versions(PACKAGES),
        "results": results,
    }
    click.echo(_table(results))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")


@main.command()
@click.option("--json", "out", type=click.Path(path_type=Path))
def long(out: Path | None) -> None:
    """Measure one text of 8,192 tokens, print a table, and write the numbers as JSON."""
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        arguments = [sys.executable, "-m", "benchmarks.cpu_inference", "make", str(directory), "--layers", str(LONG_LAYERS)]
        subprocess.run(arguments, check=True)
        systems = [(library, dtype) for dtype in ("float32", "bfloat16") for library in ("jina-jax", "sentence-transformers")]
        rounds = [
            [_run(["long-worker", library, str(directory), dtype], Path(scratch) / "compiled") for library, dtype in systems]
            for _ in range(LONG_ROUNDS)
        ]
    for (library, dtype), runs in zip(systems, zip(*rounds, strict=True), strict=True):
        fastest = min(runs, key=lambda numbers: numbers["seconds"])
        results.append({"system": library, "dtype": dtype} | fastest | {"all_seconds": [run["seconds"] for run in runs]})
    report = {"machine": machine(), "date": str(date.today()), "layers": LONG_LAYERS, "versions": versions(PACKAGES)}
    peers = {each["dtype"]: each["seconds"] for each in results if each["system"] == "sentence-transformers"}
    click.echo("| system | dtype | s a layer | against peer | peak GB |\n|---|---|---|---|---|")
    for each in results:
        seconds, ratio = each["seconds"], peers[each["dtype"]] / each["seconds"]
        cells = f"{each['system']} | {each['dtype']} | {seconds / LONG_LAYERS:.2f} | {ratio:.2f} | {each['peak_gb']:.2f}"
        click.echo(f"| {cells} |")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report | {"results": results}, indent=2) + "\n")


@main.command()
@click.argument("library")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("dtype")
def long_worker(library: str, directory: Path, dtype: str) -> None:
    """Measure the seconds of one text of 8,192 tokens, the second time it is embedded."""
    encode, tokenizer, _ = _load_ours(directory, dtype) if library == "jina-jax" else _load_peer(directory, dtype)
    text = " ".join(corpus_sample(400))
    ids = tokenizer([text])["input_ids"][0]
    text = tokenizer.decode(ids[1:8191])
    encode([text])
    begin = time.perf_counter()
    encode([text])
    seconds = time.perf_counter() - begin
    tokens = len(tokenizer([text])["input_ids"][0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    click.echo(json.dumps({"tokens": tokens, "seconds": seconds, "peak_gb": peak}))


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--layers", type=int, default=24)
def make(directory: Path, layers: int) -> None:
    """Write the model."""
    write_model(directory, layers)


def write_model(directory: Path, layers: int = 24) -> None:
    """Writes a model of jina-embeddings-v3's size with random bfloat16 weights.

    The layout is one that both libraries read.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jina_jax import Encoder, ModelConfig
    from jina_jax.checkpoints.torch_writer import write_sentence_transformers
    from jina_jax.text.tokenizer import load_tokenizer

    config = ModelConfig(num_layers=layers)
    encoder = jax.jit(lambda: Encoder(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))()
    tokenizer = load_tokenizer(Path("data/tokenizer"), config)
    write_sentence_transformers(directory, encoder, tokenizer, max_length=config.max_tokens)


@main.command()
@click.argument("library", type=click.Choice(["jina-jax", "sentence-transformers"]))
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("dtype")
@click.argument("count", type=int)
@click.argument("started", type=float)
def worker(library: str, directory: Path, dtype: str, count: int, started: float) -> None:
    """Measure one system in this process and print its numbers as JSON."""
    encode, tokenizer, limit = _load_ours(directory, dtype) if library == "jina-jax" else _load_peer(directory, dtype)
    loaded = time.time()
    encode([QUERY])
    first = time.time()
    numbers = {"load_s": loaded - started, "first_embedding_s": first - started, "query_s": _median_seconds(encode, [QUERY])}
    if count:
        texts = corpus_sample(count)
        tokens = sum(min(len(ids), limit) for ids in tokenizer(texts)["input_ids"])
        encode(texts[:64])
        begin = time.perf_counter()
        encode(texts)
        numbers |= {"tokens": tokens, "tokens_per_s": tokens / (time.perf_counter() - begin)}
    numbers["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    click.echo(json.dumps(numbers))


def corpus_sample(count: int) -> list[str]:
    """Descriptions of the test split, drawn over all languages."""
    packages = read_corpus(BUNDLED, "test")
    bodies = [" ".join(text.body.split()) for package in packages for text in package.text.values()]
    return random.Random(0).sample(bodies, count)


def _load_ours(directory: Path, dtype: str) -> Any:
    from jina_jax import Embedder
    from jina_jax.command import use_compilation_cache

    use_compilation_cache()
    model = Embedder.load(directory, dtype=dtype)
    return model.encode, model.tokenizer, model.max_length


def _load_peer(directory: Path, dtype: str) -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(directory), device="cpu", model_kwargs={"dtype": dtype})
    return model.encode, model.tokenizer, model.max_seq_length


def _measured(library: str, directory: Path, dtype: str, count: int, cache: Path) -> dict[str, float]:
    return _run(["worker", library, str(directory), dtype, str(count), str(time.time())], cache)


def _run(arguments: list[str], cache: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.cpu_inference", *arguments]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _median_seconds(encode: Any, texts: list[str], runs: int = 5) -> float:
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        encode(texts)
        times.append(time.perf_counter() - begin)
    return sorted(times)[runs // 2]


def _table(results: list[dict[str, Any]]) -> str:
    peers = {r["dtype"]: r for r in results if r["system"] == "sentence-transformers"}
    lines = [
        "| system | dtype | load s | first embedding s | one query ms | tokens/s | against peer | peak GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        speed = r.get("tokens_per_s")
        ratio = f"{speed / peers[r['dtype']]['tokens_per_s']:.2f}" if speed else ""
        lines.append(
            f"| {r['system']} | {r['dtype']} | {r['load_s']:.1f} | {r['first_embedding_s']:.1f} | {1000 * r['query_s']:.0f} "
            f"| {f'{speed:.0f}' if speed else ''} | {ratio} | {r['peak_gb']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.cpu_inference")

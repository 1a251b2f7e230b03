"""Embedding and training on a GPU with a full-size model in bfloat16, compared with a peer.

    python -m benchmarks.gpu --json benchmarks/results/gpu.json
    python -m benchmarks.gpu --small   # two layers and few texts, on any backend of JAX: tries the
                                       # benchmark, measures nothing

The peer is sentence-transformers with its fastest attention. Every system runs in a separate
process, one after the other, and does each work twice: the second time counts.

  * titles, bodies: those of the corpus' test split, in all languages. 8,192 tokens: bodies joined,
    one text after the other.
  * training: steps of 128 pairs of up to 192 tokens, seven Matryoshka dimensions, nothing
    recomputed to save memory.
  * attention alone, forward and backward: the kernel for GPUs beside XLA's forms, on rows of texts
    of 150 tokens on average, and on rows of one text.
  * the matmul ceiling: 8,192 x 8,192 x 8,192, measured, since a device does not reach the number of
    its data sheet.

The peer uses flash_attn where it is installed, else PyTorch's own attention.
Needs: pip install -e '.[bench,convert,cuda]'
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from configs import pairs_short
from jina_jax.config import ModelConfig
from train.config import Stage
from train.data.corpus import BUNDLED, read_corpus

from .cpu_inference import write_model
from .machine import machine, versions
from .pair_training import EVERY, train_ours, train_peer, write_pairs

PACKAGES = ("jax", "jaxlib", "flax", "optax", "sentence-transformers", "transformers", "torch")
SYSTEMS = ("jina-jax", "sentence-transformers")
WORKS = {"titles": 8192, "bodies": 4096, "8,192 tokens": 32}
"""Kinds of text to embed, and the number of texts of each."""
ROWS = {"64 rows of 512": (64, 512), "4 rows of 8,192": (4, 8192)}
CEILING = 8192


@click.group(invoke_without_command=True)
@click.option("--small", is_flag=True, help="Try the benchmark itself, on any machine.")
@click.option("--json", "out", type=click.Path(path_type=Path))
@click.pass_context
def main(context: click.Context, small: bool, out: Path | None) -> None:
    """Measure both systems, print a table, and write the numbers as JSON."""
    if context.invoked_subcommand:
        return
    results: dict[str, Any] = {}
    if not small and _run("backend")["name"] != "gpu":
        raise click.ClickException("JAX finds no GPU here; --small tries the benchmark without one")
    with tempfile.TemporaryDirectory() as scratch:
        model, pairs = Path(scratch) / "model", Path(scratch) / "pairs.jsonl"
        size = ["--small"] if small else []
        _run("make", str(model), str(pairs), *size)
        for name in SYSTEMS:
            results[name] = _run("embed", name, str(model), *size) | _run("pairs", name, str(pairs), *size)
            click.echo(f"{name}: {results[name]}", err=True)
        results["attention"] = _run("attention", *size)
        results["device"] = _run("device", *size)
    click.echo(_table(results, _sizes(small)))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine(), "date": str(date.today()), "small": small, "versions": versions(PACKAGES)}
        out.write_text(json.dumps(report | results, indent=2) + "\n", "utf-8")


# ---- one measurement, in a separate process


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("pairs", type=click.Path(path_type=Path))
@click.option("--small", is_flag=True)
def make(model: Path, pairs: Path, small: bool) -> None:
    """Write the model and the pairs."""
    write_model(model, _sizes(small).num_layers)
    write_pairs(pairs)
    _print({})


@main.command()
@click.argument("system")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--small", is_flag=True)
def embed(system: str, model: Path, small: bool) -> None:
    """Measure the seconds and tokens of each kind of text."""
    encode, tokenizer = (_load_ours if system == SYSTEMS[0] else _load_peer)(model, small)
    found = {}
    for work, texts in _texts(tokenizer, small).items():
        tokens = sum(len(ids) for ids in tokenizer(texts, truncation=True, max_length=8192)["input_ids"])
        encode(texts)
        began = time.perf_counter()
        encode(texts)
        found[work] = {"texts": len(texts), "tokens": tokens, "seconds": time.perf_counter() - began}
    _print(found)


@main.command("pairs")
@click.argument("system")
@click.argument("pairs", type=click.Path(path_type=Path))
@click.option("--small", is_flag=True)
def train_pairs(system: str, pairs: Path, small: bool) -> None:
    """Measure the seconds of a training step."""
    model, stage = _sizes(small), _stage(small)
    if system == SYSTEMS[0]:
        seconds = train_ours(model, stage, pairs, "bfloat16")
    else:
        device = "cpu" if small else "cuda"
        seconds = train_peer(model, stage, pairs, "bfloat16", device=device, attention=_peer_attention(small))
    _print({"training step": {"seconds": statistics.mean(seconds[1:])}})


@main.command()
@click.option("--small", is_flag=True)
def attention(small: bool) -> None:
    """Measure the seconds of attention, forward and backward, in each form."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jina_jax.model.attention import gpu_attention, plain_attention
    from jina_jax.model.chunked_attention import blockwise_attention
    from jina_jax.model.rotary import rotary_tables

    model = _sizes(small)
    forms = {
        "kernel": partial(gpu_attention, interpret=small),
        "XLA, whole rows": plain_attention,
        "XLA, blocks": blockwise_attention,
    }
    found = {}
    for rows, (b, t) in ROWS.items():
        b, t = (1, 256) if small else (b, t)
        rng = np.random.default_rng(0)
        qkv = jnp.asarray(rng.standard_normal((3, b, t, model.hidden_size)), jnp.bfloat16)
        cuts = rng.random((b, t)) < 1 / 150  # texts of 150 tokens on average
        segment_ids = jnp.asarray(1 + cuts.cumsum(1) if t < 8192 else np.ones((b, t)), jnp.int32)
        tables = rotary_tables(jnp.broadcast_to(jnp.arange(t), (b, t)), model.head_dim, model.rope_theta)
        for name, form in forms.items():
            if name == "XLA, whole rows" and t >= 8192:
                continue  # 8 GB of scores for each row, and the same again for its gradient

            def weighted(
                qkv: Any, form: Callable[..., Any] = form, segment_ids: Any = segment_ids, tables: Any = tables
            ) -> Any:
                return form(qkv, segment_ids, tables, num_heads=model.num_heads).astype(jnp.float32).sum()

            found[f"{name}, {rows}"] = {"seconds": _seconds(jax.jit(jax.grad(weighted)), qkv)}
    _print(found)


@main.command()
def backend() -> None:
    """Print the backend of JAX; asked in a separate process, since JAX takes the GPU's memory."""
    import jax

    _print({"name": jax.default_backend()})


@main.command()
@click.option("--small", is_flag=True)
def device(small: bool) -> None:
    """Print the device, and its operations per second in a large matrix product."""
    import jax
    import jax.numpy as jnp

    n = 256 if small else CEILING
    x = jnp.ones((n, n), jnp.bfloat16)
    seconds = _seconds(jax.jit(jnp.matmul), x, x)
    _print({"kind": jax.devices()[0].device_kind, "matmul_flops": 2 * n**3 / seconds})


def _seconds(function: Callable[..., Any], *arguments: Any, runs: int = 10) -> float:
    """Mean seconds of a run, after two runs that compile and warm up.

    The results of all timed runs are waited for together.
    """
    import jax

    for _ in range(2):
        jax.block_until_ready(function(*arguments))
    began = time.perf_counter()
    jax.block_until_ready([function(*arguments) for _ in range(runs)])
    return (time.perf_counter() - began) / runs


# ---- what is measured


def _sizes(small: bool) -> ModelConfig:
    return ModelConfig(num_layers=2 if small else 24, vocab_size=16_000, rope_theta=10_000.0)


def _stage(small: bool) -> Stage:
    stage = pairs_short.get_config().stages[0]
    batch = {"batch_size": 4, "steps": 2 * EVERY} if small else {"batch_size": 128, "steps": 5 * EVERY}
    return replace(stage, **batch, warmup_steps=0, encode_chunk_rows=None, logit_chunk=batch["batch_size"], remat="none")


def _texts(tokenizer: Any, small: bool) -> dict[str, list[str]]:
    found = [text for package in read_corpus(BUNDLED, "test") for text in package.text.values()]
    titles, bodies = [text.title for text in found], [" ".join(text.body.split()) for text in found]
    random.Random(0).shuffle(bodies)
    lengths = [len(ids) for ids in tokenizer(bodies)["input_ids"]]
    long, used = [], 0
    for _ in range(WORKS["8,192 tokens"]):
        begin, tokens = used, 0
        while tokens < 8192:
            tokens, used = tokens + lengths[used], used + 1
        long.append(" ".join(bodies[begin:used]))
    all_texts = {"titles": titles, "bodies": bodies, "8,192 tokens": long}
    return {work: texts[: 2 if small else WORKS[work]] for work, texts in all_texts.items()}


def _load_ours(model: Path, small: bool) -> tuple[Callable[[list[str]], Any], Any]:
    from jina_jax import Embedder

    embedder = Embedder.load(model, dtype="bfloat16")
    batch_size = 32 if small else 256
    return partial(embedder.encode, batch_size=batch_size, max_length=8192), embedder.tokenizer


def _load_peer(model: Path, small: bool) -> tuple[Callable[[list[str]], Any], Any]:
    from sentence_transformers import SentenceTransformer

    chosen = {"dtype": "bfloat16", "attn_implementation": _peer_attention(small)}
    peer = SentenceTransformer(str(model), device="cpu" if small else "cuda", model_kwargs=chosen)
    peer.max_seq_length = 8192
    return partial(_encode_peer, peer), peer.tokenizer


def _encode_peer(peer: Any, texts: list[str]) -> Any:
    """Embeds texts with sentence-transformers, few at once where they are long.

    The library itself makes batches of texts of similar length.
    """
    return peer.encode(texts, batch_size=8 if max(map(len, texts)) > 20_000 else 128)


def _peer_attention(small: bool) -> str:
    return "flash_attention_2" if find_spec("flash_attn") and not small else "sdpa"


# ---- the report


def _run(*arguments: str) -> dict[str, Any]:
    # JAX takes three quarters of the memory at its start unless it is told not to; the peer runs in
    # a separate process.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _print(found: dict[str, Any]) -> None:
    click.echo(json.dumps(found))


def _table(results: dict[str, Any], model: ModelConfig) -> str:
    ours, peer = (results[name] for name in SYSTEMS)
    ceiling = results["device"]["matmul_flops"]
    products = 2 * model.num_layers * (4 * model.hidden_size**2 + 2 * model.hidden_size * model.mlp_size)
    lines = [
        f"{results['device']['kind']}, {ceiling / 1e12:.0f} TFLOP/s measured",
        "",
        "| work | jina-jax | sentence-transformers | ratio | share of the ceiling, products with parameters alone |",
        "|---|---|---|---|---|",
    ]
    for work in WORKS:
        speeds = [each[work]["texts"] / each[work]["seconds"] for each in (ours, peer)]
        share = products * ours[work]["tokens"] / ours[work]["seconds"] / ceiling
        lines.append(f"| {work}, texts/s | {speeds[0]:,.1f} | {speeds[1]:,.1f} | {speeds[0] / speeds[1]:.2f} | {share:.1%} |")
    steps = [1 / each["training step"]["seconds"] for each in (ours, peer)]
    lines.append(f"| training, steps/s | {steps[0]:.2f} | {steps[1]:.2f} | {steps[0] / steps[1]:.2f} | |")
    lines += ["", "| attention, forward and backward | ms |", "|---|---|"]
    lines += [f"| {name} | {1000 * each['seconds']:.2f} |" for name, each in results["attention"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu")

"""Adapter training on CPU above multilingual-e5-small, beside PyTorch with PEFT.

    jina-jax demo-model runs/e5-small
    python -m benchmarks.adapter_training runs/e5-small --json FILE

Both train one adapter of the same rank on all matrices of the same weights, on the same pairs of
the bundled corpus, with the same batch, longest text and loss: InfoNCE in both directions at some
Matryoshka dimensions. PyTorch has its adapters in float32 and computes under autocast.
Each system runs in a separate process, in turns; tokens are real ones, without padding. The peer
needs: pip install -e '.[bench,convert]'
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import click

from jina_jax.text.readers import read_records
from train.config import DatasetConfig, InitialModel, Stage, TrainConfig
from train.run.loop import train
from train.run.metrics import read_metrics

from .machine import machine, versions
from .pair_training import write_pairs

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft")
SYSTEMS = [(name, dtype) for dtype in ("float32", "bfloat16") for name in ("jina-jax", "PyTorch + PEFT")]
RANK = 16
MATRICES = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense", "word_embeddings")
"""PEFT's names of what has adapters here; ours are on the token types too."""

EVERY = 5
"""Steps that are timed together."""


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--steps", type=click.IntRange(2 * EVERY), default=30, show_default=True, help="Steps of a turn.")
@click.option("--turns", type=click.IntRange(1), default=2, show_default=True)
@click.option("--batch-size", type=click.IntRange(2), default=32, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(model: Path, steps: int, turns: int, batch_size: int, out: Path | None) -> None:
    """Measure both systems above MODEL, print a table, and write the numbers as JSON."""
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        write_pairs(Path(scratch) / "pairs.jsonl")
        _write_torch_model(model, Path(scratch) / "torch")
        for turn in range(turns):
            for name, dtype in SYSTEMS:
                speed = _measured(name, dtype, model, Path(scratch), steps, batch_size)
                runs.append({"system": name, "dtype": dtype, "turn": turn} | speed)
                click.echo(runs[-1], err=True)
    results = [_result(name, dtype, runs) for name, dtype in SYSTEMS]
    click.echo(_table(results))
    if out:
        report = {"machine": machine(), "date": str(date.today()), "versions": versions(PACKAGES)}
        report |= {"flags": os.environ.get("XLA_FLAGS", ""), "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA", "")}
        report |= {"rank": RANK, "batch_size": batch_size, "steps": steps, "results": results, "runs": runs}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")


def stage(pairs: Path, steps: int, batch_size: int) -> Stage:
    return Stage(
        name="text_matching",
        objective="text_matching",
        adapters=("text-matching",),
        prompts=("query: ", "query: "),
        datasets=(DatasetConfig(str(pairs), "pair"),),
        steps=steps,
        batch_size=batch_size,
        max_length=192,
        row_length=192,
        learning_rate=1e-3,
        temperature=0.05,
        dims=(48, 96, 192, 384),
    )


def train_ours(model: Path, scratch: Path, dtype: str, steps: int, batch_size: int) -> dict[str, float]:
    """Trains with `python -m train`'s loop; returns its median speed, and the seconds of all."""
    config = TrainConfig(
        start=InitialModel(source=str(model), lora_rank=RANK, lora_alpha=float(RANK)),
        stages=(stage(scratch / "pairs.jsonl", steps, batch_size),),
        dtype=dtype,  # type: ignore[arg-type]
        log_every=EVERY,
        checkpoint_every=10**6,
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as workdir:
        train(config, Path(workdir), progress=False)
        lines = read_metrics(Path(workdir))
    return {
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines[1:]),
        "padding_fraction": statistics.mean(line["padding_fraction"] for line in lines),
        "seconds": time.perf_counter() - began,
    }


def train_peft(model: Path, scratch: Path, dtype: str, steps: int, batch_size: int) -> dict[str, float]:
    """Trains with PyTorch and PEFT; returns its median speed, and the seconds of all."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import cross_entropy, normalize
    from transformers import AutoModel, AutoTokenizer

    plan, began = stage(scratch / "pairs.jsonl", steps, batch_size), time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(scratch / "torch")
    base = AutoModel.from_pretrained(scratch / "torch", dtype=torch.float32)
    encoder = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=list(MATRICES)))
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, plan.learning_rate, plan.betas, plan.epsilon, plan.weight_decay)
    pairs = [record.fields for record in read_records(scratch / "pairs.jsonl")]
    random.Random(0).shuffle(pairs)

    def embedded(texts: list[str]) -> tuple[Any, int]:
        batch = tokenizer(
            ["query: " + text for text in texts], padding=True, truncation=True, max_length=plan.max_length, return_tensors="pt"
        )
        mask = batch["attention_mask"]
        states = encoder(**batch).last_hidden_state.float() * mask[..., None]
        return states.sum(1) / mask.sum(1, keepdim=True), int(mask.sum())

    speeds, tokens, last = [], 0, time.perf_counter()
    for step in range(1, steps + 1):
        rows = [pairs[(step * batch_size + i) % len(pairs)] for i in range(batch_size)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            anchors, held = embedded([row["anchor"] for row in rows])
            positives, more = embedded([row["positive"] for row in rows])
        tokens += held + more
        loss = torch.zeros(())
        for size in plan.dims:
            scores = normalize(anchors[:, :size]) @ normalize(positives[:, :size]).T / plan.temperature
            own = torch.arange(batch_size)
            loss = loss + cross_entropy(scores, own) + cross_entropy(scores.T, own)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, plan.clip_norm)
        optimizer.step()
        if step % EVERY == 0:
            now = time.perf_counter()
            speeds.append(tokens / (now - last))
            tokens, last = 0, now
    return {"tokens_per_second": statistics.median(speeds[1:]), "seconds": time.perf_counter() - began}


def worker(system: str, dtype: str, model: str, scratch: str, steps: str, batch_size: str) -> None:
    """Trains with one system in this process, and prints its speed."""
    measure = train_ours if system == "jina-jax" else train_peft
    print(json.dumps(measure(Path(model), Path(scratch), dtype, int(steps), int(batch_size))))


def _measured(system: str, dtype: str, model: Path, scratch: Path, steps: int, batch_size: int) -> dict[str, float]:
    call = "import sys; from benchmarks.adapter_training import worker; worker(*sys.argv[1:])"
    command = [sys.executable, "-c", call, system, dtype, str(model), str(scratch), str(steps), str(batch_size)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _write_torch_model(model: Path, directory: Path) -> None:
    """Writes the model with PyTorch's names of tensors, as transformers reads it."""
    from jina_jax.checkpoints.load import load_encoder
    from jina_jax.checkpoints.torch_writer import write_sentence_transformers

    loaded = load_encoder(model)
    write_sentence_transformers(directory, loaded.encoder, loaded.tokenizer, max_length=512)


def _result(system: str, dtype: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over turns; the ratio is that of the two systems' medians."""

    def speed(name: str) -> float:
        return statistics.median(run["tokens_per_second"] for run in runs if run["system"] == name and run["dtype"] == dtype)

    return {
        "system": system,
        "dtype": dtype,
        "tokens_per_second": speed(system),
        "against_peer": speed(system) / speed("PyTorch + PEFT"),
    }


def _table(results: list[dict[str, Any]]) -> str:
    lines = ["| system | dtype | tokens/s | against PyTorch + PEFT |", "|---|---|---:|---:|"]
    lines += [f"| {r['system']} | {r['dtype']} | {r['tokens_per_second']:,.0f} | {r['against_peer']:.2f} |" for r in results]
    return "\n".join(lines)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.adapter_training")

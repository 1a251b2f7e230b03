"""Losses of adapter stages whose adapters are folded into the kernels, as `python -m train` has
them, beside the same stages in the mixed form, a small product beside each large one.

    jina-jax demo-model runs/e5-small
    python -m benchmarks.adapter_forms runs/e5-small --json benchmarks/results/adapter_forms.json

Both begin with the same weights and see the same batches. Folding adds an update to a kernel before
the product, where bfloat16 may swallow it: over many steps the losses tell whether it did. Rates,
temperatures, rank and alpha are those of `configs/retrieval.py` and `configs/classification.py`;
batches, texts and dimensions are small, since the mixed form is slow. Reported is the mean loss of
the last steps, for each seed.
"""

import json
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import jax.numpy as jnp
import numpy as np
from jax import Array

from configs import classification, retrieval
from configs._common import ADAPTER_START
from jina_jax.command import Command, use_compilation_cache
from jina_jax.model.encoder import Encoder, Gather, pool
from jina_jax.text.packing import max_texts
from train.config import DatasetConfig, InitialModel, Stage, TrainConfig
from train.data.collate import PackedRows
from train.data.corpus import BUNDLED, read_corpus
from train.data.corpus_records import search_pairs, section_labels
from train.data.records import write_records
from train.run.loop import train
from train.run.metrics import read_metrics
from train.step import objectives

from .machine import machine, versions

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
EVERY = 20
"""Last steps that the loss is the mean of."""


@click.command(cls=Command)
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.option("--steps", type=click.IntRange(EVERY), default=200, show_default=True)
@click.option("--seeds", type=click.IntRange(2), default=3, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option(
    "--stage", "name", type=click.Choice(["retrieval", "classification"]), help="Alone; the JSON file keeps the other."
)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(model: str, steps: int, seeds: int, dtype: str, name: str | None, out: Path | None) -> None:
    """Train stages above MODEL in both forms, and print their losses."""
    use_compilation_cache()
    rows = []
    if name and out and out.exists():
        rows = [row for row in json.loads(out.read_text("utf-8"))["stages"] if row["stage"] != name]
    with tempfile.TemporaryDirectory() as scratch:
        for stage in _stages(Path(scratch), steps):
            if name not in (None, stage.name):
                continue
            forms: dict[str, AbstractContextManager] = {
                "folded": nullcontext(),
                "mixed": patch.object(objectives, "_pooled_rows", pooled_rows_mixed),
            }
            losses: dict[str, list[float]] = {label: [] for label in forms}
            for seed in range(seeds):
                for label, form in forms.items():
                    with form:
                        losses[label].append(_last_loss(model, stage, seed, dtype))
                    click.echo(f"{stage.name} {label} seed {seed}: {losses[label][-1]:.5f}", err=True)
            rows.append({"stage": stage.name} | losses)
    click.echo(_table(rows))
    if out:
        report = {"machine": machine(), "date": str(date.today()), "versions": versions(PACKAGES)}
        out.write_text(json.dumps(report | {"dtype": dtype, "steps": steps, "stages": rows}, indent=2) + "\n")


def pooled_rows_mixed(encoder: Encoder, rows: PackedRows, adapter: int | None, stage: Stage, gather: Gather | None) -> Array:
    """What `objectives._pooled_rows` computes, by the mixed form and plain differentiation."""
    assert adapter is not None and gather is None
    b, t = rows.tokens.shape
    states = encoder(
        jnp.asarray(rows.tokens),
        jnp.asarray(rows.segment_ids),
        jnp.asarray(rows.positions),
        jnp.full((b, max_texts(t)), adapter),
    )
    embeddings = pool(states, jnp.asarray(rows.segment_ids), max_texts(t))
    return embeddings.reshape(-1, embeddings.shape[-1])


def _stages(scratch: Path, steps: int) -> Sequence[Stage]:
    packages = read_corpus(BUNDLED, "train")
    write_records(scratch / "searches.jsonl", search_pairs(packages))
    write_records(scratch / "labelled.jsonl", section_labels(packages))
    small = {"steps": steps, "warmup_steps": steps // 100, "max_length": 32, "row_length": 64, "dims": (48, 96, 192, 384)}
    small |= {"num_row_counts": 2, "encode_chunk_rows": None, "remat": "except_products"}
    return (
        replace(
            retrieval.get_config().stages[0],
            datasets=(DatasetConfig(str(scratch / "searches.jsonl"), "pair"),),
            batch_size=8,
            num_negatives=0,
            **small,
        ),
        replace(
            classification.get_config().stages[0],
            datasets=(DatasetConfig(str(scratch / "labelled.jsonl"), "labelled_text"),),
            batch_size=8,
            num_negatives=1,
            **small,
        ),
    )


def _last_loss(model: str, stage: Stage, seed: int, dtype: str) -> float:
    sizes = {name: ADAPTER_START[name] for name in ("lora_rank", "lora_alpha")}
    config = TrainConfig(
        start=InitialModel(source=model, **sizes),
        stages=(stage,),
        seed=seed,
        dtype=dtype,  # type: ignore[arg-type]
        log_every=EVERY,
        checkpoint_every=10**6,
    )
    with tempfile.TemporaryDirectory() as workdir:
        train(config, Path(workdir))
        return read_metrics(Path(workdir))[-1]["loss"]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| stage | folded | mixed | difference | deviation of seeds |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        folded, mixed = np.array(row["folded"]), np.array(row["mixed"])
        difference, deviation = (folded - mixed).mean(), mixed.std(ddof=1)
        lines.append(f"| {row['stage']} | {folded.mean():.4f} | {mixed.mean():.4f} | {difference:+.5f} | {deviation:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Contrastive training on CPU at the quickstart's size, beside sentence-transformers' trainer.

    python -m benchmarks.cpu_training --json benchmarks/results/cpu_training.json

The same pairs of the bundled corpus, batch, cut, model size, optimizer and loss: InfoNCE in both directions at four Matryoshka
dimensions. Each system runs in a process of its own, in turns, and each turn counts the steps after the first ones, which
compile. Both initialise their own random weights; the peer's has a table of absolute positions where ours is rotary.
Needs the peer's trainer: pip install -e '.[bench]'
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import click

from configs import quickstart
from train.config import Stage, from_dict, to_dict
from train.corpus import BUNDLED, read_corpus
from train.datasets import title_body_pairs
from train.loop import train
from train.metrics import read_metrics
from train.records import write_records

from .machine import machine, versions

PACKAGES = ("jax", "jaxlib", "flax", "optax", "sentence-transformers", "transformers", "torch", "accelerate")
SYSTEMS = [(name, dtype) for dtype in ("float32", "bfloat16") for name in ("jina-jax", "sentence-transformers")]
WARM_UP = 10


@click.group(invoke_without_command=True)
@click.option("--steps", type=int, default=40, show_default=True, help="Counted in each turn.")
@click.option("--turns", type=int, default=3, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
@click.pass_context
def main(context: click.Context, steps: int, turns: int, out: Path | None) -> None:
    """Measure both systems, print a table, and write the numbers as JSON."""
    if context.invoked_subcommand:
        return
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        write_records(Path(scratch) / "pairs.jsonl", title_body_pairs(read_corpus(BUNDLED, "train")))
        for turn in range(turns):
            for name, dtype in SYSTEMS:
                runs.append({"system": name, "dtype": dtype, "turn": turn, "seconds": _measured(name, dtype, steps, scratch)})
                click.echo(runs[-1], err=True)
    results = [_result(name, dtype, runs) for name, dtype in SYSTEMS]
    report = {"machine": machine(), "date": str(date.today()), "versions": versions(PACKAGES), "steps": steps}
    click.echo(_table(results))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report | {"results": results, "runs": runs}, indent=2) + "\n")


@main.command()
@click.argument("system")
@click.argument("dtype")
@click.argument("steps", type=int)
@click.argument("scratch", type=click.Path(path_type=Path))
def worker(system: str, dtype: str, steps: int, scratch: Path) -> None:
    """Train with one system in this process, and print the mean seconds of a counted step."""
    measure = _train_ours if system == "jina-jax" else _train_peer
    click.echo(json.dumps(statistics.mean(measure(scratch, dtype, WARM_UP + steps)[WARM_UP:])))


def _train_ours(scratch: Path, dtype: str, steps: int) -> list[float]:
    """The seconds of each step of what `python -m train` runs."""
    fields = to_dict(quickstart.pairs()) | {"dtype": dtype, "log_every": 1, "checkpoint_every": 10**6}
    fields["start"] = to_dict(quickstart.mlm())["start"]
    data = {"path": str(scratch / "pairs.jsonl"), "kind": "pair"}
    fields["stages"] = [fields["stages"][0] | {"datasets": [data], "steps": steps, "warmup_steps": 0}]
    with tempfile.TemporaryDirectory() as workdir:
        train(from_dict(fields), Path(workdir), progress=False)
        return [1 / line["steps_per_second"] for line in read_metrics(Path(workdir))]


def _train_peer(scratch: Path, dtype: str, steps: int) -> list[float]:
    """The seconds of each step of sentence-transformers' trainer."""
    import datasets  # type: ignore[import-not-found]
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    stage = quickstart.pairs().stages[0]
    ends = [time.perf_counter()]

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    model = SentenceTransformer(str(_peer_model(scratch, stage)), device="cpu")
    ranking = MultipleNegativesRankingLoss(
        model,
        scale=1 / stage.temperature,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    rows = datasets.Dataset.from_json(str(scratch / "pairs.jsonl"))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(scratch / "peer"),
        max_steps=steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.clip_norm,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        bf16=dtype == "bfloat16",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=steps,
    )
    SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=rows.select_columns(["anchor", "positive"]),  # type: ignore[union-attr]
        loss=MatryoshkaLoss(model, ranking, matryoshka_dims=list(stage.dims), matryoshka_weights=list(stage.dim_weights)),
        callbacks=[Clock()],
    ).train()
    return [end - begin for begin, end in itertools.pairwise(ends)]


def _peer_model(scratch: Path, stage: Stage) -> Path:
    """XLM-RoBERTa of the quickstart's sizes with the bundled tokenizer, under a mean."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import XLMRobertaConfig, XLMRobertaModel

    from jina_jax.tokenizer import load_tokenizer

    config, directory = quickstart.MODEL, scratch / "peer-model"
    sizes = XLMRobertaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_size,
        max_position_embeddings=stage.length + 2,
        hidden_dropout_prob=0.0,  # as ours
        attention_probs_dropout_prob=0.0,
    )
    XLMRobertaModel(sizes).save_pretrained(directory)
    load_tokenizer(Path("data/tokenizer"), config).save_pretrained(directory)
    transformer = Transformer(str(directory), max_seq_length=stage.length)
    pipeline = SentenceTransformer(modules=[transformer, Pooling(config.hidden_size)], device="cpu")
    pipeline.save(str(directory))
    return directory


def _measured(system: str, dtype: str, steps: int, scratch: str) -> float:
    command = [sys.executable, "-m", "benchmarks.cpu_training", "worker", system, dtype, str(steps), scratch]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _result(system: str, dtype: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over turns; the ratio is that of the two systems' medians."""

    def seconds(name: str) -> float:
        return statistics.median(run["seconds"] for run in runs if run["system"] == name and run["dtype"] == dtype)

    return {
        "system": system,
        "dtype": dtype,
        "steps_per_second": 1 / seconds(system),
        "against_peer": seconds("sentence-transformers") / seconds(system),
    }


def _table(results: list[dict[str, Any]]) -> str:
    lines = ["| system | dtype | steps/s | against peer |", "|---|---|---|---|"]
    lines += [f"| {r['system']} | {r['dtype']} | {r['steps_per_second']:.2f} | {r['against_peer']:.2f} |" for r in results]
    return "\n".join(lines)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.cpu_training")

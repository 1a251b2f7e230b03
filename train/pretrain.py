"""Trains a small model from raw text to five adapters.

python -m train.pretrain --workdir runs/pretrain

Every step leaves its result in the working directory and is skipped if that exists, so an
interrupted run resumes.
"""

import logging
import shutil
import sys
import time
from pathlib import Path

import click

from jina_jax import Embedder
from jina_jax.command import Command

from .data.corpus import BUNDLED, read_corpus
from .data.corpus_records import CORPUS_RECORDS
from .data.tfds_datasets import prepare_corpus
from .evaluation.before_after import SEARCHES
from .evaluation.evaluate import evaluate, untrained
from .evaluation.scores import Score
from .evaluation.stage_summary import write_summary
from .run.loop import train
from .run.metrics import FILE
from .run.preset import load_moved

PRESETS = Path(__file__).parents[1] / "configs" / "pretrain.py"

HOME = "runs/pretrain"
"""Working directory that the presets name."""


@click.command(cls=Command)
@click.option("--workdir", type=click.Path(path_type=Path), default=Path(HOME), show_default=True)
@click.option("--corpus", type=click.Path(path_type=Path), default=BUNDLED, help="Packages as in data/README.md.")
def main(workdir: Path, corpus: Path) -> None:
    """Train, evaluate and search; WORKDIR then holds model/, report.md, metrics.json and plots."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in CORPUS_RECORDS:
        _say(f"Data: the corpus as {name}")
        prepare_corpus(name, workdir / "datasets", corpus)
    _train("MLM", "mlm", workdir / "mlm", workdir)
    _train("Pairs", "pairs", workdir / "pairs", workdir)
    _train("Adapters", "adapters", workdir / "adapters", workdir)
    if not (workdir / "model").exists():
        shutil.copytree(workdir / "adapters" / "model", workdir / "model.partial", dirs_exist_ok=True)
        (workdir / "model.partial").rename(workdir / "model")
    _evaluate(workdir, corpus)
    _search(workdir / "model", corpus)
    click.echo(f"\nmodel: {workdir / 'model'}\nreport: {workdir / 'report.md'}")


def _train(title: str, preset: str, directory: Path, workdir: Path) -> None:
    if (directory / "model").exists():
        return
    _say(title)
    model = train(load_moved(f"{PRESETS}:{preset}", HOME, workdir), directory, progress=True)
    if model is None:
        sys.exit("stopped; start it again to resume")


def _evaluate(workdir: Path, corpus: Path) -> None:
    """Measures the finished model and that of the first stage, and writes the report."""
    if (workdir / "report.md").exists():
        return
    train_packages = read_corpus(corpus, "train")
    scores: dict[str, list[Score]] = {}
    for split in ("validation", "test"):
        _say(f"Evaluation on the {split} split")
        packages = read_corpus(corpus, split)
        embedder = Embedder.load(workdir / "model")
        scores[split] = evaluate(embedder, untrained(embedder), packages, train_packages, batch_size=256, progress=True)
    _say("Evaluation of the first stage")
    pretrained = evaluate(
        Embedder.load(workdir / "mlm" / "model"), None, packages, train_packages, batch_size=256, progress=True
    )
    write_summary(workdir, scores, pretrained, [workdir / run / FILE for run in ("mlm", "pairs", "adapters")])


def _search(model: Path, corpus: Path) -> None:
    """Prints the results of three searches in the test split, in three languages."""
    embedder, packages = Embedder.load(model), read_corpus(corpus, "test")
    bodies = embedder.encode_document([package.text["en"].body for package in packages], batch_size=256)
    for query in SEARCHES:
        click.secho(f"\n{query}", bold=True)
        similarities = embedder.similarity(embedder.encode_query([query]), bodies)[0]
        for index in (-similarities).argsort()[:3]:
            click.echo(f"  {similarities[index]:.2f}  {packages[index].id}: {packages[index].text['en'].title}")


def _say(title: str) -> None:
    click.secho(f"[{time.strftime('%H:%M:%S')}] {title}", bold=True, err=True)


if __name__ == "__main__":
    main(prog_name="python -m train.pretrain")

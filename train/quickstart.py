"""Five adapters above a real model in minutes, with the same searches before and after.

python -m train.quickstart --workdir runs/quickstart

Every step leaves its result in the working directory and is skipped if that exists, so a quickstart
that was interrupted, at any moment, continues.
"""

import functools
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from jina_jax import Embedder, ModelConfig
from jina_jax.bulk.run import model_fingerprint
from jina_jax.checkpoints.demo_model import write_demo_model
from jina_jax.checkpoints.sources import find_model
from jina_jax.command import Command
from jina_jax.errors import RunError
from jina_jax.files import json_diff, read_json, sha256, write_json

from .config import TrainConfig, to_dict
from .data.corpus import BUNDLED, read_corpus
from .data.tfds_datasets import prepare_corpus
from .evaluation.before_after import SEARCHES, Result, before_after_runs, before_after_scores, sampled_tasks, search
from .evaluation.before_after_report import BeforeAfter, Searches, language_table, write_before_after
from .evaluation.kept_embeddings import KeptEmbeddings
from .evaluation.model_scores import OWN_ADAPTERS, base_sides
from .run.clock import Clock
from .run.loop import train
from .run.preset import load_moved

PRESET = str(Path(__file__).parents[1] / "configs" / "quickstart.py")

HOME = "runs/quickstart"
"""Working directory that the preset names."""

RECORDS = ("searches", "scored", "labelled")
"""Records of the corpus that the preset's stages learn from."""

DTYPE = "bfloat16"

MAX_LENGTH = 128
"""Tokens of a text that searches and scores see; four of five descriptions are shorter."""

RESULTS = 3
"""Packages that are shown for each query."""


@click.command(cls=Command)
@click.option("--workdir", type=click.Path(path_type=Path), default=Path(HOME), show_default=True)
@click.option("--model", help="Base: a directory or hub id.  [default: multilingual-e5-small, as WORKDIR/e5-small]")
@click.option("--corpus", type=click.Path(path_type=Path), default=BUNDLED, help="Packages as in data/README.md.")
def main(workdir: Path, model: str | None, corpus: Path) -> None:
    """Search, train five adapters, evaluate them, and search again.

    WORKDIR then holds model/, report.md, metrics.json and plots.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    packages, train_packages = read_corpus(corpus, "test"), read_corpus(corpus, "train")
    base = model or str(workdir / "e5-small")
    if model is not None:
        find_model(model)
    workdir.mkdir(parents=True, exist_ok=True)
    clock = Clock(workdir / "seconds.json")
    with clock.part("model and data"):
        _say("Model and data")
        if model is None and not Path(base).exists():
            write_demo_model(base)
        embedder = Embedder.load(base, dtype=DTYPE)
        config = _config(workdir, base, embedder.config)
        _check_same_run(workdir, base, corpus, config)
        for name in RECORDS:
            prepare_corpus(name, workdir / "datasets", corpus)
    embeddings = _kept_embeddings(workdir, embedder)

    with clock.part("first searches"):
        _say(f"Searches with the base, in {len(packages):,} packages")
        before = search(SEARCHES, packages, base_sides(embedder.config, "retrieval"), embeddings, RESULTS, progress=True)
    _show(before)
    with clock.part("training"):
        _say("Five adapters")
        if not (workdir / "model").exists() and train(config, workdir) is None:
            sys.exit("stopped; start it again to continue")
    with clock.part("evaluation"):
        _say("Evaluation")
        tasks = sampled_tasks(packages, train_packages)
        scores = before_after_scores(
            before_after_runs(tasks, embedder.config, _dims(embedder.config)), embeddings, progress=True
        )
        after = search(SEARCHES, packages, OWN_ADAPTERS["retrieval"][0], embeddings, RESULTS, progress=False)
    searches, command = Searches(SEARCHES, before, after), _next_command(workdir, corpus)
    write_before_after(workdir, scores, searches, clock.spent(), base=Path(base).name, command=command)
    _show(before, after)
    click.echo(language_table(BeforeAfter(scores)))
    click.echo(f"model: {workdir / 'model'}\nreport: {workdir / 'report.md'}\n\nNow search for something yourself:\n{command}")


def _check_same_run(workdir: Path, base: str, corpus: Path, config: TrainConfig) -> None:
    """Raises RunError if the directory holds another run, whose embeddings it has kept."""
    file = workdir / "run.json"
    run = {"model": model_fingerprint(find_model(base)), "corpus": sha256(corpus), "training": to_dict(config)}
    if not file.exists() and not (workdir / "model").exists():
        write_json(file, run)
    differences = json_diff(read_json(file, RunError), run) if file.exists() else ["it has a model of another program"]
    if differences:
        raise RunError(f"{workdir} holds another run: {'; '.join(differences)}. Give another --workdir, or remove it")


def _kept_embeddings(workdir: Path, base: Embedder) -> KeptEmbeddings:
    @functools.cache
    def trained() -> Embedder:
        return Embedder.load(workdir / "model", dtype=DTYPE)

    def embedder_of(adapter: str | None) -> Embedder:
        return base if adapter is None else trained()

    return KeptEmbeddings(workdir / "embeddings.sqlite", embedder_of, MAX_LENGTH)


def _config(workdir: Path, base: str, config: ModelConfig) -> TrainConfig:
    """The preset in `workdir`, above `base`."""
    dims, stages = _dims(config), len(load_moved(PRESET, HOME, workdir).stages)
    overrides = [f"start.source={base!r}", f"start.matryoshka_dims={dims}"]
    return load_moved(PRESET, HOME, workdir, [*overrides, *(f"stages.{i}.dims={dims}" for i in range(stages))])


def _dims(config: ModelConfig) -> tuple[int, ...]:
    """Matryoshka dimensions: the full one, and down to an eighth of it."""
    return tuple(config.hidden_size // part for part in (8, 4, 2, 1))


def _show(before: Sequence[Sequence[Result]], after: Sequence[Sequence[Result]] | None = None) -> None:
    """Prints what the searches found, that of the adapters beside that of the base."""
    systems = {"base": before} if after is None else {"base": before, "adapters": after}
    width = (shutil.get_terminal_size().columns - 2) // len(systems) - 2
    for number, query in enumerate(SEARCHES):
        click.secho(f"\n{query}", bold=True)
        if after is not None:
            click.echo("  " + "  ".join(name.ljust(width) for name in systems).rstrip())
        for row in zip(*(found[number] for found in systems.values()), strict=True):
            cells = [f"{hit.score:.2f}  {hit.id}: {hit.title}" for hit in row]
            click.echo("  " + "  ".join(_fitted(cell, width) for cell in cells).rstrip())
    click.echo()


def _fitted(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else f"{text[: width - 1]}…"


def _next_command(workdir: Path, corpus: Path) -> str:
    program = os.path.relpath(Path(sys.executable).with_name("jina-jax"))
    words = [program, "search", "Noten setzen", os.path.relpath(corpus)]
    options = ["--field", "text.en.title", "--id-field", "id", "--model", str(workdir / "model"), "--dtype", DTYPE]
    return shlex.join([*words, *options])


def _say(title: str) -> None:
    click.secho(f"[{time.strftime('%H:%M:%S')}] {title}", bold=True, err=True)


if __name__ == "__main__":
    main(prog_name="python -m train.quickstart")

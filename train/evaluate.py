"""Measures a model on the corpus: base and adapters, at each Matryoshka dimension, beside BM25 and an untrained model.

python -m train.evaluate MODEL --corpus data/debian_packages.jsonl.xz --split test --json test.json
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import click
from flax import nnx

from jina_jax import Embedder, Encoder
from jina_jax.cli import Program

from .data.corpus import Package, read_corpus
from .evaluation import report
from .evaluation.bm25 import bm25_score
from .evaluation.model_scores import model_scores
from .evaluation.scores import Score
from .evaluation.tasks import Retrieval, corpus_tasks


@click.command(cls=Program)
@click.argument("model")
@click.option("--corpus", type=click.Path(path_type=Path), required=True, help="JSON lines as in data/README.md, plain or .xz.")
@click.option("--split", required=True, help="train, validation or test; classifiers are fitted on train.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="OUT.json; OUT.md and OUT.png are written beside it.")
@click.option("--every-adapter", is_flag=True, help="Also measure adapters on the tasks that they were not trained for.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="In texts; bounds memory.")
def main(model: str, corpus: Path, split: str, output: Path | None, every_adapter: bool, batch_size: int) -> None:
    """Measure MODEL (directory or hub id, in any layout) on retrieval, classification, clustering and similarity."""
    if output is not None:
        report.check_writable(output)
    packages, train_packages = read_corpus(corpus, split), read_corpus(corpus, "train")
    embedder = Embedder.load(model)
    scores = evaluate(
        embedder,
        untrained(embedder),
        packages,
        train_packages,
        every_adapter=every_adapter,
        batch_size=batch_size,
        progress=sys.stderr.isatty(),
    )
    if output is not None:
        report.write(output, scores)
    click.echo(report.markdown(scores))


def evaluate(
    embedder: Embedder,
    untrained: Embedder | None,
    packages: Sequence[Package],
    train_packages: Sequence[Package],
    *,
    every_adapter: bool = False,
    batch_size: int = 32,
    progress: bool = False,
) -> list[Score]:
    """Scores of BM25, the untrained model and the model.

    Args:
        untrained: measured without adapters, for fresh ones change nothing; None = not measured.
        packages: those of the split to measure.
        train_packages: classifiers are fitted on a sample of these.
        every_adapter: also measure adapters on the tasks that they were not trained for, at full dimension.
        batch_size: as in `Embedder.encode`.
        progress: shows bars.

    Raises:
        ValueError: too few packages, or embeddings that are not finite.
    """
    tasks = corpus_tasks(packages, train_packages)
    scores = [bm25_score(task) for task in tasks if isinstance(task, Retrieval)]
    if untrained is not None:
        scores += model_scores("untrained", untrained, tasks, (), batch_size=batch_size, progress=progress)
    scores += model_scores(
        "model",
        embedder,
        tasks,
        embedder.config.tasks,
        every_adapter=every_adapter,
        batch_size=batch_size,
        progress=progress,
    )
    return scores


def untrained(embedder: Embedder, seed: int = 0) -> Embedder:
    """A model of the same configuration and tokenizer as it is before training."""
    encoder = embedder.encoder
    fresh = Encoder(encoder.config, dtype=encoder.dtype, rngs=nnx.Rngs(seed))
    return Embedder(fresh, embedder.config, embedder.tokenizer)


if __name__ == "__main__":
    main(prog_name="python -m train.evaluate")

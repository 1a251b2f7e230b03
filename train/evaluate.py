"""Measures a model on the corpus, beside BM25 and an untrained model.

Base and adapters are measured, at each Matryoshka dimension.

python -m train.evaluate MODEL --corpus data/debian_packages.jsonl.xz --split test --json test.json
"""

import sys
from pathlib import Path

import click

from jina_jax import Embedder
from jina_jax.command import Command, max_length_option, model_options

from .data.corpus import read_corpus
from .evaluation import report
from .evaluation.evaluate import evaluate, untrained


@click.command(cls=Command)
@click.argument("model")
@model_options
@max_length_option
@click.option("--corpus", type=click.Path(path_type=Path), required=True, help="JSON lines as in data/README.md, plain or .xz.")
@click.option("--split", required=True, help="train, validation or test; classifiers are fitted on train.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="OUT.json; OUT.md and OUT.png are written beside it.")
@click.option("--every-adapter", is_flag=True, help="Also measure adapters on the tasks that they were not trained for.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="In texts; bounds memory.")
def main(
    model: str,
    dtype: str | None,
    revision: str | None,
    max_length: int | None,
    corpus: Path,
    split: str,
    output: Path | None,
    every_adapter: bool,
    batch_size: int,
) -> None:
    """Measure MODEL (directory or hub id, in any layout) on retrieval, classification, clustering
    and similarity.

    A model with prompts for queries and documents has them: the base that of queries on both sides
    of all but retrieval, an adapter its task's instruction.
    """
    if output is not None:
        report.check_writable(output)
    packages, train_packages = read_corpus(corpus, split), read_corpus(corpus, "train")
    embedder = Embedder.load(model, dtype=dtype, revision=revision)
    scores = evaluate(
        embedder,
        untrained(embedder),
        packages,
        train_packages,
        every_adapter=every_adapter,
        batch_size=batch_size,
        max_length=max_length,
        progress=sys.stderr.isatty(),
    )
    if output is not None:
        report.write(output, scores)
    click.echo(report.markdown(scores))


if __name__ == "__main__":
    main(prog_name="python -m train.evaluate")

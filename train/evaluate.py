"""Measures a model, on the corpus beside BM25 and an untrained model, or on tasks of MTEB.

Base and adapters are measured on the corpus, at each Matryoshka dimension.

python -m train.evaluate MODEL --corpus data/debian_packages.jsonl.xz --split test --json test.json
python -m train.evaluate MODEL --mteb corpus --out runs/mteb
python -m train.evaluate MODEL --mteb Tatoeba "MTEB(eng, v2)" --mteb-data DIR --out runs/mteb
"""

import sys
from pathlib import Path
from typing import Any, get_args

import click

from jina_jax import Embedder
from jina_jax.command import Command, max_length_option, model_options
from jina_jax.mteb import Precision

from .data.corpus import BUNDLED, read_corpus
from .evaluation import report
from .evaluation.evaluate import evaluate, untrained
from .mteb import evaluate as mteb

ONLY_CORPUS = {"json": "output", "every-adapter": "every_adapter"}
ONLY_MTEB = {"mteb-data": "data", "out": "out", "dim": "dims", "precision": "precisions", "symmetric-retrieval": "symmetric"}


@click.command(cls=Command)
@click.argument("model")
@click.argument("more", nargs=-1, metavar="[TASK_OR_BENCHMARK]...")
@model_options
@max_length_option
@click.option("--corpus", type=click.Path(path_type=Path), help="JSON lines as in data/README.md, plain or .xz.")
@click.option("--split", help="train, validation or test; classifiers are fitted on train.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="OUT.json; OUT.md and OUT.png are written beside it.")
@click.option("--every-adapter", is_flag=True, help="Also measure adapters on the tasks that they were not trained for.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="In texts; bounds memory.")
@click.option("--mteb", "names", multiple=True, metavar="TASK_OR_BENCHMARK...", help="Of MTEB; `corpus`: the bundled corpus.")
@click.option(
    "--mteb-data",
    "data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of each task with its data; default: the hub's.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Directory of MTEB's results and of table.{md,json,png}.")
@click.option("--dim", "dims", type=int, multiple=True, help="Leading dimensions to keep; may be repeated.")
@click.option("--precision", "precisions", type=click.Choice(get_args(Precision)), multiple=True, help="May be repeated.")
@click.option("--symmetric-retrieval", "symmetric", is_flag=True, help="ArguAna, Quora, CQADupstack: both sides alike.")
@click.pass_context
def main(context: click.Context, model: str, more: tuple[str, ...], names: tuple[str, ...], **options: Any) -> None:
    """Measure MODEL (directory or hub id, in any layout) on retrieval, classification, clustering
    and similarity of the corpus, or with --mteb on tasks of MTEB.

    A model with prompts for queries and documents has them: the base that of queries on both sides
    of all but retrieval, an adapter its task's instruction.
    """
    wrong = ONLY_CORPUS if names else ONLY_MTEB
    given = [name for name, field in wrong.items() if context.get_parameter_source(field).name != "DEFAULT"]  # type: ignore[union-attr]
    if given:
        raise click.UsageError(f"--{given[0]} {'cannot stand beside' if names else 'needs'} --mteb")
    if more and not names:
        raise click.UsageError(f"what is {more[0]!r}? Tasks of MTEB are named behind --mteb")
    if names:
        _mteb(model, [*names, *more], **options)
    else:
        _corpus(model, **options)


def _corpus(
    model: str,
    corpus: Path | None,
    split: str | None,
    output: Path | None,
    every_adapter: bool,
    batch_size: int,
    dtype: str | None,
    revision: str | None,
    max_length: int | None,
    **_: Any,
) -> None:
    if corpus is None or split is None:
        raise click.UsageError("either --corpus and --split, or --mteb, is needed")
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


def _mteb(
    model: str,
    names: list[str],
    corpus: Path | None,
    split: str | None,
    data: Path | None,
    out: Path | None,
    dims: tuple[int, ...],
    precisions: tuple[Precision, ...],
    symmetric: bool,
    batch_size: int,
    dtype: str | None,
    revision: str | None,
    max_length: int | None,
    **_: Any,
) -> None:
    if out is None:
        raise click.UsageError("--mteb needs --out DIR, where the results are written")
    if (corpus or split) and mteb.CORPUS not in names:
        raise click.UsageError("--corpus and --split are of `--mteb corpus`")
    selections = mteb.prepare(names, data, corpus or BUNDLED, split or "test")
    embedder = Embedder.load(model, dtype=dtype, revision=revision)
    board = mteb.evaluate(
        embedder,
        mteb.model_name(model, embedder),
        selections,
        out,
        dims=dims,
        precisions=precisions,
        options=mteb.Options(symmetric, max_length, batch_size),
        say=lambda line: click.echo(line, err=True),
    )
    click.echo(mteb.markdown(board))


if __name__ == "__main__":
    main(prog_name="python -m train.evaluate")

"""Trains a new adapter for your own task: labelled texts, or pairs of texts that belong together.

python -m train.adapter tickets.csv --text body --label queue --model MODEL --out runs/tickets
python -m train.adapter faq.jsonl --anchor question --positive answer --model MODEL --out runs/faq
"""

import logging
import sys
from pathlib import Path
from typing import Any

import click

from jina_jax.command import Command

from .own_task.columns import Columns
from .own_task.plan import Sizes
from .own_task.report import next_steps, score_lines
from .own_task.run import HELD_OUT, Request, run_task


@click.command(cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--text", help="Column of texts that have a label.")
@click.option("--label", help="Column of their labels.")
@click.option("--anchor", help="Column of queries, or of first texts of pairs.")
@click.option("--positive", help="Column of the texts that belong to them.")
@click.option("--negative", help="Column of texts that do not, though they look alike; in .jsonl and .parquet also lists.")
@click.option("--model", required=True, help="The base: directory or hub id, in any supported layout.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new directory; an interrupted run resumes.")
@click.option("--name", help="Of the adapter; of pairs what both begin with.  [default: classification, retrieval]")
@click.option("--test", type=click.Path(path_type=Path), help="File with the same columns to measure on.")
@click.option(
    "--held-out",
    type=float,
    help=f"Share of FILE to measure on, without --test.  [default: {HELD_OUT}]",
)
@click.option("--steps", type=click.IntRange(1, 10**7), help="Default: by the number of records; more of them continue a run.")
@click.option("--batch-size", type=click.IntRange(2), help="Records of a step.  [default: 96, or all where there are fewer]")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True, help="Of the adapter.")
@click.option("--max-length", type=int, help="Tokens of a text to train on.  [default: what 99 % of them have, at most 512]")
@click.option("--learning-rate", type=float, help="Its peak.  [default: by the width of the base]")
@click.option("--dims", help="Dimensions to train, such as 64,128,384.  [default: those of the base, or all]")
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of the split, the adapter and all draws."
)
def main(
    file: Path,
    text: str | None,
    label: str | None,
    anchor: str | None,
    positive: str | None,
    negative: str | None,
    model: str,
    out: Path,
    name: str | None,
    test: Path | None,
    held_out: float | None,
    dims: str | None,
    **sizes: Any,
) -> None:
    """Train an adapter on FILE above a base, and measure both on texts that were held out.

    FILE is .csv, .tsv or .jsonl, also as .gz or .xz, or .parquet. Name its columns: --text and
    --label for one adapter that tells the labels apart, or --anchor and --positive for two, of
    queries and of passages. The base stays as it is; OUT/model holds it with the new adapters.
    """
    # Force: libraries have set the root logger up when they were imported.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("train.own_task").setLevel(logging.INFO)
    if test is not None and held_out is not None:
        raise ValueError("--test and --held-out exclude each other: one names the texts to measure on, the other draws them")
    columns = Columns(text, label, anchor, positive, negative)
    wanted = Request(
        file, columns, model, name, test, HELD_OUT if held_out is None else held_out, Sizes(dims=_dims(dims), **sizes)
    )
    report = run_task(wanted, out, progress=sys.stderr.isatty())
    if report is None:
        sys.exit("stopped; the same command resumes")
    for line in (*score_lines(report["before"], report["after"]), "", *next_steps(out / "model", report["adapters"])):
        click.echo(line)


def _dims(given: str | None) -> tuple[int, ...]:
    """Parses the dimensions of a command line."""
    try:
        return tuple(sorted({int(dim) for dim in (given or "").split(",") if dim.strip()}))
    except ValueError as error:
        raise ValueError(f"--dims are integers such as 64,128,384, not {given!r}") from error


if __name__ == "__main__":
    main(prog_name="python -m train.adapter")

"""Scores of multilingual-e5-small on tasks of MTEB, beside those that MTEB publishes of it.

    jina-jax demo-model runs/e5-small
    JINA_JAX_MTEB_DATA=RAW python -m benchmarks.published_scores runs/e5-small \
        --out runs/published --sentence-transformers --json benchmarks/results/published_scores.json

RAW has the raw files that `benchmarks.mteb_layout` lays out. The packaged weights are the published
ones in 4 bits: a score may differ by a point, and by more in some languages (`COSTLY`). With
--sentence-transformers the same weights are measured there, too. Results are kept in OUT, and a run
that is stopped goes on from there.
"""

import json
from collections.abc import Callable, Collection, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from jina_jax import Embedder
from jina_jax.command import Command
from train.mteb.layout import read_data
from train.mteb.names import Task, select
from train.mteb.run import ModelName, Variant, model_name, run
from train.mteb.statistics import check_statistics
from train.mteb.systems import Cell, published_cell

from .machine import machine, versions
from .mteb_layout import lay_out

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "mteb")
DATA = "JINA_JAX_MTEB_DATA"
SYSTEM = "multilingual-e5-small"
MARGIN = 1.0
"""How many points a score may lie below the published one."""

PEER_MARGIN = 0.1
"""How many points a score may differ from that of sentence-transformers."""

TASKS: dict[str, Collection[str]] = {
    "STSBenchmarkMultilingualSTS": ("test",),
    "STS16": ("test",),
    "Banking77Classification": ("test",),
    "Tatoeba": ("test",),
    "XQuADRetrieval": ("validation",),
    "LEMBQMSumRetrieval": ("test",),
}
"""Splits of each task that are run."""

DIFFERENT = {"STS16"}
"""Tasks whose raw files lack three of 154,802 characters, and are measured nonetheless."""

COSTLY = {"ara-eng", "cmn-eng", "hin-eng", "jpn-eng", "kor-eng", "spa-eng", "swh-eng", "tel-eng"}
"""Languages in which the packaged weights are more than a point below, of those measured."""

Encode = Callable[..., np.ndarray]


class Row(NamedTuple):
    """One score, times 100."""

    task: str
    split: str
    subset: str
    score: float
    published: float | None
    """None = not published of this language."""
    sentence_transformers: float | None = None

    @property
    def costly(self) -> bool:
        return self.subset in COSTLY


def prepare(raw: Path, layout: Path, names: Sequence[str], subsets: Collection[str] = ()) -> list[Task]:
    """Returns tasks with their data, in all languages of the raw files, or in `subsets` alone."""
    lay_out(raw, layout)
    tasks = [select(name).tasks[0] for name in names]
    for task in tasks:
        read_data(layout, task)
        task.filter_eval_splits([split for split in task.eval_splits if split in TASKS[task.metadata.name]])
        task.hf_subsets = [subset for subset in task.hf_subsets if not subsets or subset in subsets]
        if task.metadata.name not in DIFFERENT:
            check_statistics(task)
    return tasks


def score(embedder: Embedder, name: ModelName, tasks: Sequence[Task], out: Path, encode: Encode | None = None) -> list[Row]:
    """Scores a model on tasks, each cell beside the published score."""
    forms = [Variant(None, "float32")]
    _, (system,) = run(embedder, name, tasks, forms, out, encode=encode, say=lambda line: click.echo(line, err=True))
    return [
        Row(task, *cell, round(value, 2), published_cell(SYSTEM, task, Cell(*cell)))
        for task, scores in system.scores.items()
        for cell, value in scores.by_cell.items()
    ]


def below(rows: Sequence[Row]) -> list[Row]:
    """Rows that lie too far below the published score, or from sentence-transformers'."""
    return [
        row
        for row in rows
        if (row.published is not None and not row.costly and row.score < row.published - MARGIN)
        or (row.sentence_transformers is not None and abs(row.score - row.sentence_transformers) > PEER_MARGIN)
    ]


def sentence_transformers(model: str) -> Encode:
    """Returns the same model's `encode` in sentence-transformers, in float32."""
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(model, device="cpu")

    def encode(texts: Sequence[str], *, prompt_name: str, batch_size: int, **_: Any) -> np.ndarray:
        return peer.encode(list(texts), prompt_name=prompt_name, batch_size=batch_size, normalize_embeddings=True)

    return encode


def markdown(rows: Sequence[Row]) -> str:
    lines = ["| task | score | sentence-transformers | published |", "|---|---:|---:|---:|"]
    for row in rows:
        label = row.task if row.subset == "default" else f"{row.task}, {row.subset}"
        peer, known = ("" if each is None else f"{each:.2f}" for each in (row.sentence_transformers, row.published))
        lines.append(f"| {label}{' *' if row.costly else ''} | {row.score:.2f} | {peer} | {known} |")
    return "\n".join(lines) + "\n"


@click.command(cls=Command)
@click.argument("model")
@click.option("--data", type=click.Path(path_type=Path, exists=True), envvar=DATA, required=True, help=f"Default: ${DATA}.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the results and of laid out data.")
@click.option("--task", "names", type=click.Choice([*TASKS]), multiple=True, help="Default: all.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--sentence-transformers", "peer", is_flag=True, help="Also score the same weights there.")
@click.option("--peer-subset", "subsets", multiple=True, help="Languages that are scored there; default: all.")
@click.option("--json", "output", type=click.Path(path_type=Path))
def main(
    model: str,
    data: Path,
    out: Path,
    names: Sequence[str],
    dtype: str,
    peer: bool,
    subsets: Sequence[str],
    output: Path | None,
) -> None:
    """Score MODEL, print a table, and exit with 1 if a score is too far from another."""
    names, embedder = names or [*TASKS], Embedder.load(model, dtype=dtype)
    own = model_name(model, embedder)
    rows = score(embedder, own, prepare(data, out / "data", names), out / "jina-jax")
    if peer:
        other = ModelName(f"sentence-transformers/{own.name.split('/')[1]}", own.revision)
        encode = sentence_transformers(model)
        tasks = [task for task in prepare(data, out / "data", names, subsets) if task.hf_subsets]
        theirs = score(embedder, other, tasks, out / "sentence-transformers", encode)
        found = {row[:3]: row.score for row in theirs}
        rows = [row._replace(sentence_transformers=found.get(row[:3])) for row in rows]
    click.echo(markdown(rows))
    if output:
        packages = (*PACKAGES, "sentence-transformers", "torch") if peer else PACKAGES
        report = {"machine": machine(), "date": str(date.today()), "dtype": dtype, "versions": versions(packages)}
        listed = [row._asdict() | {"costly": row.costly} for row in rows]
        output.write_text(json.dumps(report | {"rows": listed}, indent=1) + "\n")
    raise SystemExit(bool(below(rows)))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.published_scores")

"""Scores of a model on tasks of MTEB, and their table."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from jina_jax import Embedder
from jina_jax.mteb import Precision

from ..data.corpus import read_corpus
from . import table
from .corpus_tasks import corpus_tasks
from .names import CORPUS, Selection, select, unique
from .run import DEFAULT_OPTIONS, ModelName, Options, load_data, model_name, run, variants
from .systems import published
from .table import Leaderboard, markdown

__all__ = ["CORPUS", "Leaderboard", "Options", "Prepared", "evaluate", "markdown", "model_name", "prepare"]


class Prepared(NamedTuple):
    """Tasks that are ready to be run."""

    selections: list[Selection]
    asked: dict[str, int]
    """Tasks of each selection, before those without data were left out."""


def prepare(names: Sequence[str], data: Path | None, corpus: Path, split: str) -> Prepared:
    """Returns the tasks of the names, those of files with their data, checked.

    Args:
        names: of tasks and benchmarks of MTEB, and `corpus`.
        data: folder of each task with its data; None = each task fetches its own from the hub.
        corpus, split: what `corpus` is made of.

    Raises:
        ValueError: an unknown name, a task with other inputs than text, or data that differ from
            mteb's.
        FileNotFoundError: no data of a task that is named.
    """
    names = list(dict.fromkeys(names))
    selections = [select(name) for name in names if name != CORPUS]
    asked = {selection.name: len(selection.tasks) for selection in selections}
    if data is not None:
        selections = load_data(selections, data)
    if CORPUS in names:
        tasks = corpus_tasks(read_corpus(corpus, split), read_corpus(corpus, "train"))
        selections.append(Selection(f"{corpus.name} ({split})", tasks, True))
        asked[selections[-1].name] = len(tasks)
    return Prepared(selections, asked)


def evaluate(
    embedder: Embedder,
    model: ModelName,
    prepared: Prepared,
    out: Path,
    *,
    dims: Sequence[int] = (),
    precisions: Sequence[Precision] = (),
    options: Options = DEFAULT_OPTIONS,
    say: Callable[[str], None] = lambda _: None,
) -> Leaderboard:
    """Runs the tasks, and writes mteb's results and the table into a directory.

    Args:
        embedder, model: the model, and what results are filed under.
        prepared: tasks, from `prepare`.
        out: directory; what it holds of this model is not run again.
        dims, precisions: each dimension is measured in each precision; none = all dimensions,
            float32.
        options: how texts are embedded.
        say: called with a line for each result.
    """
    forms = variants(dims, precisions, embedder)
    table.check_writable(out)
    runs, own = run(embedder, model, unique(prepared.selections), forms, out, options, say=say)
    board = Leaderboard(prepared.selections, prepared.asked, runs, own, published(runs))
    table.write(out, board)
    return board

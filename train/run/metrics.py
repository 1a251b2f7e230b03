"""Metrics of a run: fetched from the devices, checked, averaged, and written.

They are written as JSON lines and to TensorBoard.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tensorboardX import SummaryWriter

from jina_jax.errors import RunError
from jina_jax.files import atomic_write
from jina_jax.parallel.processes import is_main_process
from jina_jax.storage import BucketPath, StoragePath, is_bucket

from ..config import Stage
from ..old_names import METRICS
from ..step.optimizer import learning_rate
from ..step.update import Metrics

FILE = "metrics.jsonl"

PARTS = "metrics"
"""Directory in a bucket of the lines that are not in FILE yet."""


class TrainingDiverged(RunError):
    """Error of a run whose loss, gradient or parameters are not finite."""


class StepRecord(NamedTuple):
    """A dispatched step; its metrics are on the device and may not be computed yet."""

    step: int
    """Number of the step in the run, from 1."""
    stage: Stage
    own_step: int
    """Number of the step in its stage, from 1."""
    metrics: Metrics
    slots: int
    """Token slots of the batch, padding included."""
    flops_per_token: float


def fetch_metrics(steps: Sequence[StepRecord]) -> list[StepRecord]:
    """Waits for the steps' metrics; returns the steps with metrics as numbers on the host.

    Raises:
        TrainingDiverged: a metric is not finite; the message names the step.
    """
    there = [step._replace(metrics=jax.device_get(step.metrics)) for step in steps]
    for done in there:
        if not all(map(np.isfinite, done.metrics)):
            raise TrainingDiverged(
                f"step {done.step} (stage {done.stage.name}, its step {done.own_step}): loss {done.metrics.loss}, norm of the "
                f"gradient {done.metrics.grad_norm}. Nothing of it was saved; a lower learning rate may help"
            )
    return there


def summarise(steps: Sequence[StepRecord], seconds: float, peak: float | None) -> Iterator[tuple[int, str, dict[str, float]]]:
    """Yields (step, stage, numbers) for each stage of some steps: means, and speed over all.

    Args:
        steps: from `fetch_metrics`.
        seconds: time that they took together.
        peak: peak FLOP/s of all devices; None if it is not known, which leaves `mfu` out.
    """
    tokens = sum(int(step.metrics.tokens) for step in steps)
    speed = {
        "steps_per_second": len(steps) / seconds,
        "tokens_per_second": tokens / seconds,
        "padding_fraction": 1 - tokens / sum(step.slots for step in steps),
    }
    if peak is not None:
        flops = sum(int(step.metrics.tokens) * step.flops_per_token for step in steps)
        speed["mfu"] = flops / seconds / peak
    for stage in dict.fromkeys(step.stage for step in steps):
        own = [step for step in steps if step.stage is stage]
        numbers = {
            "loss": math.fsum(float(step.metrics.loss) for step in own) / len(own),
            "grad_norm": math.fsum(float(step.metrics.grad_norm) for step in own) / len(own),
            "learning_rate": float(np.asarray(learning_rate(stage)(own[-1].own_step - 1))),
        }
        yield own[-1].step, stage.name, numbers | speed


class MetricsWriter:
    """Appends to `metrics.jsonl`, one object per line, and to TensorBoard's event files.

    A run that resumes from a step drops the lines of later steps: they are written again. Only the
    main process writes.
    """

    def __init__(self, workdir: Path, step: int):
        self._board = None
        if not is_main_process():
            return
        self._path = workdir / FILE
        kept = [line for line in read_metrics(workdir) if line["step"] <= step]
        with atomic_write(self._path) as partial:
            partial.write_text("".join(map(_line, kept)), "utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, stage: str, numbers: dict[str, float]) -> None:
        if self._board is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line({"step": step, "stage": stage} | numbers))
        add_scalars(self._board, step, stage, numbers)

    def publish(self, step: int, *, saved: bool) -> None:
        """Does nothing: what is written is there."""

    def wait(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


class BucketMetricsWriter:
    """The same in a bucket, where nothing can be appended to.

    Lines are uploaded in the background at every log, as metrics/STEP.jsonl; at a save they are
    joined in `metrics.jsonl`. TensorBoard's events are kept in a local file until a save, which
    uploads it; the next one begins another.
    """

    def __init__(self, workdir: BucketPath, step: int):
        self._workdir, self._board, self._uploads = workdir, None, None
        if not is_main_process():
            return
        self._lines = [line for line in read_metrics(workdir) if line["step"] <= step]
        self._fresh: list[dict] = []
        self._local = tempfile.TemporaryDirectory(prefix="jina-jax-")
        self._pool = ThreadPoolExecutor(1, "metrics")
        self._purge = step + 1 if step else None
        self._join_lines(self._lines)

    def write(self, step: int, stage: str, numbers: dict[str, float]) -> None:
        if not is_main_process():
            return
        if self._board is None:
            self._board = SummaryWriter(self._local.name, purge_step=self._purge, filename_suffix=f".{step:08d}")
            self._purge = None
        self._fresh.append({"step": step, "stage": stage} | numbers)
        add_scalars(self._board, step, stage, numbers)

    def publish(self, step: int, *, saved: bool) -> None:
        """Uploads what was written since the last call, in the background.

        Raises:
            OSError: the last upload failed.
        """
        if not is_main_process():
            return
        self.wait()
        fresh, self._fresh = self._fresh, []
        self._lines += fresh
        if saved:
            if self._board is not None:
                self._board.close()
                self._board = None
            self._uploads = self._pool.submit(self._save, list(self._lines))
        else:
            part = self._workdir / PARTS / f"{step:08d}.jsonl"
            self._uploads = self._pool.submit(part.write_text, "".join(map(_line, fresh)))

    def close(self) -> None:
        """Waits for uploads under way; what was not published is not kept."""
        if not is_main_process():
            return
        self._pool.shutdown()
        if self._board is not None:
            self._board.close()
        self._local.cleanup()

    def wait(self) -> None:
        """Waits until what was published is in the bucket.

        Raises:
            OSError: the upload failed.
        """
        if self._uploads is not None:
            uploads, self._uploads = self._uploads, None
            uploads.result()

    def _save(self, lines: list[dict]) -> None:
        for file in Path(self._local.name).iterdir():
            events = self._workdir / "tensorboard" / file.name
            events.store.upload(events.key, file)
            file.unlink()
        self._join_lines(lines)

    def _join_lines(self, lines: list[dict]) -> None:
        (self._workdir / FILE).write_text("".join(map(_line, lines)))
        (self._workdir / PARTS).rmtree()


def metrics_writer(workdir: StoragePath, step: int) -> MetricsWriter | BucketMetricsWriter:
    """Returns a writer of the metrics of a run that begins behind a step."""
    return BucketMetricsWriter(workdir, step) if is_bucket(workdir) else MetricsWriter(workdir, step)


def add_scalars(board: SummaryWriter, step: int, stage: str, numbers: dict[str, float]) -> None:
    for name, number in numbers.items():
        board.add_scalar(f"{stage}/{name}", number, step)


def _line(fields: dict) -> str:
    return json.dumps(fields) + "\n"


def read_metrics(workdir: StoragePath) -> list[dict]:
    """Reads the lines of a run's metrics, with the new names of old fields.

    A last line that was cut off is left out.
    """
    path = workdir / FILE
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    read = [json.loads(line) for line in lines if line.endswith("\n")]
    if is_bucket(workdir):
        joined = max((line["step"] for line in read), default=0)
        parts = [json.loads(line) for part in (workdir / PARTS).iterdir() for line in part.read_text().splitlines()]
        read += [line for line in parts if line["step"] > joined]
    return [{METRICS.get(name, name): value for name, value in line.items()} for line in read]

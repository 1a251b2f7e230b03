"""Metrics of a run: fetched from the devices, checked, averaged, and written.

They are written as JSON lines and to TensorBoard.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tensorboardX import SummaryWriter

from jina_jax.errors import RunError
from jina_jax.files import atomic_write
from jina_jax.parallel.processes import is_main_process

from ..config import Stage
from ..old_names import METRICS
from ..step.optimizer import learning_rate
from ..step.update import Metrics

FILE = "metrics.jsonl"


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
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, stage: str, numbers: dict[str, float]) -> None:
        if self._board is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "stage": stage} | numbers) + "\n")
        for name, number in numbers.items():
            self._board.add_scalar(f"{stage}/{name}", number, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_metrics(workdir: Path) -> list[dict]:
    """Reads the lines of a run's metrics, with the new names of old fields.

    A last line that was cut off is left out.
    """
    path = workdir / FILE
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    read = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{METRICS.get(name, name): value for name, value in line.items()} for line in read]

"""A trace of some steps of a run, by JAX's profiler, for XProf."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jina_jax.parallel.processes import is_main_process
from jina_jax.storage import StoragePath, is_bucket
from jina_jax.storage.upload import local_files, upload

logger = logging.getLogger(__name__)


class StepRange(NamedTuple):
    """Steps of a run, counted from 1, both ends included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}:{self.last}"


def parse_steps(text: str) -> StepRange:
    """Parses a range of steps such as "100:104".

    Raises:
        ValueError: it is no range, or empty, or begins before step 1.
    """
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(f"steps are FIRST:LAST, both included and counted from 1, such as 100:104, not {text!r}")
    return StepRange(int(first), int(last))


class StepTrace:
    """Records a range of steps in the main process.

    Steps that were done before, in a run that resumes, are left out. In a bucket the record arrives
    once it is whole.
    """

    def __init__(self, directory: StoragePath, steps: StepRange | None, done: int):
        self._directory = directory
        self._local: tempfile.TemporaryDirectory | None = None
        self._first = self._last = 0
        self._recording = False
        if steps is None or not is_main_process():
            return
        if done >= steps.last:
            logger.warning("steps %s were done before this start; nothing is profiled", steps)
            return
        self._first, self._last = max(steps.first, done + 1), steps.last

    @contextlib.contextmanager
    def step(self, number: int, states: Any) -> Iterator[None]:
        """Marks a step, and starts or ends the record around it.

        Args:
            number: of the step in the run, from 1.
            states: arrays of the run, which are waited for where the record starts and ends; a
                container that the step puts its results into.
        """
        if number == self._first:
            jax.block_until_ready(states)
            if is_bucket(self._directory):
                self._local = tempfile.TemporaryDirectory(prefix="jina-jax-")
            jax.profiler.start_trace(self._local.name if self._local else str(self._directory))
            self._recording = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number == self._last:
            jax.block_until_ready(states)
            self.close()

    def close(self) -> None:
        """Writes the record, if there is one: of fewer steps where the run stops earlier."""
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()
            if self._local is not None and is_bucket(self._directory):
                with self._local:
                    upload(Path(self._local.name), self._directory, local_files(Path(self._local.name)))
            logger.warning("profile: %s", self._directory)

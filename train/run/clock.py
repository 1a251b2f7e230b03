"""Seconds of a program's parts, and how many of them were compiling, over all its interruptions."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from jina_jax.files import read_json_or_empty, write_json

COMPILING = "/jax/core/compile/backend_compile_duration"


class Spent(NamedTuple):
    """Seconds of a part, by the clock."""

    seconds: float = 0.0
    compiling: float = 0.0
    """Those in which XLA compiled, or read what it had compiled before."""


class Clock:
    """Measures parts by name, and keeps what it measured in a file.

    A part that is interrupted and begun again counts both times; what a killed process spent on the
    part that it was in is lost.
    """

    def __init__(self, file: Path):
        self._file = file

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a part."""
        compiled: list[float] = []

        def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
            if event == COMPILING:
                compiled.append(duration_secs)

        began = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
            seconds, compiling = self.spent().get(name, Spent())
            both = Spent(seconds + time.perf_counter() - began, compiling + sum(compiled))
            write_json(self._file, {part: spent._asdict() for part, spent in (self.spent() | {name: both}).items()})

    def spent(self) -> dict[str, Spent]:
        """Returns the time of each part so far, in the order in which they were begun."""
        return {name: Spent(**fields) for name, fields in read_json_or_empty(self._file).items()}

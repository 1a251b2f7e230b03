"""Presets that name a directory for all that they read and write, run in another directory."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..config import TrainConfig, load_config


def load_moved(preset: str, home: str, workdir: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Loads a preset with `workdir` in place of its own directory.

    Args:
        preset: FILE.py or FILE.py:FUNCTION, as for `load_config`.
        home: directory that the preset names, such as runs/quickstart.
        workdir: takes its place in the paths of the start model and the datasets.
        overrides: further ones, as for `--set`.
    """
    moved = list(_moved_paths(load_config(preset), home, workdir))
    return load_config(preset, [*moved, *overrides])


def _moved_paths(config: TrainConfig, home: str, workdir: Path) -> Iterator[str]:
    paths = {"start.source": config.start.source}
    for i, stage in enumerate(config.stages):
        paths |= {f"stages.{i}.datasets.{j}.path": dataset.path for j, dataset in enumerate(stage.datasets)}
    for field, path in paths.items():
        if path and path.startswith(f"{home}/"):
            yield f"{field}={str(workdir / path.removeprefix(f'{home}/'))!r}"

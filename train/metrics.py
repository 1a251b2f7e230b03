"""Where a run's numbers go: JSON lines and TensorBoard."""

import json
from pathlib import Path

from tensorboardX import SummaryWriter

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to `metrics.jsonl`, one object a line, and to TensorBoard's event files.

    A run that resumes at a step drops the lines behind it: they are written again.
    """

    def __init__(self, workdir: Path, step: int):
        self._path = workdir / FILE
        _keep_until(self._path, step)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, stage: str, numbers: dict[str, float]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "stage": stage} | numbers) + "\n")
        for name, number in numbers.items():
            self._board.add_scalar(f"{stage}/{name}", number, step)

    def close(self) -> None:
        self._board.close()


def read_metrics(workdir: Path) -> list[dict]:
    """The lines of a run's metrics; a last line that was cut off is left out."""
    path = workdir / FILE
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _keep_until(path: Path, step: int) -> None:
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")

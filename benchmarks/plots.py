"""Plots of the results in benchmarks/results/, for the docs: docs/images/*.svg.

    python -m benchmarks.plots

Measures nothing. Needs matplotlib: pip install -e '.[train]'
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import matplotlib
from matplotlib.figure import Figure

from jina_jax.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"

PEER, OURS = "sentence-transformers", "jina-jax"
KINDS = {"matmul": "matrix products", "kernels": "attention kernel", "others": "everything else"}
PROGRAMS = {
    "naive port 16 x 512": "naive port",
    "forward 16 x 512": "jina-jax",
    "forward 16 x 512, an adapter folded": "one adapter",
    "forward 16 x 512, mixed adapters": "mixed adapters",
}
CHIPS = {"v5e:2x2": "v5e", "v6e:2x2": "v6e", "v5p:2x2x1": "v5p", "tpu7x:2x2x1": "7x"}


class Bar(NamedTuple):
    label: str
    ours: float
    peer: float
    """Work per second of the peer; `ours` is in the same unit."""


@click.command()
@click.option("--results", type=click.Path(path_type=Path, exists=True, file_okay=False), default=RESULTS)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=IMAGES)
def main(results: Path, out: Path) -> None:
    """Draw every plot from the JSON files of --results."""
    out.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[Path], Figure]] = {"tpu_estimate.svg": tpu_estimate, "cpu.svg": cpu}
    for name, plot in plots.items():
        # The fixed salt, and no date, give the same bytes at each run.
        with matplotlib.rc_context({"svg.hashsalt": name}), atomic_write(out / name) as target:
            plot(results).savefig(target, format="svg", metadata={"Date": None})
        click.echo(out / name)


def tpu_estimate(results: Path) -> Figure:
    """Estimated cycles of a forward pass by kind of work, with one panel for each chip."""
    found = _read(results / "tpu_estimate.json")["results"]
    of = {(each["topology"], each["program"]): each["mcycles_by_kind"] for each in found}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(CHIPS))
    for panel, (topology, chip) in zip(panels, CHIPS.items(), strict=True):
        bottoms = [0.0] * len(PROGRAMS)
        for kind, label in KINDS.items():
            heights = [_share(of[topology, program], kind) for program in PROGRAMS]
            panel.bar(list(PROGRAMS.values()), heights, bottom=bottoms, label=label)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        panel.set(title=chip)
        panel.tick_params(axis="x", rotation=60)
    panels[0].set_ylabel("million cycles, estimated")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(KINDS))
    return figure


def cpu(results: Path) -> Figure:
    """Speed on CPU relative to sentence-transformers in the same run.

    Each kind of work and dtype has one bar.
    """
    bars = cpu_bars(results)
    figure = Figure(figsize=(7, 0.45 * len(bars) + 1), layout="constrained")
    panel = figure.subplots()
    drawn = panel.barh([bar.label for bar in bars], [bar.ours / bar.peer for bar in bars])
    panel.bar_label(drawn, fmt="%.2f", label_type="center", color="white")
    panel.axvline(1, color="black", linewidth=1)
    panel.invert_yaxis()
    panel.set(xlabel=f"speed on two CPU cores; {PEER} = 1")
    panel.margins(x=0.1)
    return figure


def cpu_bars(results: Path) -> list[Bar]:
    """Work per second of both systems, for each kind of work and dtype."""
    work: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
        "512 descriptions": ("cpu_inference.json", lambda row: row["tokens_per_s"]),
        "one query": ("cpu_inference.json", lambda row: 1 / row["query_s"]),
        "a text of 8,192 tokens": ("cpu_long_text.json", lambda row: row["tokens"] / row["seconds"]),
        "training on pairs": ("cpu_training.json", lambda row: row["steps_per_second"]),
    }
    bars = []
    for label, (file, speed) in work.items():
        rows = {(row["system"], row["dtype"]): row for row in _read(results / file)["results"]}
        for dtype in ("float32", "bfloat16"):
            bars.append(Bar(f"{label}, {dtype}", speed(rows[OURS, dtype]), speed(rows[PEER, dtype])))
    return bars


def _share(cycles: dict[str, float], kind: str) -> float:
    """Cycles of one of KINDS; "others" is the sum of all kinds without a name there."""
    if kind == "others":
        return sum(value for name, value in cycles.items() if name not in KINDS)
    return cycles.get(kind, 0.0)


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise click.ClickException(f"there is no {file}; its benchmark writes it")
    return json.loads(file.read_text("utf-8"))


if __name__ == "__main__":
    main()

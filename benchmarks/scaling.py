"""The TPU compiler's estimates for every configuration of the paper on four slices.

    python -m benchmarks.scaling                     # every program without a result yet: a minute
                                                     # or more for each
    python -m benchmarks.scaling pairs_short@v5e-16  # this program once more
    python -m benchmarks.scaling --table             # compile nothing, write the tables

Writes the tables of docs/scaling.md. Each program is compiled ahead of time by
`python -m train.compile`, in a separate process; no TPU is needed. Results are saved after each
program. Needs: pip install -e '.[train,tpu]'
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import click

from jina_jax.files import dump_json
from train.config import load_config

from .machine import machine, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
DOCUMENT = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- tables of benchmarks/scaling.py -->", "<!-- end of tables -->"
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")

STAGES = ("mlm_short", "mlm_long", "pairs_short", "pairs_long", "retrieval", "text_matching", "classification", "separation")
"""Configurations in the order of the recipe.

configs/adapters.py runs the programs of the last four.
"""

SLICES = {"v5e-16": "v5e:4x4", "v5e-256": "v5e:16x16", "v5p-128": "v5p:4x4x4", "v6e-256": "v6e:16x16"}

SMALLER = {"mlm_long": "8x8", "retrieval": "8x16"}
"""Sub-slices of 16 x 16 chips whose size divides the batch: of 64 texts, and of 128 tuples."""


class Row(NamedTuple):
    config: str
    slice: str
    settings: tuple[str, ...] = ()
    """Overrides of fields of the configuration, as PATH=VALUE."""

    @property
    def name(self) -> str:
        return f"{self.config}@{self.slice}" + "".join(f" {setting}" for setting in self.settings)

    @property
    def topology(self) -> str:
        topology = SLICES[self.slice]
        return topology.replace("16x16", SMALLER.get(self.config, "16x16"))


AT_ONCE = "stages.0.encode_chunk_rows=None"
"""Setting without gradient caching, for enough chips that each has memory for all its rows."""

FEW = Row("pairs_short", "v5e-16")
FEW_SHARE = Row("pairs_short", "v5e-16", (AT_ONCE, "stages.0.batch_size=1024"))
"""Batch of 64 pairs a chip, as in MANY."""
MANY = Row("pairs_short", "v5e-256", (AT_ONCE,))

ROWS = (
    *(Row(config, slice_) for slice_ in SLICES for config in STAGES),
    *(Row("pairs_short", slice_, (AT_ONCE,)) for slice_ in ("v5e-256", "v6e-256")),
    FEW_SHARE,
    Row("pairs_short", "v5e-16", ("mesh.fsdp=4",)),
    Row("pairs_short", "v5e-16", ("mesh.fsdp=16",)),
    Row("mlm_long", "v5e-16", ("mesh.fsdp=16", "stages.0.batch_size=16")),
)


@click.command()
@click.argument("names", nargs=-1)
@click.option("--table", is_flag=True, help="Compile nothing.")
def main(names: tuple[str, ...], table: bool) -> None:
    """Compile the programs NAMES, or all that have no result yet, and write the tables."""
    results: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"rows": {}}
    by_name = {row.name: row for row in ROWS}
    if unknown := [name for name in names if name not in by_name]:
        raise click.UsageError(f"there are no rows {unknown}; there are {list(by_name)}")
    for name in [] if table else names or [name for name in by_name if name not in results["rows"]]:
        results["rows"][name] = _compiled(by_name[name])
        results |= {"machine": machine(), "versions": versions(PACKAGES)}
        RESULTS.write_text(dump_json(results), "utf-8")
        click.echo(f"{name}: {results['rows'][name]['programs']}", err=True)
    _write_tables(tables(results["rows"]))


def tables(rows: dict[str, Any]) -> str:
    """Markdown of the results.

    One table of programs, one of the recipe's hours, and lines on how steps scale.
    """
    lines = [
        "| program | slice | rows at once | HBM peak, GB | step, s | sending, s | tokens/s | MFU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        if found := rows.get(row.name):
            lines += [_line(row, program) for program in found["programs"]]
    hours = ["| configuration | steps | " + " | ".join(SLICES) + " |", "|---|---|" + "---|" * len(SLICES)]
    columns = [[_hours(rows, config, slice_) for config in STAGES] for slice_ in SLICES]
    for config, *rows_by_config in zip(STAGES, *columns, strict=True):
        hours.append(f"| {config} | {_steps(config):,} | {_shown(rows_by_config)} |")
    hours.append(f"| all | | {_shown([None if None in column else sum(filter(None, column)) for column in columns])} |")
    return "\n".join([*lines, "", "Hours, at the estimated step time:", "", *hours, *_scaling(rows)])


def _compiled(row: Row) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.json"
        settings = [argument for setting in row.settings for argument in ("--set", setting)]
        command = [sys.executable, "-m", "train.compile", f"configs/{row.config}.py", "--topology", row.topology]
        done = subprocess.run([*command, *settings, "--json", str(out)], cwd=ROOT, capture_output=True, text=True)
        if not out.exists():
            raise click.ClickException(f"{row.name}: {done.stderr[-2000:]}")
        made = {"topology": row.topology, "date": str(date.today())}
        return made | json.loads(out.read_text("utf-8"))


def _line(row: Row, program: dict[str, Any]) -> str:
    name = program["name"] if not row.settings else f"{program['name']}, {', '.join(row.settings)}"
    if not program["fits"]:
        return f"| {name} | {row.topology} | does not fit: {program['reason']} | | | | | |"
    cells = [
        *(name, row.topology, str(program["encode_chunk_rows"] or "all")),
        f"{program['memory_bytes']['peak'] / 1e9:.1f}",
        f"{program['seconds']:.3f}",
        f"{program['communication_seconds']:.3f}",
        f"{program['tokens_per_second']:,.0f}",
        f"{program['mfu']:.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def _steps(config: str) -> int:
    return load_config(ROOT / "configs" / f"{config}.py").steps


def _hours(rows: dict[str, Any], config: str, slice_: str) -> float | None:
    """Hours of all steps, with gradient caching or without, whichever is faster.

    Kinds of records count the same. None where there is no result that fits.
    """
    found = [rows.get(row.name) for row in (Row(config, slice_), Row(config, slice_, (AT_ONCE,)))]
    means = [
        sum(program["seconds"] for program in row["programs"]) / len(row["programs"])
        for row in filter(None, found)
        if all(program["fits"] for program in row["programs"])
    ]
    return _steps(config) * min(means) / 3600 if means else None


def _shown(hours: Sequence[float | None]) -> str:
    return " | ".join("" if each is None else f"{each:,.1f}" for each in hours)


def _scaling(rows: dict[str, Any]) -> list[str]:
    """Lines on 16 and 256 chips: with 64 pairs on each chip, and with the paper's batch on both."""
    config_rows = (FEW, FEW_SHARE, MANY)
    fixed, weak, many = (rows.get(row.name, {"programs": [{}]})["programs"][0].get("seconds") for row in config_rows)
    return [
        line
        for pairs, seconds, share in (("64 pairs a chip", weak, 1), ("16,384 pairs", fixed, 16))
        if seconds and many
        for line in (
            "",
            f"{pairs}: {seconds:.3f} s on 16 chips, {many:.3f} s on 256; a chip is {seconds / share / many:.1%} as fast.",
        )
    ]


def _write_tables(text: str) -> None:
    before, _, rest = DOCUMENT.read_text("utf-8").partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()

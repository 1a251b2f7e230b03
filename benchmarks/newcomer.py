"""The newcomer's path: docs/first_steps.md typed as it stands there, from an empty environment.

    python -m benchmarks.newcomer --json benchmarks/results/newcomer.json

A clone of this checkout, a home directory without any cache, and one shell that runs the page's
blocks in order, but for two things that a person does: a server goes to the background, and what
asks it waits until it is ready. Seconds are those of a section; what pip takes depends on the
network and on the machine's mirror of packages.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import click

from jina_jax.command import Command
from tests.documentation.blocks import ROOT, Block, read_blocks

from .machine import machine, versions

PAGE = ROOT / "docs" / "first_steps.md"
PACKAGES = ("jax", "jaxlib", "flax", "transformers")
SECTION = "@@ section"
"""Begins the lines that tell when a section began."""


@click.command(cls=Command)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(out: Path | None) -> None:
    """Run the page, and print the seconds of each section.

    It fails where a block of the page fails.
    """
    with tempfile.TemporaryDirectory(prefix="newcomer-") as scratch:
        checkout = Path(scratch) / "jina-jax"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
        seconds = _run(_script(read_blocks(PAGE), checkout), checkout, _empty_environment(Path(scratch)))
    click.echo("| step | seconds |\n|---|---:|")
    for name, value in seconds.items():
        click.echo(f"| {name} | {value:.0f} |")
    if out:
        report = {"machine": machine(), "date": str(date.today()), "versions": versions(PACKAGES)}
        out.write_text(json.dumps(report | {"seconds": seconds}, indent=2) + "\n")


def _empty_environment(scratch: Path) -> dict[str, str]:
    """A home without caches, and this machine's own settings of pip alone."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name in ("PATH", "LANG")}
    (scratch / "home").mkdir()
    return kept | {"HOME": str(scratch / "home"), "PIP_NO_CACHE_DIR": "1", "PYTHONUNBUFFERED": "1"}


def _script(blocks: list[Block], checkout: Path) -> str:
    lines = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    section = None
    for number, block in enumerate(blocks):
        if (heading := _heading(block)) != section:
            section = heading
            lines.append(_mark(heading))
        lines.extend(_typed(block, checkout / f"block_{number}.py"))
    return "\n".join([*lines, _mark("end")])


def _mark(section: str) -> str:
    """Line that tells when a section began; an answer before it may end without a line break."""
    return f'printf "\\n{SECTION} %s {section}\\n" "$EPOCHREALTIME"'


def _heading(block: Block) -> str:
    before = block.page.read_text("utf-8").splitlines()[: block.line]
    return next(line.removeprefix("## ") for line in reversed(before) if line.startswith("## "))


def _typed(block: Block, file: Path) -> Iterator[str]:
    """Yields what a person types for a block: a Python block is a file of its own."""
    if block.language == "python":
        yield f"cat > {file} <<'PYTHON'\n{block.code}PYTHON"
        yield f"python {shlex.quote(str(file))}"
    elif block.code.startswith("jina-jax serve"):
        yield f"{block.code.rstrip()} &"
        yield "until curl --silent --fail localhost:8080/ready > /dev/null; do kill -0 $!; sleep 0.1; done"
    else:
        yield block.code


def _run(script: str, checkout: Path, environment: dict[str, str]) -> dict[str, float]:
    began: list[tuple[str, float]] = []
    command = ["bash", "-c", script]
    with subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        for line in shell.stdout:
            if line.startswith(SECTION):
                moment, _, name = line.removeprefix(SECTION).strip().partition(" ")
                began.append((name, float(moment)))
            click.echo(line, nl=False, err=True)
    if shell.returncode:
        sys.exit(f"{PAGE.relative_to(ROOT)} fails at {began[-1][0] if began else 'its beginning'!r}")
    return {name: round(end - begin, 1) for (name, begin), (_, end) in zip(began[:-1], began[1:], strict=True)}


if __name__ == "__main__":
    main()

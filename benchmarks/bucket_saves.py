"""Saving and restoring a training checkpoint, on a disk and in buckets of emulators.

    python -m benchmarks.bucket_saves --json benchmarks/results/bucket_saves.json

Parameters and two moments of multilingual-e5-small in float32, 1.4 GB, on one device. "Held" is how
long a step waits for `Saver.save`, "written" until the checkpoint is complete. Memory is the most
that the process has beyond the arrays themselves, before a save, or after a restore. The emulators
compute on the same cores and keep all in memory: what a real store takes depends on the network.
Each figure is of a process of its own.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import click

from jina_jax.command import Command
from jina_jax.storage import StoragePath, as_path

from .machine import machine, resident_bytes, versions

PACKAGES = ("jax", "jaxlib", "orbax-checkpoint", "google-cloud-storage", "boto3")
STORES = ("disk", "gs", "s3")
SHAPES = {
    "tokens/table": (250_037, 384),
    "positions/table": (512, 384),
    "layers/qkv/w": (12, 384, 3, 384),
    "layers/out/w": (12, 384, 384),
    "layers/up/w": (12, 384, 1536),
    "layers/down/w": (12, 1536, 384),
}
COPIES = ("parameters", "first_moment", "second_moment")


@click.group(cls=click.Group, invoke_without_command=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
@click.pass_context
def main(context: click.Context, out: Path | None) -> None:
    """Measure all stores, and print a table."""
    if context.invoked_subcommand:
        return
    rows = []
    for name in STORES:
        with _root(name) as root:
            saved, restored = (_worker(verb, root) for verb in ("save", "restore"))
        rows.append({"store": name, "save": saved, "restore": restored})
        click.echo(rows[-1], err=True)
    click.echo("| store | save: held, s | written, s | memory, GB | restore, s | memory, GB |\n|---|---:|---:|---:|---:|---:|")
    for row in rows:
        saved, restored = row["save"], row["restore"]
        numbers = saved["held"], saved["written"], saved["memory"], restored["seconds"], restored["memory"]
        click.echo(f"| {row['store']} | " + " | ".join(f"{each:.1f}" for each in numbers) + " |")
    if out:
        report = {"machine": machine(), "date": str(date.today()), "versions": versions(PACKAGES), "results": rows}
        out.write_text(json.dumps(report, indent=2) + "\n")


@main.command(cls=Command)
@click.argument("root")
def save(root: str) -> None:
    """Save once, and print seconds and memory."""
    from train.run.checkpoints import Saver

    tree = _arrays()
    saver = Saver(as_path(root), keep=1)
    memory = _Peak()
    begin = time.perf_counter()
    saver.save(1, tree, {})
    held = time.perf_counter() - begin
    saver.wait()
    written = time.perf_counter() - begin
    saver.close()
    click.echo(json.dumps({"held": held, "written": written, "memory": memory.above_start()}))


@main.command(cls=Command)
@click.argument("root")
def restore(root: str) -> None:
    """Restore what was saved, and print seconds and memory."""
    import jax

    from train.run import checkpoints

    memory = _Peak()
    places = jax.tree.map(lambda array: array.sharding, _arrays(small=True))
    begin = time.perf_counter()
    checkpoint = checkpoints.latest(as_path(root))
    assert checkpoint is not None
    restored = checkpoints.restore(checkpoint, _shapes(), places)
    jax.block_until_ready(restored)
    seconds = time.perf_counter() - begin
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(restored))
    click.echo(json.dumps({"seconds": seconds, "memory": memory.above_start() - size / 1e9}))


def _arrays(small: bool = False) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    shapes = _shapes()
    if small:
        return jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), shapes)
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    arrays = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.block_until_ready(jax.tree.unflatten(structure, arrays))


def _shapes() -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    return {copy: {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()} for copy in COPIES}


class _Peak:
    """The most memory of this process since it was made, sampled: a maximum that the kernel keeps
    would have the compiler's and the random numbers' in it."""

    def __init__(self) -> None:
        self._start = self._most = resident_bytes(os.getpid())
        threading.Thread(target=self._watch, daemon=True).start()

    def above_start(self) -> float:
        """GB."""
        return (self._most - self._start) / 1e9

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, resident_bytes(os.getpid()))
            time.sleep(0.01)


@contextlib.contextmanager
def _root(name: str):
    from tests.helpers.buckets import BUCKET, store

    with tempfile.TemporaryDirectory() as scratch:
        if name == "disk":
            yield f"{scratch}/run"
            return
        with store(name) as proxy:
            # Straight to the server: the proxy of the tests is another program on the same cores.
            os.environ["STORAGE_EMULATOR_HOST" if name == "gs" else "AWS_ENDPOINT_URL"] = proxy.server
            yield f"{name}://{BUCKET}/run"


def _worker(verb: str, root: str | StoragePath) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.bucket_saves", verb, str(root)]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.bucket_saves")

"""Command line: `jina-jax embed`."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import click
except ImportError:
    sys.exit("the command line needs an extra: pip install 'jina-jax[cli]'")

import jax
import numpy as np

from .embedder import Embedder
from .quantize import PRECISIONS

MAX_CACHE_BYTES = 10 * 2**30


class Program(click.Command):
    """A command: compiled programs are kept between runs, and an error of the user is one line, without traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        use_compilation_cache()
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error


class Programs(Program, click.Group):
    """A group of commands, with the same manners."""


def use_compilation_cache() -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR, else in ~/.cache/jina-jax."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        directory = Path(home).expanduser() / "jina-jax"
        _remove_half_written(directory)
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_compilation_cache_max_size", MAX_CACHE_BYTES)


def _remove_half_written(cache: Path) -> None:
    """Entries that a killed program left without their time of use: with one of them there, JAX writes no other."""
    for entry in cache.glob("*-cache"):
        if not entry.with_name(f"{entry.name.removesuffix('-cache')}-atime").exists():
            entry.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file that appears under its name only when it has been written to the end; nothing is left on failure."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@click.group(cls=Programs)
@click.version_option(package_name="jina-jax")
def main() -> None:
    """Task-adapted multilingual embeddings in JAX."""


@main.command()
@click.argument("file", type=click.Path(allow_dash=True, path_type=Path))
@click.option("--model", required=True, help="Directory or hub id, in any supported layout.")
@click.option("--task", help="Adapter; default: the base model.")
@click.option("--dim", type=int, help="Leading dimensions to keep; default: all.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="float32", show_default=True)
@click.option("--batch-size", type=int, default=32, show_default=True, help="In texts; bounds memory.")
@click.option("--output", required=True, help="FILE.npy, FILE.parquet (text and embedding), or - for JSON lines.")
def embed(file: Path, model: str, task: str | None, dim: int | None, precision: Any, batch_size: int, output: str) -> None:
    """Embed the lines of FILE (UTF-8, one text each), or of standard input with -."""
    suffix = Path(output).suffix
    if output != "-" and suffix not in (".npy", ".parquet"):
        raise ValueError(f"--output must end in .npy or .parquet, or be -, not {output!r}")
    if output != "-" and not Path(output).absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no directory {Path(output).parent}")
    if output != "-" and Path(output).is_dir():
        raise IsADirectoryError(f"{output} is a directory")
    texts = _lines(file)
    embedder = Embedder.load(model)
    embeddings = embedder.encode(
        texts, task=task, truncate_dim=dim, precision=precision, batch_size=batch_size, show_progress_bar=sys.stderr.isatty()
    )
    if output == "-":
        for embedding in embeddings:
            click.echo(json.dumps(embedding.tolist()))
        return
    with whole_file(Path(output)) as target:
        if suffix == ".npy":
            with target.open("wb") as stream:
                np.save(stream, embeddings)
        else:
            _write_parquet(target, texts, embeddings)
    click.echo(f"{output}: {len(texts)} embeddings of {embeddings.shape[1]} dimensions", err=True)


def _lines(file: Path) -> list[str]:
    data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: not UTF-8 text ({error.reason})") from error
    lines = lines[:-1] if lines[-1] == "" else lines
    return [line.removesuffix("\r") for line in lines]


def _write_parquet(path: Path, texts: list[str], embeddings: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1])
    pq.write_table(pa.table({"text": texts, "embedding": vectors}), path)


if __name__ == "__main__":
    main()

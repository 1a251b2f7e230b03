"""What commands share: one-line errors, a compilation cache kept between runs, and the options of a
model."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax

MAX_CACHE_BYTES = 10 * 2**30


class Command(click.Command):
    """Click command with a compilation cache and one-line errors.

    Compiled programs are kept between runs. A user's error is one line, without traceback.
    """

    def invoke(self, ctx: click.Context) -> Any:
        use_compilation_cache()
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error


class CommandGroup(Command, click.Group):
    """Command group with `Command`'s error handling and compilation cache.

    Its help lists the commands in the order in which they were added.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


revision_option = click.option("--revision", help="Branch, tag or commit; for a hub id.")

max_length_option = click.option(
    "--max-length", type=int, help="Tokens of a text to keep, special ones included; default: the model's limit."
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options with which a command loads a model: --dtype and --revision."""
    dtype = click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Of parameters and computation; default: float32 on CPU, on accelerators that of the files.",
    )
    return dtype(revision_option(command))


def use_compilation_cache() -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR, else in ~/.cache/jina-jax.

    A user without a home directory has none kept.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        try:
            directory = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "jina-jax"
        except RuntimeError:
            return
        _remove_half_written(directory)
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_compilation_cache_max_size", MAX_CACHE_BYTES)


def _remove_half_written(cache: Path) -> None:
    """Removes cache entries that a killed program left without their access time.

    While the cache holds one of them, JAX writes no other entry.
    """
    for entry in cache.glob("*-cache"):
        if not entry.with_name(f"{entry.name.removesuffix('-cache')}-atime").exists():
            entry.unlink(missing_ok=True)

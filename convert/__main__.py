"""Command line of the converters."""

import json
from dataclasses import replace
from pathlib import Path

import click

from jina_jax.checkpoints import native, sealed_directory, torch_writer
from jina_jax.checkpoints.load import load_encoder
from jina_jax.checkpoints.sealed_directory import MANIFEST, check_free
from jina_jax.checkpoints.sources import checkpoint_format, find_model
from jina_jax.command import CommandGroup, revision_option
from jina_jax.commands.demo_model import demo_model
from jina_jax.config import SERVING_ROPE_THETA
from jina_jax.files import atomic_write
from jina_jax.model.encoder import Encoder
from jina_jax.model.parameters import from_arrays, variables
from jina_jax.storage import as_path
from jina_jax.text.tokenizer import load_tokenizer, max_tokens

from .verify import verify as compare

LAYOUTS = ("original", "transformers", "sentence-transformers")
dtype_option = click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Default: as in SRC.")
pickle_option = click.option("--allow-pickle", is_flag=True, help="Read pytorch_model.bin where there is no safetensors.")


@click.group(cls=CommandGroup)
def main() -> None:
    """Convert checkpoints between PyTorch and JAX."""


@main.command("from_torch")
@click.argument("src")
@click.argument("dst")
@dtype_option
@pickle_option
@revision_option
def from_torch(src: str, dst: str, dtype: str | None, allow_pickle: bool, revision: str | None) -> None:
    """Write SRC, a PyTorch checkpoint, as the native checkpoint DST.

    SRC is a directory, local or in a bucket, or a hub id, in any layout.
    """
    check_free(dst)
    directory = find_model(src, revision, allow_pickle=allow_pickle)
    if checkpoint_format(directory) == "native":
        raise ValueError(f"{src} is a native checkpoint already")
    encoder, tokenizer, _ = load_encoder(directory, param_dtype=dtype, allow_pickle=allow_pickle)
    native.save_checkpoint(dst, encoder, tokenizer)
    click.echo(f"{dst}: {_describe(encoder)}")


@main.command("to_torch")
@click.argument("src")
@click.argument("dst")
@click.option("--layout", type=click.Choice(LAYOUTS), required=True)
@click.option("--task", help="sentence-transformers only: the adapter to merge. Default: the base model.")
@dtype_option
@revision_option
@click.option("--rope-theta", type=float, default=SERVING_ROPE_THETA, show_default=True, help="Rotary base to write.")
def to_torch(
    src: str, dst: str, layout: str, task: str | None, dtype: str | None, revision: str | None, rope_theta: float
) -> None:
    """Write SRC as a PyTorch checkpoint DST.

    SRC is a native checkpoint, or any other that this library reads.
    """
    check_free(dst)
    if task and layout != "sentence-transformers":
        raise ValueError(f"--task goes with --layout sentence-transformers; {layout} holds all tasks")
    encoder, tokenizer, _ = load_encoder(src, revision=revision)
    config = encoder.config
    if config.position_type == "rope" and config.rope_theta != rope_theta:
        click.echo(f"the rotary base is {config.rope_theta:g} in {src} and written as {rope_theta:g}", err=True)
        config = replace(config, rope_theta=rope_theta)
        arrays = {path: variable.get_value() for path, variable in variables(encoder).items()}
        encoder = from_arrays(config, arrays, dtype=encoder.dtype)
    if layout == "original":
        torch_writer.write_original(dst, encoder, tokenizer, dtype)
    elif layout == "transformers":
        torch_writer.write_transformers(dst, encoder, tokenizer, dtype)
    else:
        length = max_tokens(tokenizer, config)
        torch_writer.write_sentence_transformers(dst, encoder, tokenizer, dtype, task=task, max_length=length)
    click.echo(f"{dst}: {layout} layout, {_describe(encoder)}")


@main.command("verify")
@click.argument("src")
@click.argument("dst")
@pickle_option
@revision_option
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the report. Default: standard output.")
@click.pass_context
def verify(context: click.Context, src: str, dst: str, allow_pickle: bool, revision: str | None, out: Path | None) -> None:
    """Compare DST with the PyTorch checkpoint SRC, per layer and per task.

    The exit status is 1 if a difference is above its tolerance.
    """
    report = compare(find_model(src, revision, allow_pickle=allow_pickle), dst, allow_pickle=allow_pickle)
    text = json.dumps(report, indent=2)
    if out is None:
        click.echo(text)
    else:
        with atomic_write(out) as file:
            file.write_text(text + "\n", "utf-8")
    context.exit(0 if report["ok"] else 1)


@main.command("seal")
@click.argument("directory")
def seal(directory: str) -> None:
    """Accept the current files of a native checkpoint: write a new manifest.

    Nothing is written where no model can be read from them.
    """
    if not native.is_checkpoint(original := as_path(directory)):
        raise ValueError(f"{directory} has no {MANIFEST}; it is no native checkpoint")
    local = find_model(original)
    encoder = native.read_unverified(local)
    if (local / "tokenizer.json").exists():
        load_tokenizer(local, encoder.config)
    sealed_directory.seal(local, original)
    click.echo(f"{directory}: sealed")


main.add_command(demo_model, "demo_model")


def _describe(encoder: Encoder) -> str:
    config = encoder.config
    tasks = f"tasks {', '.join(config.tasks)}" if config.tasks else "no adapters"
    return f"{config.num_layers} layers of {config.hidden_size}, {tasks}"


if __name__ == "__main__":
    main(prog_name="python -m convert")

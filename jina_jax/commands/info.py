"""`jina-jax info`: what a model is, and what becomes of the settings beside its weights."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from ..checkpoints.describe import Description, describe
from ..checkpoints.sources import find_model
from ..command import Command, revision_option


@click.command(cls=Command, short_help="Say what a model is, and which of its settings are obeyed.")
@click.argument("model", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with every setting.")
@revision_option
@click.pass_context
def info(context: click.Context, model: str, as_json: bool, revision: str | None) -> None:
    """Say what MODEL (directory or hub id, in any supported layout) is: sizes, tasks, prompts and
    limits, and which of the settings beside its weights are obeyed.

    The weights are not read, nor compared with their hashes. The exit status is 1 if the model is
    refused for what its files ask for.
    """
    directory = find_model(model, revision)
    found = describe(directory, model)
    if as_json:
        click.echo(json.dumps({"model": model, "directory": str(directory)} | found, indent=2, ensure_ascii=False))
    else:
        for label, text in _lines(found):
            click.echo(f"{label:<12}{text}")
    context.exit(1 if found["refused"] else 0)


def _lines(found: Description) -> Iterator[tuple[str, str]]:
    """Yields label and text of each line; a text that goes on has no label."""
    family = "" if found["family"] in (None, found["layout"]) else f", {found['family']}"
    yield "layout", f"{found['layout'] or 'unknown'}{family}"
    if found["sizes"] is not None:
        yield from _model_lines(found)
    yield from _setting_lines(found["settings"])
    yield from _listed("refused", found["refused"])


def _model_lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    sizes, positions, limit, dims = (found[name] for name in ("sizes", "positions", "limit", "dims"))
    yield (
        "sizes",
        f"{sizes['num_layers']} layers of {sizes['hidden_size']}, {sizes['num_heads']} heads, MLP {sizes['mlp_size']:,}, "
        f"vocabulary {sizes['vocab_size']:,}",
    )
    yield "parameters", f"{found['parameters']['base']:,} as {_joined(found['dtype']['base'])}"
    if counts := [*found["parameters"]["adapters"].values()]:  # they are padded to the same rank
        dtype = _joined(found["dtype"]["adapters"])
        yield "adapters", f"{len(counts)}, each {counts[0]:,} parameters of rank {sizes['lora_rank']} as {dtype}"
    if positions["type"] == "rope":
        yield "positions", f"{positions['count']:,} rotary, base {positions['rope_theta']:,g}"
    else:
        yield "positions", f"{positions['count']:,} absolute, from {positions['first']}"
    yield "limit", f"{limit['tokens']:,} tokens, by {_joined(limit['set_by'])}"
    kept = "" if dims["truncate_dim"] is None else f", kept by default {dims['truncate_dim']}"
    yield "dimensions", f"{_joined(dims['matryoshka']) or sizes['hidden_size']}{kept}"
    yield "MLM head", "yes" if found["mlm_head"] else "no"
    yield "pooler", "yes; no embedding uses it" if found["pooler"] else "no"
    yield from _named("tasks", found["tasks"])
    yield from _named("prompts", found["prompts"])
    if found["prompts_are_published"]:
        yield "", "published ones: the files have none"
    if found["default_prompt"] is not None:
        yield "", f"default: {found['default_prompt']}"


def _setting_lines(settings: Mapping[Any, Sequence[Mapping[str, Any]]]) -> Iterator[tuple[str, str]]:
    yield "settings", ", ".join(f"{len(listed)} {verdict}" for verdict, listed in settings.items())
    reasons: dict[str, list[str]] = {}
    for setting in settings["inert"]:
        reasons.setdefault(setting["why"], []).append(setting["field"])
    yield from _listed("inert", [f"{why}: {', '.join(dict.fromkeys(fields))}" for why, fields in reasons.items()])
    yield from _listed("unknown", [f"{setting['file']}: {setting['field']}" for setting in settings["unknown"]])


def _listed(label: str, texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    yield from ((label if number == 0 else "", text) for number, text in enumerate(texts))


def _named(label: str, texts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Lines of texts by name, in two columns."""
    width = max(map(len, texts), default=0)
    yield from _listed(label, [f"{name:<{width}}  {json.dumps(text, ensure_ascii=False)}" for name, text in texts.items()])


def _joined(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))

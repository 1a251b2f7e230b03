"""Prompts that published models were trained with, and that their files do not hold."""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from ..config import ModelConfig
from ..storage import StoragePath

logger = logging.getLogger(__name__)

# From the models' own cards on the hub, their section "FAQ": "Do I need to add the prefix "query: "
# and "passage: " to input texts?" and, of -instruct, "Do I need to add instructions to the query?"
_E5 = {"query": "query: ", "document": "passage: "}
_E5_INSTRUCT = {
    "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: ",
    "document": "",
}

PUBLISHED_PROMPTS: dict[str, dict[str, str]] = {
    "intfloat/multilingual-e5-large-instruct": _E5_INSTRUCT,
    **{f"intfloat/multilingual-e5-{size}": _E5 for size in ("small", "base", "large")},
    **{f"intfloat/e5-{size}{kind}": _E5 for size in ("small", "base", "large") for kind in ("", "-v2", "-unsupervised")},
}
"""Prompts by their names, by the model's id on the hub in small letters."""

_IN_CACHE = re.compile(r"/models--([^/]+)--([^/]+)/snapshots/[^/]+$")
"""End of the path of a model in the hub's cache."""


def with_prompts(config: ModelConfig, source: str | StoragePath, given: Mapping[str, str]) -> ModelConfig:
    """Returns the configuration with the published prompts of a model, if it holds no text of any
    of its own, and over them those `given`.

    Published ones are logged, once.

    Args:
        config: the model's, from its files.
        source: a hub id, or a directory, which is known by its place in the hub's cache.
        given: prompts by their names.
    """
    published = lacking_prompts(config, source)
    if taken := tuple((name, text) for name, text in published.items() if name not in given):
        _say_published(hub_id(source), taken)
    return replace(config, prompts=tuple((dict(config.prompts) | published | dict(given)).items()))


def lacking_prompts(config: ModelConfig, source: str | StoragePath) -> dict[str, str]:
    """Returns the published prompts of a model whose configuration has no text of any; {} = none.

    Args:
        config: the model's, from its files.
        source: a hub id, or a directory, which is known by its place in the hub's cache.
    """
    texts = any(text for _, text in config.prompts)
    return {} if texts else PUBLISHED_PROMPTS.get(hub_id(source).lower(), {})


def check_prompts(prompts: Mapping[str, str] | None) -> None:
    """Raises ValueError if prompts are not texts by name."""
    if not isinstance(prompts, Mapping | None):
        raise ValueError(f"prompts must be texts by name, not {prompts!r}")
    for name, text in (prompts or {}).items():
        if not isinstance(name, str):
            raise ValueError(f"prompts must be texts by name, and the name {name!r} is no string")
        if not isinstance(text, str):
            raise ValueError(f"prompts must be texts by name, and the one of {name!r} is {text!r}, no string")


def hub_id(source: str | StoragePath) -> str:
    """Returns the hub id of a source that `sources.find_model` has found; "" = it has none."""
    path = Path(str(source)).expanduser()
    if path.is_dir():
        cached = _IN_CACHE.search(path.absolute().as_posix())
        return f"{cached[1]}/{cached[2]}" if cached else ""
    return str(source)


@cache
def _say_published(model: str, prompts: tuple[tuple[str, str], ...]) -> None:
    logger.warning("%s needs prompts, which its files lack: the published ones are taken, %s", model, dict(prompts))

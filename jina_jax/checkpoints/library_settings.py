"""Reads `config_sentence_transformers.json`, sentence-transformers' settings of a whole model."""

from dataclasses import replace
from pathlib import Path

from ..config import PUBLISHED_INSTRUCTIONS, ModelConfig
from ..errors import ConfigError
from ..files import read_json


def with_library_settings(config: ModelConfig, directory: Path) -> ModelConfig:
    """Adds the prompts and the dimension of a model's file to its configuration.

    Each prompt is taken from `config.json`, else from that file, else, for the name of a published
    task, from the published instructions. `query` and `document` are empty where the file names
    them as the default and has no text for them.

    Raises:
        CheckpointError: the file is damaged.
        ConfigError: a field is of the wrong type; the message names file and field.
    """
    published = {task: PUBLISHED_INSTRUCTIONS[task] for task in config.tasks if task in PUBLISHED_INSTRUCTIONS}
    path = directory / "config_sentence_transformers.json"
    library = read_json(path) if path.exists() else {}
    named = {} if library.get("prompts") is None else library["prompts"]
    if not isinstance(named, dict):
        raise ConfigError(f"{path}: prompts must be texts by name, not {named!r}")
    if wrong := {name: text for name, text in named.items() if not isinstance(text, str | None)}:
        raise ConfigError(f"{path}: prompts must be texts by name, and those of {list(wrong)} are {list(wrong.values())}")
    prompts = published | {name: text or "" for name, text in named.items()} | dict(config.prompts)
    default = library.get("default_prompt_name")
    if not isinstance(default, str | None):
        raise ConfigError(f"{path}: default_prompt_name must be a string, not {default!r}")
    if default in ("query", "document"):
        prompts = {default: ""} | prompts
    if default is not None and default not in prompts:
        raise ConfigError(f"{path}: default_prompt_name {default!r} is not one of its prompts {list(prompts)}")
    dim = library.get("truncate_dim")
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
        raise ConfigError(f"{path}: truncate_dim must be an integer, not {dim!r}")
    dim = config.truncate_dim if dim is None else dim
    return replace(config, prompts=tuple(prompts.items()), default_prompt=default, truncate_dim=dim)

"""Finds a model in a directory, a remote directory or on the Hugging Face hub, and recognises its
format."""

import re
from pathlib import Path
from typing import Literal

from ..errors import CheckpointError, ConfigError
from ..files import read_json, read_json_list
from .native import is_checkpoint
from .remote import fetch, is_remote
from .tensor_files import INDEX_SUFFIX, PICKLES

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

MODEL_FILES = ("*.json", "*.safetensors", "*/adapter_config.json", "*/adapter_model.safetensors")
"""Patterns of the files from which a model is read, except the arrays of a native checkpoint."""


def find_model(source: str | Path, revision: str | None = None) -> Path:
    """Returns a local directory with the files of a model.

    Args:
        source: a directory; a remote directory (`gs://...`), which is copied; or a hub id, which is
            downloaded to the hub's cache.
        revision: branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: there is no such directory and no such model.
        ValueError: `source` is a file.
    """
    text = str(source)
    if is_remote(source):
        return fetch(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; a model is a directory")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(text):
        raise FileNotFoundError(f"there is no directory {path}")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(text, revision=revision, allow_patterns=[*MODEL_FILES, "arrays/*"]))
    except (OSError, huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError) as error:
        raise FileNotFoundError(f"{text} is no directory here, and not to be had from the hub: {error}") from error


def checkpoint_format(directory: Path) -> Literal["native", "torch"]:
    """Format of the checkpoint in a directory: this library's or PyTorch's.

    Raises:
        CheckpointError: the directory holds both, or neither.
        ConfigError: sentence-transformers' files beside it ask for more than mean pooling and
            normalisation.
    """
    weights = [path.name for pattern in ("*.safetensors", f"*{INDEX_SUFFIX}") for path in directory.glob(pattern)]
    if is_checkpoint(directory):
        if weights:
            raise CheckpointError(f"{directory} is ambiguous: it holds a native checkpoint and PyTorch weights {weights}")
        return "native"
    if not weights and not any(directory.glob(PICKLES)):
        held = sorted(path.name for path in directory.iterdir())
        raise CheckpointError(f"{directory} is of an unknown kind: it holds no checkpoint of a known layout, but {held}")
    _check_modules(directory)
    return "torch"


def _check_modules(directory: Path) -> None:
    """Raises for pipelines that this library would silently run as something else."""
    modules = directory / "modules.json"
    if not modules.exists():
        return
    listed = read_json_list(modules)
    if not all(isinstance(module, dict) for module in listed):
        raise CheckpointError(f"{modules} is not a list of modules")
    kinds = [str(module.get("type")).rpartition(".")[2] for module in listed]
    if unknown := [kind for kind in kinds if kind not in ("Transformer", "XLMRobertaLoRA", "Pooling", "Normalize")]:
        raise ConfigError(f"{modules} has the modules {unknown}, which this library does not build")
    for module, kind in zip(listed, kinds, strict=True):
        pooling = directory / str(module.get("path", "")) / "config.json"
        if kind != "Pooling" or not pooling.exists():
            continue
        settings = read_json(pooling)
        mode = settings.get("pooling_mode", "mean" if settings.get("pooling_mode_mean_tokens", True) else "another")
        modes = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on is True]
        if mode != "mean" or modes not in ([], ["pooling_mode_mean_tokens"]):
            raise ConfigError(f"{pooling} asks for {modes or mode}; supported is the mean of all tokens")
        if settings.get("include_prompt", True) is not True:
            raise ConfigError(f"{pooling} sets include_prompt to false; supported is a mean that includes the prompt")

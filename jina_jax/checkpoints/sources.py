"""Finds a model in a directory, a bucket or on the Hugging Face hub, and recognises its format."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from ..errors import CheckpointError
from ..storage import BucketPath, StoragePath, as_path, is_bucket
from ..storage.cache import fetch_directory
from ..storage.upload import UNFINISHED
from .foreign import refuse_foreign_directory
from .native import is_checkpoint
from .pipeline import transformer_folder
from .sealed_directory import MANIFEST
from .tensor_files import INDEX_SUFFIX, PICKLES, has_weights

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

MODEL_FILES = ("*.json", "*.safetensors", "*/adapter_config.json", "*/adapter_model.safetensors")
"""Patterns of the files of a Transformer module's folder from which a model is read, and of those
of its adapters; not of the arrays of a native checkpoint."""

_HUB_FILES = (*MODEL_FILES, "*/*.json", "*/*.safetensors", "arrays/*")
"""Patterns of what is downloaded: as it is not known before which folders hold modules, all."""


def find_model(source: str | StoragePath, revision: str | None = None, *, allow_pickle: bool = False) -> Path:
    """Returns a local directory with the files of a model.

    Args:
        source: a directory; one in a bucket, of which the processes of this host share a copy; or a
            hub id, which is downloaded to the hub's cache.
        revision: branch, tag or commit on the hub; None for a directory.
        allow_pickle: download pickles too, in place of the safetensors files that the hub lacks.

    Raises:
        FileNotFoundError: there is no such directory and no such model.
        CheckpointError: the hub has the weights only as pickles, and they are not allowed; or the
            upload of a directory in a bucket is not finished.
        ValueError: `source` is a file, or a directory and a revision is given.
    """
    text = str(source)
    path = as_path(source).expanduser()
    if revision is not None and (is_bucket(path) or path.is_dir()):
        raise ValueError(f"{source} is a directory, which has no revision {revision!r}; a model on the hub has")
    if is_bucket(path):
        return _fetch(path, allow_pickle)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; a model is a directory")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(text):
        raise FileNotFoundError(f"there is no directory {path}")
    directory = _download(text, revision, [*_HUB_FILES])
    pickles = [] if is_checkpoint(directory) else _pickles_to_fetch(directory)
    if pickles and allow_pickle:
        return _download(text, revision, pickles)
    if pickles and (held := _on_hub(text, revision, pickles)):
        raise CheckpointError(
            f"{text} has its weights only as pickles ({', '.join(held)}), which can run code when they are loaded. "
            f"If you trust them, convert them once: python -m convert from_torch {text} DST --allow-pickle"
        )
    return directory


def local_directory(path: str | StoragePath) -> Path:
    """Returns a directory, or the local copy of one in a bucket."""
    place = as_path(path)
    return fetch_directory(place) if is_bucket(place) else place


def _fetch(directory: BucketPath, allow_pickle: bool) -> Path:
    def wanted(names: Sequence[str]) -> Sequence[str]:
        if MANIFEST in names:
            return names
        if UNFINISHED in names:
            raise CheckpointError(f"{directory} is not complete: what wrote it was interrupted; write it again")
        weights = [name for name in names if name.endswith(".safetensors")]
        if allow_pickle or not weights:
            return names
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in _HUB_FILES)]

    if directory.is_file():
        raise ValueError(f"{directory} is an object; a model is a directory")
    return fetch_directory(directory, wanted)


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (OSError, huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError) as error:
        raise FileNotFoundError(f"{model} is no directory here, and not to be had from the hub: {error}") from error


def _on_hub(model: str, revision: str | None, patterns: list[str]) -> list[str]:
    """Names of a model's files on the hub that match; [] without a connection."""
    import huggingface_hub

    try:
        names = huggingface_hub.list_repo_files(model, revision=revision)
    except (OSError, huggingface_hub.errors.HfHubHTTPError):
        return []
    return sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def _pickles_to_fetch(directory: Path) -> list[str]:
    """Patterns of the pickles that stand in for safetensors files which a download lacks."""
    folder = transformer_folder(directory)
    lacking = [] if _weights(folder) else [folder / PICKLES]
    adapters = [path.parent for pattern in ("adapter_config.json", "*/adapter_config.json") for path in folder.glob(pattern)]
    lacking += [path / "adapter_model.bin" for path in adapters if not (path / "adapter_model.safetensors").exists()]
    return [path.relative_to(directory).as_posix() for path in lacking]


def checkpoint_format(directory: Path) -> Literal["native", "torch"]:
    """Format of the checkpoint in a directory: this library's or PyTorch's.

    Raises:
        CheckpointError: the directory holds both, or neither.
        ConfigError: sentence-transformers' list of modules asks for one that is not built.
    """
    if is_checkpoint(directory):
        if weights := _weights(directory):
            raise CheckpointError(f"{directory} is ambiguous: it holds a native checkpoint and PyTorch weights {weights}")
        return "native"
    folder = transformer_folder(directory)
    if not has_weights(folder):
        refuse_foreign_directory(folder)
    return "torch"


def _weights(folder: Path) -> list[str]:
    """Names of the safetensors files in a folder, and of their indices."""
    return [path.name for pattern in ("*.safetensors", f"*.safetensors{INDEX_SUFFIX}") for path in folder.glob(pattern)]

"""Native checkpoints: Orbax arrays, `config.json`, the tokenizer's files, and a manifest with the SHA-256 of every file.

Orbax returns damaged arrays without an error, so a restore first compares every file with the manifest. A checkpoint is
written beside its place and renamed into it when it is complete: a directory with a manifest is a whole checkpoint.
"""

import contextlib
import hashlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp
from transformers import PreTrainedTokenizerFast

from ..config import ConfigError, ModelConfig, dump_json
from ..model.encoder import Encoder, abstract_variables, from_arrays, variables
from ..model.lora import AdapterScale
from ..parallel.processes import is_first, of_first
from .remote import is_remote, publish
from .tensor_files import CheckpointError, read_json

MANIFEST = "manifest.json"
FORMAT = "jina-jax checkpoint"
VERSION = 1

_ARRAYS = "arrays"


def is_checkpoint(directory: Path) -> bool:
    return (directory / MANIFEST).exists()


def save_checkpoint(directory: str | Path, encoder: Encoder, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Writes a checkpoint; `directory`, local or remote (`gs://...`), must not exist yet, or be empty.

    Several processes do this together, and each has the whole encoder.

    Raises:
        FileExistsError: there is something already.
    """
    with written_whole(directory) as target:
        arrays = {path: np.asarray(variable.get_value()) for path, variable in variables(encoder).items()}
        with all_processes():
            ocp.save(str(target.absolute() / _ARRAYS), arrays)
        if is_first():
            (target / "config.json").write_text(dump_json(encoder.config.to_dict()), "utf-8")
            if tokenizer is not None:
                tokenizer.save_pretrained(target)
            seal(target)


def load_checkpoint(directory: Path, *, dtype: DTypeLike | None = None, param_dtype: DTypeLike | None = None) -> Encoder:
    """The encoder of a verified checkpoint.

    Args:
        directory: as written by `save_checkpoint`.
        dtype: compute dtype; None = that of the stored parameters.
        param_dtype: dtype of the parameters in memory; None = as stored.

    Raises:
        CheckpointError: a file is missing, changed or damaged; the message says which.
    """
    verify(directory)
    config = ModelConfig.from_dict(read_json(directory / "config.json"))
    if not (directory / _ARRAYS).is_dir():
        raise CheckpointError(f"{directory} has no {_ARRAYS}")
    stored = ocp.metadata(str(directory.absolute() / _ARRAYS)).metadata
    expected = abstract_variables(config)
    wrong = sorted(expected.keys() ^ stored.keys())
    wrong += [path for path in expected.keys() & stored.keys() if tuple(stored[path].shape) != expected[path].shape]
    if wrong:
        raise ConfigError(f"{directory}: config.json contradicts the arrays {wrong}")
    here = jnp.zeros(()).sharding  # that of the default device, which jax.default_device may have changed
    targets = {
        path: jax.ShapeDtypeStruct(
            variable.shape,
            stored[path].dtype if param_dtype is None or isinstance(variable, AdapterScale) else jnp.dtype(param_dtype),
            sharding=here,
        )
        for path, variable in expected.items()
    }
    with all_processes():
        arrays = ocp.load(str(directory.absolute() / _ARRAYS), targets)
    return from_arrays(config, arrays, dtype=stored["tokens.table"].dtype if dtype is None else dtype)


def all_processes() -> ocp.Context:
    """Inside, Orbax's processes meet at the coordinator. Unnamed, they would meet on the devices, in between training steps."""
    context = ocp.Context()
    context.multiprocessing.active_processes = set(range(jax.process_count()))
    return context


@contextlib.contextmanager
def written_whole(directory: str | Path) -> Iterator[Path]:
    """A new directory that appears under its name only when everything in it has been written; nothing is left on failure.

    A remote one, which cannot be renamed in one step, is copied with its manifest last. Of several processes the first makes
    it, and gives it its name when it leaves; they all write into the same one.

    Raises:
        FileExistsError: `directory` exists and is not empty.
    """
    if not is_first():
        yield Path(of_first(f"write {directory}", str))
        return
    check_free(directory)
    if is_remote(directory):
        if jax.process_count() > 1:
            raise ValueError(f"several processes cannot write {directory} together; give a directory that they share")
        with tempfile.TemporaryDirectory(prefix="jina-jax-") as scratch:
            yield Path(scratch)
            publish(Path(scratch), directory, last=MANIFEST)
        return
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Random, not the process id: in containers that one repeats, and a killed run leaves its directory behind.
    partial = directory.parent / f".{directory.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    of_first(f"write {directory}", lambda: str(partial.absolute()))
    try:
        yield partial
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)
    except BaseException:
        _remove(partial)
        raise


def _remove(directory: Path) -> None:
    """Removes what a failed save has left. Orbax's writers fail one by one, and one of them may make the directory again."""
    for _ in range(10):
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.5)
        if not directory.exists():
            return


def check_free(directory: str | Path) -> None:
    """FileExistsError where `directory` exists and is not empty."""
    place = epath.Path(directory)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty; choose another name or remove it")


def seal(directory: Path) -> None:
    """Writes the manifest over the files as they are now: the last step of a save, and the way to accept an edited file."""
    manifest = {"format": FORMAT, "version": VERSION, "files": _hashes(directory, _files(directory))}
    partial = directory / f"{MANIFEST}.partial"
    partial.write_text(dump_json(manifest), "utf-8")
    partial.replace(directory / MANIFEST)


def verify(directory: Path) -> None:
    """CheckpointError that lists every file which is not as the manifest has it."""
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{directory / MANIFEST} is not a manifest of this library")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{directory} has checkpoint version {manifest.get('version')}; this library reads {VERSION}")
    files = manifest["files"]
    missing = sorted(name for name in files if not (directory / name).is_file())
    hashes = _hashes(directory, sorted(set(files) - set(missing)))
    changed = sorted(name for name, digest in hashes.items() if digest != files[name])
    if missing or changed:
        listed = "; ".join(
            f"{what}: {names}" for what, names in (("missing", missing), ("damaged or edited", changed)) if names
        )
        raise CheckpointError(
            f"{directory} is not as it was written: {listed}. If you changed it on purpose, accept it with: "
            f"python -m convert seal {directory}"
        )


def _files(directory: Path) -> list[str]:
    paths = (path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(MANIFEST))
    return sorted(path.relative_to(directory).as_posix() for path in paths)


def _hashes(directory: Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with (directory / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))

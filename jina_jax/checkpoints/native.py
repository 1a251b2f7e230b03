"""Native checkpoints: Orbax arrays, `config.json`, the tokenizer's files, and a manifest.

The manifest holds the SHA-256 of every file. Orbax returns damaged arrays without an error, so a
restore first compares every file with the manifest. A checkpoint is written beside its final path
and renamed when it is complete: a directory with a manifest is a complete checkpoint. In a bucket,
where nothing is renamed, the arrays are chunks (`chunked_arrays.py`), and the manifest comes last.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError
from ..files import dump_json, read_json
from ..model.encoder import Encoder
from ..model.lora import AdapterScale
from ..model.parameters import abstract_variables, from_arrays, variables
from ..parallel.processes import is_main_process
from ..storage import BucketPath, StoragePath, as_path, is_bucket
from ..storage.paths import create
from ..storage.upload import UNFINISHED
from ..text.tokenizer import Tokenizer
from .array_store import all_processes, check_readable, load_arrays, orbax, orbax_path, stored_arrays
from .chunked_arrays import layouts, local_parts, read_arrays, read_metadata, write_file, write_metadata, write_parts
from .sealed_directory import FORMAT, MANIFEST, VERSION, atomic_directory, check_free, seal, verify

_ARRAYS = "arrays"

_CHUNKS = "chunks"
"""The arrays of a checkpoint that was written into a bucket, see `chunked_arrays.py`."""


def is_checkpoint(directory: StoragePath) -> bool:
    """True if `directory` has a manifest."""
    return (directory / MANIFEST).exists()


def save_checkpoint(directory: str | StoragePath, encoder: Encoder, tokenizer: Tokenizer | None) -> None:
    """Writes a native checkpoint.

    Several processes call this together, and each holds all parameters of the encoder.

    Args:
        directory: local or in a bucket; must not exist yet, or be empty.
        encoder: the model to write.
        tokenizer: its tokenizer; None = no tokenizer files are written.

    Raises:
        FileExistsError: `directory` exists and is not empty.
    """
    directory = as_path(directory)
    arrays = {path: np.asarray(variable.get_value()) for path, variable in variables(encoder).items()}
    if is_bucket(directory):
        if is_main_process():
            _save_in_bucket(directory, encoder, arrays, tokenizer)
        return
    with atomic_directory(directory) as target:
        with all_processes():
            orbax().save(orbax_path(target / _ARRAYS), arrays)
        if is_main_process():
            check_readable(target / _ARRAYS, arrays)
            (target / "config.json").write_text(dump_json(encoder.config.to_dict()), "utf-8")
            if tokenizer is not None:
                tokenizer.save_pretrained(target)
            seal(target)


def _save_in_bucket(
    directory: BucketPath, encoder: Encoder, arrays: dict[str, np.ndarray], tokenizer: Tokenizer | None
) -> None:
    """Writes the arrays from memory, in chunks; the manifest last, if there is none."""
    check_free(directory)
    with tempfile.TemporaryDirectory(prefix="jina-jax-") as scratch:
        (Path(scratch) / "config.json").write_text(dump_json(encoder.config.to_dict()), "utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        (directory / UNFINISHED).write_bytes(b"")
        stored = layouts(arrays)
        chunks = write_parts(directory / _CHUNKS, local_parts(arrays), stored) | write_metadata(directory / _CHUNKS, stored)
        files = {f"{_CHUNKS}/{name}": written.sha256 for name, written in chunks.items()}
        for file in sorted(Path(scratch).iterdir()):
            files[file.name] = write_file(directory / file.name, file.read_bytes()).sha256
    manifest = {"format": FORMAT, "version": VERSION, "files": dict(sorted(files.items()))}
    if not create(directory / MANIFEST, dump_json(manifest).encode()):
        raise FileExistsError(f"{directory} has been written by another program meanwhile; choose another name")
    (directory / UNFINISHED).unlink()


def load_checkpoint(directory: Path, *, dtype: DTypeLike | None = None, param_dtype: DTypeLike | None = None) -> Encoder:
    """Verifies a native checkpoint and returns its encoder.

    Args:
        directory: as written by `save_checkpoint`.
        dtype: compute dtype; None = that of the stored parameters.
        param_dtype: dtype of the parameters in memory; None = as stored.

    Raises:
        CheckpointError: a file is missing, changed or damaged; the message says which.
        ConfigError: `config.json` contradicts the arrays.
    """
    verify(directory)
    return read_unverified(directory, dtype=dtype, param_dtype=param_dtype)


def read_unverified(directory: Path, *, dtype: DTypeLike | None = None, param_dtype: DTypeLike | None = None) -> Encoder:
    """Returns the encoder of a native checkpoint as it is, whatever its manifest says.

    Arguments and errors are those of `load_checkpoint`, but for damage inside the arrays.
    """
    config, stored = open_unverified(directory)
    # The sharding of the default device, which jax.default_device may have changed.
    here = jnp.zeros(()).sharding
    targets = {
        path: jax.ShapeDtypeStruct(
            variable.shape,
            stored[path].dtype if param_dtype is None or isinstance(variable, AdapterScale) else jnp.dtype(param_dtype),
            sharding=here,
        )
        for path, variable in abstract_variables(config).items()
    }
    if (chunks := directory / _CHUNKS).is_dir():
        arrays = read_arrays(chunks, stored, targets, None)
    else:
        with all_processes():
            arrays = load_arrays(directory / _ARRAYS, targets)
    return from_arrays(config, arrays, dtype=stored["tokens.table"].dtype if dtype is None else dtype)


def open_unverified(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns the configuration of a native checkpoint, and shape and dtype of its arrays by path.

    They fit each other; the arrays are not read.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: `config.json` contradicts the arrays.
    """
    config = ModelConfig.from_dict(read_json(directory / "config.json"))
    if (chunks := directory / _CHUNKS).is_dir():
        stored: dict[str, Any] = dict(read_metadata(chunks, None))
    elif (directory / _ARRAYS).is_dir():
        stored = stored_arrays(directory / _ARRAYS)
    else:
        raise CheckpointError(f"{directory} has no {_ARRAYS}")
    expected = abstract_variables(config)
    wrong = sorted(expected.keys() ^ stored.keys())
    wrong += [path for path in expected.keys() & stored.keys() if tuple(stored[path].shape) != expected[path].shape]
    if wrong:
        raise ConfigError(f"{directory}: config.json contradicts the arrays {wrong}")
    return config, stored

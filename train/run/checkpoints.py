"""Training checkpoints: saved in the background by atomic writes, verified before they are used.

A checkpoint is a directory named after its step, with a manifest
(`jina_jax/checkpoints/sealed_directory.py`). It holds the arrays that training changes and the
positions in the data; arrays that a run only reads are recognised by their fingerprint. On a disk
Orbax writes the arrays; for a bucket see `bucket_checkpoints.py`.
"""

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jina_jax.checkpoints.array_store import all_processes, check_readable, load_arrays, orbax_path, stored_arrays
from jina_jax.checkpoints.chunked_arrays import read_arrays, read_metadata
from jina_jax.checkpoints.sealed_directory import atomic_directory, seal, verify
from jina_jax.errors import CheckpointError
from jina_jax.files import dump_json, read_json
from jina_jax.parallel.mesh import split_axis
from jina_jax.parallel.processes import broadcast_from_main, is_main_process
from jina_jax.storage import StoragePath, is_bucket
from jina_jax.storage.cache import fetch_directory
from jina_jax.storage.store import StoreUnavailable

from .bucket_checkpoints import (
    begin_save,
    chunk_files,
    is_chunked,
    put_aside,
    remove_unfinished_in_bucket,
    saved_in_bucket,
    verify_in_bucket,
)

logger = logging.getLogger(__name__)

_ARRAYS, _RUN = "arrays", "run.json"

CHUNK_BYTES = 8 * 2**20
"""Bytes of the chunks that arrays are stored in. A slice of an array is read in complete chunks."""


class Checkpoint(NamedTuple):
    """A verified checkpoint."""

    step: int
    directory: StoragePath
    run: dict[str, Any]
    """Fields that were saved beside the arrays."""


class Saver:
    """Saves checkpoints in the background, one at a time; each process writes its devices' shards.

    The next call raises the error of a failed save; checkpoints saved before it stay.
    """

    def __init__(self, directory: StoragePath, keep: int, check: Callable[[], None] = lambda: None):
        """`check` raises an error if another run has taken the directory over."""
        self._directory, self._keep, self._check = directory, keep, check
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._running: tuple[int, Future[None]] | None = None

    def save(self, step: int, tree: Any, run: dict[str, Any]) -> None:
        """Begins a save.

        The arrays are copied to the host first, since the next step takes over their buffers.
        """
        self.wait()
        try:
            if is_bucket(self._directory):
                save = begin_save(self._directory, step, _by_name(tree), run)
                self._running = step, self._pool.submit(save.write, self._check, self._keep)
            else:
                self._begin(self._directory, step, tree, run)
        except Exception as error:
            raise _not_saved(step, error) from error

    def _begin(self, directory: Path, step: int, tree: Any, run: dict[str, Any]) -> None:
        with contextlib.ExitStack() as stack:
            target = stack.enter_context(atomic_directory(directory / f"{step:08d}"))
            arrays = _copied(tree)
            with _in_chunks():
                writing = ocp.save_async(orbax_path(target / _ARRAYS), arrays)
            shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
            finish = self._finish, directory, stack.pop_all(), target, writing, shapes, run
            self._running = step, self._pool.submit(*finish)

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
            OSError: the save failed.
        """
        if self._running is not None:
            (step, running), self._running = self._running, None
            try:
                running.result()
            except Exception as error:
                raise _not_saved(step, error) from error

    def close(self) -> None:
        """Waits for the end of a save under way."""
        self._pool.shutdown()

    def _finish(
        self,
        directory: Path,
        stack: contextlib.ExitStack,
        target: Path,
        writing: ocp.AsyncResponse,
        shapes: dict[str, jax.ShapeDtypeStruct],
        run: dict[str, Any],
    ) -> None:
        with stack:
            writing.result()
            if not is_main_process():
                return
            check_readable(target / _ARRAYS, shapes)
            (target / _RUN).write_text(dump_json(run), "utf-8")
            seal(target)
        for _, old in _saved(directory)[: -self._keep]:
            # Renamed first: there is never half a checkpoint under its name.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial-old")))


def _not_saved(step: int, error: Exception) -> OSError:
    """Returns one kind of error for all that a save raises: Orbax has many for a full disk."""
    return OSError(f"the checkpoint of step {step} was not saved; those before it are as they were: {error}")


def _copied(tree: Any) -> dict[str, Any]:
    """Copies arrays to this host; returns them by name.

    Arrays sharded over several hosts stay: Orbax copies each host's shards before it returns.
    """
    return {name: np.array(leaf) if leaf.is_fully_addressable else leaf for name, leaf in _by_name(tree).items()}


def latest(directory: StoragePath) -> Checkpoint | None:
    """Returns the newest checkpoint that is unchanged since it was written.

    Damaged ones are reported and put aside, unfinished ones removed. The main process searches, and
    tells the others.
    """
    step = broadcast_from_main("newest checkpoint", lambda: str(_newest(directory)))
    if step == "None":
        return None
    saved = directory / f"{int(step):08d}"
    return Checkpoint(int(step), saved, read_json(saved / _RUN))


def _newest(directory: StoragePath) -> int | None:
    remove_unfinished(directory)
    numbered = saved_in_bucket(directory) if is_bucket(directory) else _saved(directory)
    for step, saved in reversed(numbered):
        try:
            verify_in_bucket(saved) if is_bucket(saved) else verify(saved)
            return step
        except StoreUnavailable:
            raise
        except (CheckpointError, OSError) as error:
            aside = put_aside(saved) if is_bucket(saved) else _put_aside(saved)
            logger.warning("checkpoint of step %d is damaged and was put aside as %s: %s", step, aside, error)
    if numbered:
        logger.warning("no checkpoint in %s is good; starting from the beginning", directory)
    return None


def _put_aside(saved: Path) -> Path:
    aside = saved.with_name(f"damaged-{saved.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return saved.rename(aside)


def remove_unfinished(directory: StoragePath) -> None:
    """Removes directories that a killed run left half-written, see `atomic_directory`."""
    if is_bucket(directory):
        remove_unfinished_in_bucket(directory)
        return
    for unfinished in directory.glob(".*.partial-*"):
        shutil.rmtree(unfinished)


def restore(checkpoint: Checkpoint, tree: Any, shardings: Any) -> Any:
    """Restores the arrays of a checkpoint.

    Args:
        checkpoint: from `latest`.
        tree: structure of the result; its leaves give shapes and dtypes.
        shardings: shardings of the arrays, in the same structure.

    Raises:
        CheckpointError: the checkpoint has other arrays.
    """
    places = _by_name(shardings)
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name]) for name, leaf in _by_name(tree).items()
    }
    read = _read_chunks if is_chunked(checkpoint.directory) else _read_orbax
    arrays = read(checkpoint.directory, wanted)
    return jax.tree.unflatten(jax.tree.structure(tree), [arrays[name] for name in _by_name(tree)])


def _read_orbax(checkpoint: StoragePath, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    # In a bucket, what was copied from a disk.
    path = (fetch_directory(checkpoint) if is_bucket(checkpoint) else checkpoint) / _ARRAYS
    stored = stored_arrays(path)
    _check_fits(checkpoint, stored, wanted)
    with _reading_at_once(max(CHUNK_BYTES, *(_bytes_to_read(leaf, stored[name]) for name, leaf in wanted.items())) + 1):
        return load_arrays(path, wanted)


def _read_chunks(checkpoint: StoragePath, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    folder, hashes = chunk_files(checkpoint)
    stored = read_metadata(folder, hashes)
    _check_fits(checkpoint, stored, wanted)
    return read_arrays(folder, stored, wanted, hashes)


def _check_fits(checkpoint: StoragePath, stored: Mapping[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
    wrong = sorted(wanted.keys() ^ stored.keys())
    wrong += [name for name in wanted.keys() & stored.keys() if tuple(stored[name].shape) != wanted[name].shape]
    if wrong:
        raise CheckpointError(f"{checkpoint} does not fit this run: {wrong}")


def _in_chunks() -> ocp.Context:
    """Context in which arrays are saved in chunks along the axis that a mesh splits.

    So a device reads only its shard.
    """
    context = all_processes()
    storage = ocp.options.ArrayOptions.Saving.StorageOptions

    def storage_options(key: Any, value: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions:
        axis = split_axis(jax.tree_util.keystr(key, simple=True, separator="/").rpartition("/")[2])
        # Along an axis that it is given, Orbax cuts single entries, and the token table has 250,112
        # of them. The table's longest axis is its first, which Orbax cuts without being told.
        return storage(chunk_byte_size=_chunk_bytes(value), shard_axes=(axis,) if axis else None)

    # Compression hardly makes weights smaller, and takes longer than writing them.
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = storage_options  # type: ignore[assignment]
    return context


def _chunk_bytes(array: jax.Array | np.ndarray) -> int | None:
    """CHUNK_BYTES; None = one chunk, for an array that Orbax could only cut into tiny ones.

    Its chunks are equal, and a table with a prime number of rows, such as multilingual-e5-small's
    250,037, has none between one row and all: a save would take minutes and gigabytes.
    """
    shape = array.sharding.shard_shape(array.shape) if isinstance(array, jax.Array) else array.shape
    longest = max(shape, default=1)
    entry_bytes = math.prod(shape) // longest * array.dtype.itemsize
    most = CHUNK_BYTES // max(entry_bytes, 1)
    if longest <= most or not most:
        return CHUNK_BYTES
    divisor = max(n for n in range(1, most + 1) if longest % n == 0)
    return CHUNK_BYTES if divisor * entry_bytes >= CHUNK_BYTES // 64 else None


def _reading_at_once(most: int) -> ocp.Context:
    """Context that limits the bytes that Orbax reads at the same time.

    Without a limit it reads everything at once, and holds every array twice meanwhile.
    """
    context = all_processes()
    context.memory.read_concurrent_bytes = most
    return context


def _bytes_to_read(leaf: jax.ShapeDtypeStruct, stored: Any) -> int:
    """Maximum bytes of the stored chunks that contain one device's shard of an array."""
    assert leaf.sharding is not None
    part, piece = leaf.sharding.shard_shape(leaf.shape), stored.storage_metadata.chunk_shape
    pieces = [-(-n // size) + (n % size > 0) for n, size in zip(part, piece, strict=True)]
    return math.prod(pieces) * math.prod(piece) * leaf.dtype.itemsize


def _by_name(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _saved(directory: Path) -> list[tuple[int, Path]]:
    found = [path for path in directory.glob("[0-9]*") if path.name.isdecimal()]
    return sorted((int(path.name), path) for path in found)

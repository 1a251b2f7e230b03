"""Training checkpoints in a bucket: objects under a step's name, complete with its manifest.

A bucket cannot rename, so the manifest, which is written last and only if there is none, is what
makes a checkpoint. It has the SHA-256 of what was sent, and the size and tag that the store gave
each object, by which a listing tells whether they are still the same.
"""

import json
import logging
import secrets
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jina_jax.checkpoints.chunked_arrays import (
    ChunkedArray,
    Part,
    Written,
    layouts,
    local_parts,
    write_file,
    write_metadata,
    write_parts,
)
from jina_jax.checkpoints.sealed_directory import FORMAT, MANIFEST, VERSION
from jina_jax.errors import CheckpointError, RunError
from jina_jax.files import dump_json, read_json, sha256
from jina_jax.parallel.processes import asking_main, broadcast_from_main, is_main_process
from jina_jax.storage import BucketPath, StoragePath
from jina_jax.storage.paths import create
from jina_jax.storage.store import ObjectInfo
from jina_jax.storage.upload import move_directory

logger = logging.getLogger(__name__)

ARRAYS = "arrays-"
"""What the name of the folder of a checkpoint's arrays begins with.

Its end differs for each attempt, so what a process of a killed run still writes is in no way.
"""

RUN = "run.json"

Ask = Callable[[int, bytes, Callable[[list[bytes]], list[bytes]]], bytes]


class Save(NamedTuple):
    """A save whose arrays are on this host, and which is still to be written."""

    directory: BucketPath
    arrays: str
    parts: list[Part]
    stored: dict[str, ChunkedArray]
    run: dict[str, Any]
    ask: Ask

    def write(self, check: Callable[[], None], keep: int) -> None:
        """Writes this process's part; the main process completes the checkpoint when all have.

        Args:
            check: raises an error if another run has taken over.
            keep: complete checkpoints to keep, this one included.
        """
        written = write_parts(self.directory / self.arrays, self.parts, self.stored)
        gathered: dict[str, Written] = {}

        def gather(values: list[bytes]) -> list[bytes]:
            for value in values:
                gathered.update({file: Written(*fields) for file, fields in json.loads(zlib.decompress(value)).items()})
            return [b""] * len(values)

        self.ask(0, zlib.compress(json.dumps(written).encode()), gather)
        if is_main_process():
            self._complete(gathered, check)
            for _, old in saved_in_bucket(self.directory.parent)[:-keep]:
                remove(old)

    def _complete(self, chunks: Mapping[str, Written], check: Callable[[], None]) -> None:
        of_arrays = {**chunks, **write_metadata(self.directory / self.arrays, self.stored)}
        files = {f"{self.arrays}/{name}": each for name, each in of_arrays.items()}
        files[RUN] = write_file(self.directory / RUN, dump_json(self.run).encode())
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "files": {name: each.sha256 for name, each in sorted(files.items())},
            "stored": {name: [each.bytes, each.tag] for name, each in sorted(files.items())},
        }
        check()
        if not create(self.directory / MANIFEST, dump_json(manifest).encode()):
            raise RunError(f"{self.directory} has been written by another run meanwhile")


def begin_save(directory: BucketPath, step: int, arrays: Mapping[str, Any], run: dict[str, Any]) -> Save:
    """Copies the arrays' shards of this process to the host; all processes call this together."""
    token = broadcast_from_main(f"checkpoint {step}", lambda: secrets.token_hex(4))
    name = f"checkpoint {step}"
    return Save(directory / f"{step:08d}", f"{ARRAYS}{token}", local_parts(arrays), layouts(arrays), run, asking_main(name))


def is_chunked(checkpoint: StoragePath) -> bool:
    """True if the arrays of a checkpoint are in chunks: it was written into a bucket."""
    return any(name.startswith(ARRAYS) for name in read_json(checkpoint / MANIFEST)["files"])


def chunk_files(checkpoint: StoragePath) -> tuple[StoragePath, dict[str, str]]:
    """Returns the folder of a checkpoint's arrays, and the SHA-256 of each of its files by name."""
    files = read_json(checkpoint / MANIFEST)["files"]
    folder = next(name for name in files if name.startswith(ARRAYS)).partition("/")[0]
    return checkpoint / folder, {name.removeprefix(f"{folder}/"): digest for name, digest in files.items()}


def saved_in_bucket(directory: BucketPath) -> list[tuple[int, BucketPath]]:
    """Returns step and directory of the checkpoints that have a manifest, in order."""
    steps = [path for path in directory.iterdir() if path.name.isdecimal()]
    return sorted((int(path.name), path) for path in steps if (path / MANIFEST).is_file())


def remove_unfinished_in_bucket(directory: BucketPath) -> None:
    """Removes what saves that were killed have left: steps without a manifest."""
    complete = {path for _, path in saved_in_bucket(directory)}
    for path in directory.iterdir():
        if path.name.isdecimal() and path not in complete:
            path.rmtree()


def remove(checkpoint: BucketPath) -> None:
    """Removes a checkpoint, its manifest first: there is never half of one with a manifest."""
    (checkpoint / MANIFEST).unlink()
    checkpoint.rmtree()


def put_aside(checkpoint: BucketPath) -> BucketPath:
    """Gives a damaged checkpoint another name; returns it."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    move_directory(checkpoint, aside, MANIFEST)
    return aside


def verify_in_bucket(checkpoint: BucketPath) -> None:
    """Compares every object with the manifest, by what the store says of it.

    An object of another tag, such as one that was copied from a disk, is read and hashed.

    Raises:
        CheckpointError: objects are missing or differ; the message lists them all.
    """
    manifest = read_json(checkpoint / MANIFEST)
    files, stored = manifest.get("files"), manifest.get("stored", {})
    if manifest.get("format") != FORMAT or not isinstance(files, dict) or not isinstance(stored, dict):
        raise CheckpointError(f"{checkpoint / MANIFEST} is not a manifest of this library")
    there = {path.relative_to(checkpoint).as_posix(): info for path, info in checkpoint.objects()}
    missing = sorted(files.keys() - there.keys())
    present = sorted(files.keys() & there.keys())
    changed = [name for name in present if not _is_same(checkpoint / name, there[name], stored.get(name), files[name])]
    if missing or changed:
        listed = "; ".join(f"{what}: {names}" for what, names in (("missing", missing), ("damaged", changed)) if names)
        raise CheckpointError(f"{checkpoint} is not as it was written: {listed}")


def _is_same(file: BucketPath, info: ObjectInfo, stored: Any, digest: str) -> bool:
    return [info.bytes, info.tag] == stored or sha256(file) == digest

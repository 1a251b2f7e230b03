"""Directories written atomically, and sealed by a manifest with the SHA-256 of every file."""

import contextlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import CheckpointError
from ..files import read_json, sha256, write_json
from ..parallel.processes import broadcast_from_main, is_main_process
from ..storage import StoragePath, as_path, is_bucket
from ..storage.upload import is_unfinished, publish

MANIFEST = "manifest.json"
FORMAT = "jina-jax checkpoint"
VERSION = 1


@contextlib.contextmanager
def atomic_directory(directory: str | StoragePath) -> Iterator[Path]:
    """Yields a new local directory that gets its name when its content is complete.

    Nothing is left on failure. With several processes, the main process creates the directory and
    renames it on exit; all of them write into the same one. A directory in a bucket is copied there
    on exit, with its manifest last; only the main process may call this for one.

    Raises:
        FileExistsError: `directory` exists and is not empty.
    """
    directory = as_path(directory)
    if is_bucket(directory):
        check_free(directory)
        with tempfile.TemporaryDirectory(prefix="jina-jax-") as scratch:
            yield Path(scratch)
            publish(Path(scratch), directory, last=MANIFEST)
        return
    if not is_main_process():
        yield Path(broadcast_from_main(f"write {directory}", str))
        return
    check_free(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Random, not the process id: process ids repeat in containers, and a killed run leaves its
    # directory behind.
    partial = directory.parent / f".{directory.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    broadcast_from_main(f"write {directory}", lambda: str(partial.absolute()))
    try:
        yield partial
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)
    except BaseException:
        _remove(partial)
        raise


def _remove(directory: Path) -> None:
    """Removes what a failed save has left.

    It retries, since Orbax's writers fail one by one, and one of them may recreate the directory.
    """
    for _ in range(10):
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.5)
        if not directory.exists():
            return


def check_free(directory: str | StoragePath) -> None:
    """Raises FileExistsError if `directory` exists and is not an empty directory.

    What an interrupted upload has left in a bucket is removed.
    """
    place = as_path(directory)
    if is_bucket(place) and is_unfinished(place, MANIFEST):
        place.rmtree()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty; choose another name or remove it")


def seal(directory: Path, original: StoragePath | None = None) -> None:
    """Writes the manifest of the current files.

    This is the last step of a save, and the way to accept an edited file. The manifest of a copy
    is written into its original.
    """
    manifest = {"format": FORMAT, "version": VERSION, "files": _hashes(directory, _files(directory))}
    write_json((original or directory) / MANIFEST, manifest)


def verify(directory: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: the manifest is not of this library or version, or files are missing or
            differ from it; the message lists them all.
    """
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
    paths = (path for path in directory.rglob("*") if path.is_file() and not path.name.startswith((MANIFEST, f".{MANIFEST}")))
    return sorted(path.relative_to(directory).as_posix() for path in paths)


def _hashes(directory: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: sha256(directory / name), names), strict=True))

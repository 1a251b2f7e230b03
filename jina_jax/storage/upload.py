"""Writes a local directory into a bucket, so that an interrupted upload is known as one."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .paths import BucketPath, create
from .store import CONCURRENT_REQUESTS

UNFINISHED = ".unfinished"
"""Object that is in a directory while it is written: the first that is there, the last to go."""


def publish(local: Path, remote: BucketPath, last: str) -> None:
    """Copies a local directory into a bucket, and the file `last` after all others.

    Raises:
        FileExistsError: another program has written `last` meanwhile.
    """
    files = local_files(local)
    (remote / UNFINISHED).write_bytes(b"")
    upload(local, remote, [name for name in files if name != last])
    if last in files and not create(remote / last, (local / last).read_bytes()):
        raise FileExistsError(f"{remote} has been written by another program meanwhile; choose another name")
    (remote / UNFINISHED).unlink()


def local_files(directory: Path) -> list[str]:
    """Returns all files below a directory, by their names relative to it."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def upload(local: Path, remote: BucketPath, names: Sequence[str]) -> None:
    """Copies files of a local directory into a bucket, several at a time."""
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        list(pool.map(lambda name: remote.store.upload((remote / name).key, local / name), names))


def is_unfinished(directory: BucketPath, last: str) -> bool:
    """True if a directory is what an interrupted `publish` has left."""
    return (directory / UNFINISHED).is_file() and not (directory / last).is_file()


def move_directory(source: BucketPath, target: BucketPath, last: str) -> None:
    """Gives a directory another name: its objects are copied in the store, and then deleted.

    The file `last` is the last that the target gets and the first that the source loses, so that
    one that has it is complete.
    """
    target.rmtree()
    names = [path.relative_to(source).as_posix() for path, _ in source.objects()]
    ordered = [name for name in names if name != last] + [name for name in names if name == last]

    def copy(name: str) -> None:
        source.store.copy((source / name).key, (target / name).key)

    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        list(pool.map(copy, ordered[:-1]))
    for name in ordered[-1:]:
        copy(name)
    (source / last).unlink()
    source.rmtree()

"""Local copies of what is in buckets, shared by the processes of a host.

A copy is named after the objects that it was made from, with their versions, so a changed object
makes another copy. Processes that want the same one wait for the first to fetch it. The least
recently used copies are removed beyond a limit, but none that a process has open.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .paths import BucketPath
from .store import ObjectInfo

logger = logging.getLogger(__name__)

LIMIT_GB = 50.0
"""Gigabytes of all copies; the environment variable JINA_JAX_CACHE_GB sets another limit."""

_in_use: dict[str, int] = {}
"""Files whose locks this process holds until it ends or lets go, by the name of the copy."""

_fetched: dict[str, str] = {}
"""Objects by the name of their copy."""

_turn = threading.Lock()


def cache_directory() -> Path:
    """JINA_JAX_CACHE, else jina-jax/buckets in the user's cache.

    Raises:
        ValueError: the user has no home directory, and neither variable is set.
    """
    given = os.environ.get("JINA_JAX_CACHE")
    try:
        return Path(given or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "jina-jax" / "buckets").expanduser()
    except RuntimeError as error:
        raise ValueError("there is no home directory for copies of what is in buckets: set JINA_JAX_CACHE") from error


def fetch_directory(directory: BucketPath, wanted: Callable[[Sequence[str]], Sequence[str]] = lambda names: names) -> Path:
    """Returns a local copy of a directory.

    Args:
        directory: in a bucket.
        wanted: selects, of the names of its files, those that are needed.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    found = {path.relative_to(directory).as_posix(): info for path, info in directory.objects()}
    if not found:
        raise FileNotFoundError(f"there is no directory {directory}")
    names = wanted(list(found))
    return _copy(directory, {name: found[name] for name in names})


def fetch_file(file: BucketPath) -> Path:
    """Returns a local copy of an object.

    Raises:
        FileNotFoundError: there is no such object.
    """
    objects = {file.name: file.info()}
    _fetched[_name(file.parent, objects)] = str(file)
    return _copy(file.parent, objects) / file.name


def _copy(directory: BucketPath, objects: dict[str, ObjectInfo]) -> Path:
    cache, name = cache_directory(), _name(directory, objects)
    entry = cache / name
    cache.mkdir(parents=True, exist_ok=True)
    with _turn:
        if name not in _in_use:
            _in_use[name] = _open_lock(cache, name)
        lock = _in_use[name]
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not entry.is_dir():
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not entry.is_dir():  # no other process has fetched it meanwhile
                _make_room(cache, sum(info.bytes for info in objects.values()))
                _fetch(directory, objects, cache / f"{name}.partial", entry)
            fcntl.flock(lock, fcntl.LOCK_SH)
        os.utime(entry)
    return entry


def _name(directory: BucketPath, objects: dict[str, ObjectInfo]) -> str:
    digest = hashlib.sha256(str(directory).encode())
    for name, info in sorted(objects.items()):
        digest.update(f"\n{name} {info.bytes} {info.version}".encode())
    return digest.hexdigest()[:32]


def _open_lock(cache: Path, name: str) -> int:
    return os.open(cache / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _fetch(directory: BucketPath, objects: dict[str, ObjectInfo], partial: Path, entry: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    logger.info("fetching %s (%.1f MB)", directory, sum(info.bytes for info in objects.values()) / 1e6)
    try:

        def download(name: str) -> None:
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            directory.store.download((directory / name).key, target)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(download, objects))
        partial.rename(entry)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _make_room(cache: Path, needed: int) -> None:
    """Removes copies that no process uses, the least recently used first, and leftovers."""
    entries = sorted((path for path in cache.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in entries}
    room = cache_limit() - needed - sum(sizes.values())
    for path in entries:
        if room >= 0 and path.suffix != ".partial":
            continue
        name = path.name.removesuffix(".partial")
        if name in _in_use:
            continue
        lock = _open_lock(cache, name)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
            room += sizes[path]
        except BlockingIOError:
            continue
        finally:
            os.close(lock)


def let_go(file: BucketPath) -> None:
    """Says that this process no longer uses its copy of an object, which may then be removed."""
    with _turn:
        for name in [name for name, url in _fetched.items() if url == str(file) and name in _in_use]:
            os.close(_in_use.pop(name))


def cache_limit() -> float:
    """Bytes of all copies together.

    Raises:
        ValueError: JINA_JAX_CACHE_GB is no number of gigabytes.
    """
    text = os.environ.get("JINA_JAX_CACHE_GB") or str(LIMIT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < 10**9:
        raise ValueError(f"JINA_JAX_CACHE_GB must be a number of gigabytes, not {text!r}")
    return limit * 1e9

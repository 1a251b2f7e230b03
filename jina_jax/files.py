"""Writes files atomically, reads and compares JSON, and tells files and their contents apart.

Files may be local or objects in buckets, see `storage.paths`.
"""

import contextlib
import hashlib
import json
import os
import secrets
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError, JinaJaxError
from .storage import BucketPath, StoragePath, as_path, is_bucket


@contextlib.contextmanager
def atomic_write(path: StoragePath) -> Iterator[Path]:
    """Yields a temporary local path that replaces `path` when the block ends without an error.

    Nothing is left on failure.
    """
    if is_bucket(path):
        with tempfile.TemporaryDirectory(prefix="jina-jax-") as scratch:
            yield (partial := Path(scratch) / path.name)
            path.store.upload(path.key, partial)
        return
    # Random, not the process id: process ids repeat in containers.
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_output_file(path: StoragePath) -> None:
    """Raises, before long work begins, if no file can be written at `path`.

    Raises:
        FileNotFoundError: its directory does not exist.
        IsADirectoryError: `path` is a directory.
        BucketError: there is no such bucket, or permission or credentials are lacking.
    """
    if is_bucket(path):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory")
        return
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory")


def dump_json(fields: Mapping[str, Any]) -> str:
    """Formats a JSON object as it is written to files."""
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def json_diff(saved: Any, now: Any, place: str = "") -> list[str]:
    """Differences between two JSON values, as "stages.0.steps: 100 -> 200"."""
    saved, now = json.loads(json.dumps(saved)), json.loads(json.dumps(now))
    if isinstance(saved, list) and isinstance(now, list):
        saved, now = dict(enumerate(saved)), dict(enumerate(now))
    if not isinstance(saved, dict) or not isinstance(now, dict):
        return [] if saved == now else [f"{place}: {json.dumps(saved)} -> {json.dumps(now)}"]
    keys = [*saved, *(key for key in now if key not in saved)]
    return [line for key in keys for line in json_diff(saved.get(key), now.get(key), f"{place}.{key}".strip("."))]


def read_json(path: StoragePath, error: type[JinaJaxError] = CheckpointError) -> dict[str, Any]:
    """Reads a JSON object; raises `error` where the file holds something else."""
    return _read_json(path, dict, error)


def read_json_list(path: StoragePath, error: type[JinaJaxError] = CheckpointError) -> list[Any]:
    """Reads a JSON array; raises `error` where the file holds something else."""
    return _read_json(path, list, error)


def _read_json(path: StoragePath, kind: type, error: type[JinaJaxError]) -> Any:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}") from None
    except (ValueError, RecursionError) as reason:
        raise error(f"{path} is not JSON: {reason}") from reason
    if not isinstance(value, kind):
        raise error(f"{path} holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def read_json_or_empty(path: StoragePath) -> dict[str, Any]:
    """Reads a JSON object that can be made again; {} if the file is missing or damaged."""
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError, CheckpointError):
        return {}


def write_json(path: StoragePath, fields: dict[str, Any]) -> None:
    """Writes a JSON object atomically."""
    if is_bucket(path):
        path.write_text(dump_json(fields))
        return
    with atomic_write(path) as partial:
        partial.write_text(dump_json(fields), "utf-8")


def sha256(path: StoragePath) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SETTLED_SECONDS = 2
"""Age from which on another change of a file shows in its times, whatever the file system."""


def kept_sha256(path: StoragePath, directory: StoragePath) -> str:
    """SHA-256 of a file, which is read once: the hash is kept in `directory`.

    A kept hash counts while the file has the same stamp. Among its times is that of the last change
    of its metadata, which programs cannot set back.
    """
    record = directory / f"{hashlib.sha256(resolved(path).encode()).hexdigest()[:16]}.sha256.json"
    before, now = file_stamp(path), time.time()
    known = read_json_or_empty(record)
    if before.items() <= known.items() and isinstance(known.get("sha256"), str):
        return known["sha256"]
    digest = sha256(path)
    settled = is_bucket(path) or now - path.stat().st_ctime > SETTLED_SECONDS
    if settled and file_stamp(path) == before:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(record, {"file": str(path)} | before | {"sha256": digest})
    return digest


def file_stamp(path: StoragePath) -> dict[str, Any]:
    """Returns size, inode and times of a file, or size and version of an object; any change of it
    changes one of them."""
    if is_bucket(path):
        info = path.info()
        return {"bytes": info.bytes, "version": info.version}
    stat = path.stat()
    return {"bytes": stat.st_size, "inode": stat.st_ino, "modified": stat.st_mtime_ns, "changed": stat.st_ctime_ns}


def resolved(path: StoragePath) -> str:
    """The path without links."""
    return str(path) if is_bucket(path) else os.path.realpath(path)


def repeated_files(paths: Iterable[str | StoragePath]) -> list[list[str]]:
    """Groups the paths that lead to one file, however they are spelled; without those that differ.

    Raises:
        FileNotFoundError: a path leads to no file.
    """
    same = defaultdict(list)
    for path in paths:
        same[_identity(as_path(path))].append(str(path))
    return [found for found in same.values() if len(found) > 1]


def _identity(path: StoragePath) -> tuple[int, int] | BucketPath:
    if is_bucket(path):
        return path
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def check_not_input(output: StoragePath, inputs: Iterable[str | StoragePath]) -> None:
    """Raises ValueError if a program that reads `inputs` would replace one of them by `output`."""
    for path in map(as_path, inputs):
        if path == output and is_bucket(path) or output.exists() and path.exists() and _identity(output) == _identity(path):
            raise ValueError(f"{output} is the input {path}, which would be lost; give the output another name")

"""Reads and writes remote directories (`gs://...`) through a local copy."""

import atexit
import shutil
import tempfile
from pathlib import Path

from etils import epath


def is_remote(directory: str | Path) -> bool:
    """True if `directory` is a URL such as `gs://...`."""
    return "://" in str(directory)


def fetch(remote: str | Path) -> Path:
    """Copies a remote directory to a local one, which is removed when the process ends.

    Raises:
        FileNotFoundError: the directory does not exist.
    """
    source = epath.Path(remote)
    if not source.is_dir():
        raise FileNotFoundError(f"there is no directory {remote}")
    local = Path(tempfile.mkdtemp(prefix="jina-jax-"))
    atexit.register(shutil.rmtree, local, ignore_errors=True)
    _copy(source, epath.Path(local))
    return local


def publish(local: Path, remote: str | Path, last: str) -> None:
    """Copies a local directory to a remote one, and the file `last` after all others.

    Its presence marks the copy as complete.
    """
    target = epath.Path(remote)
    _copy(epath.Path(local), target, leave_out=last)
    if (local / last).exists():
        epath.Path(local / last).copy(target / last)


def _copy(source: epath.Path, target: epath.Path, leave_out: str | None = None) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        if entry.is_dir():
            _copy(entry, target / entry.name)
        elif entry.name != leave_out:
            entry.copy(target / entry.name, overwrite=True)

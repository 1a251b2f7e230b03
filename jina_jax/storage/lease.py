"""A lock in a bucket: an object that its holder renews, and that is taken over when it does not.

No two clocks are compared. Whether a holder is alive is told from the age of its last renewal by
the store's clock; and of a holder on this host, from its process.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import RunError
from .paths import BucketPath
from .store import ObjectChanged, ObjectInfo

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""Seconds without a renewal after which a holder counts as gone."""

RENEW_SECONDS = 10.0
"""Seconds between two renewals."""


RELEASE_SECONDS = 5.0
"""Seconds for which a release is tried."""


class Lease:
    """A lock that this process holds, and renews in the background until it is released."""

    def __init__(self, path: BucketPath, version: str, fields: dict[str, Any]):
        self._path, self._version, self._fields = path, version, fields
        self._lost: str | None = None
        self._ended, self._turn = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")
        self._thread.start()

    def check(self) -> None:
        """Renews the lease, right before something is done that only its holder may do.

        Raises:
            RunError: another program has taken the lock over.
        """
        self._renew()
        if self._lost is not None:
            raise RunError(self._lost)

    def release(self) -> None:
        """Says that the lock is free; a store that does not answer is not waited for."""
        self._ended.set()
        if self._lost is None and self._turn.acquire(timeout=RELEASE_SECONDS):
            with contextlib.suppress(ValueError, OSError):
                self._path.store.write(self._path.key, _encoded({}), self._version, seconds=RELEASE_SECONDS)
            self._lost = "the lock was released"
            self._turn.release()

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS) and self._lost is None:
            try:
                self._renew()
            except (ValueError, OSError) as error:  # a store that is away: what needs it next says so
                logger.warning("%s could not be renewed: %s", self._path, error)

    def _renew(self) -> None:
        with self._turn:
            if self._lost is not None:
                return
            self._fields["renewals"] += 1
            try:
                self._version = self._path.store.write(self._path.key, _encoded(self._fields), self._version).version
            except ObjectChanged:
                self._lost = f"another process has taken {self._path.parent} over; this one ends"


@contextlib.contextmanager
def hold(path: BucketPath, busy: str) -> Iterator[Lease]:
    """Holds the lock that an object stands for while the block runs.

    A holder that is gone is waited for, up to LEASE_SECONDS since its last renewal.

    Args:
        path: the object.
        busy: message of the error.

    Raises:
        RunError: another process holds the lock.
    """
    fields = _this_process() | {"holder": secrets.token_hex(8), "renewals": 0}
    lease = Lease(path, _acquire(path, fields, busy), fields)
    try:
        yield lease
    finally:
        lease.release()


def _acquire(path: BucketPath, fields: dict[str, Any], busy: str) -> str:
    """Returns the version of the object that this process has written."""
    store, key = path.store, path.key
    with contextlib.suppress(ObjectChanged):
        return store.write(key, _encoded(fields), version="").version
    seen: ObjectInfo | None = None
    patience = 0.0
    while True:
        found = path.info()
        if seen is not None and found.version != seen.version and not _is_free(path):
            raise RunError(busy)  # somebody renews it
        if seen is None:
            patience = LEASE_SECONDS - (_time_of(path) - found.updated)
        if _is_free(path) or patience <= 0:
            try:
                return store.write(key, _encoded(fields), found.version).version
            except ObjectChanged:
                raise RunError(busy) from None
        if seen is None:
            logger.warning("%s is locked; waiting up to %.0f s for a sign of life of its holder", path.parent, patience)
        seen, pause = found, min(patience, 2.0)
        time.sleep(pause)
        patience -= pause


def _is_free(path: BucketPath) -> bool:
    """True if a lock was released, or its holder was a process of this host that has ended."""
    try:
        fields = json.loads(path.read_bytes())
    except ValueError:
        return False
    if not isinstance(fields, dict) or not fields:
        return isinstance(fields, dict)
    here = _this_process()
    if any(fields.get(name) != here[name] for name in ("host", "boot", "namespace")):
        return False
    return _started(fields.get("pid")) != fields.get("started")


def _time_of(path: BucketPath) -> float:
    """The time by the store's clock: that of an object written now."""
    probe = path.with_name(f"{path.name}.clock-{secrets.token_hex(4)}")
    probe.write_bytes(b"")
    try:
        return probe.info().updated
    finally:
        probe.unlink()


def _this_process() -> dict[str, Any]:
    """Where a process runs, and which it is: ids repeat in containers and after a restart."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "namespace": os.readlink(namespace) if namespace.exists() else "",
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _started(pid: Any) -> str | None:
    """Start time of a process of this host, or None if there is none."""
    try:
        state, *rest = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return None
    return None if state == "Z" else rest[18]


def _encoded(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode()

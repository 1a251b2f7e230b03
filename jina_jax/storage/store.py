"""What the two kinds of object store have in common: operations, errors and retries.

Cloud Storage is spoken to by google-cloud-storage and S3 by boto3, the vendors' own clients. Of the
libraries that speak to both, TensorStore's drivers send no checksum to Cloud Storage and list no
sizes or hashes; obstore needs Cloud Storage's XML API for its preconditions, which no emulator has,
so that the lock could not be tested; and gcsfs and s3fs know no write under the condition that an
object is still the one that was read, cache listings, and give up after six attempts. The vendors'
clients have preconditions, checksums that the store verifies on upload, and every way of finding
credentials that their documentation names.

Their own retries differ, so the retries here are ours: exponential backoff with jitter, up to
JINA_JAX_BUCKET_SECONDS for an operation.
"""

import base64
import hashlib
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from ..errors import BucketError, how_to_install

BUCKET_SECONDS = 300.0
"""Seconds for which an operation is tried again while a store does not answer.

The environment variable JINA_JAX_BUCKET_SECONDS sets another limit.
"""

REQUEST_TIMEOUT = (5, 60)
"""Seconds to connect, and between two bytes, before a request counts as failed."""

CONCURRENT_REQUESTS = 16
"""Requests of a process at the same time."""

PART_BYTES = 8 * 2**20
"""Bytes of an object that are read or written in one request."""

FIRST_DELAY, LONGEST_DELAY = 0.2, 15.0

Problem = Literal["transient", "missing", "changed", "denied", "credentials", "refused"]
"""Kind of a request's failure: the store does not answer, there is no such object or bucket, a
precondition does not hold, permission or credentials are lacking, or anything else it says."""

T = TypeVar("T")


class ObjectInfo(NamedTuple):
    """An object as its store describes it."""

    key: str
    bytes: int
    version: str
    """Changes whenever the object is written: a generation (gs) or an ETag (s3)."""
    tag: str
    """Follows from its content, and the way in which that was written: an MD5 (gs) or ETag (s3)."""
    md5: str | None
    """Of its content, in hexadecimal; None where it is not known to be one.

    The ETag of an S3 object in a listing counts as one, and is another where KMS encrypts.
    """
    updated: float
    """Time of the last write by the store's clock, in seconds."""


class ObjectChanged(BucketError):
    """A precondition that does not hold: another program has written the object."""


class StoreUnavailable(OSError):
    """A store that has not answered within the limit, however often it was asked."""


class Store(ABC):
    """A bucket. Every operation retries what may pass, and raises one kind of error for the rest.

    Raises, beside what an operation names:
        BucketError: there is no such bucket, or permission or credentials are lacking.
        StoreUnavailable: the store has not answered within JINA_JAX_BUCKET_SECONDS.
    """

    scheme: str
    deleted_at_once: int
    """Most objects that one request deletes."""

    def __init__(self, bucket: str):
        self.bucket = bucket

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.bucket}"

    # ---- one request each, by the client

    @abstractmethod
    def _stat(self, key: str) -> ObjectInfo: ...

    @abstractmethod
    def _read(self, key: str, start: int, end: int | None, version: str | None) -> bytes: ...

    @abstractmethod
    def _write(self, key: str, data: bytes, version: str | None) -> ObjectInfo:
        """Writes an object; "" as the version = if there is none, None = whatever is there."""

    @abstractmethod
    def _upload(self, key: str, file: Path) -> None: ...

    @abstractmethod
    def _copy(self, key: str, to: str) -> None: ...

    @abstractmethod
    def _delete(self, keys: Sequence[str]) -> None:
        """Deletes objects; those that are gone are no error."""

    @abstractmethod
    def _list(self, prefix: str, delimiter: str | None, page: str | None) -> tuple[list[ObjectInfo], list[str], str | None]:
        """Returns a page: its objects, prefixes up to the delimiter, and the next page's token."""

    @abstractmethod
    def _problem(self, error: Exception) -> Problem | None: ...

    # ---- operations

    def stat(self, key: str) -> ObjectInfo | None:
        """Returns what the store knows of an object; None if there is none."""
        try:
            return self._retried("read", key, lambda: self._stat(key))
        except FileNotFoundError:
            return None

    def read(self, key: str, start: int = 0, end: int | None = None, version: str | None = None) -> bytes:
        """Returns bytes of an object.

        Args:
            key: of the object.
            start, end: first byte, and the one behind the last; None = to the end.
            version: that the object must have.

        Raises:
            FileNotFoundError: there is no such object.
            ObjectChanged: it has another version.
        """
        if end is not None and end <= start:
            return b""
        return self._retried("read", key, lambda: self._read(key, start, end, version))

    def write(self, key: str, data: bytes, version: str | None = None, *, seconds: float | None = None) -> ObjectInfo:
        """Writes an object in one request; the store verifies its checksum.

        Args:
            key: of the object.
            data: its content.
            version: that the object must have now; "" = it must not exist. None = any.
            seconds: for which it is tried; None = JINA_JAX_BUCKET_SECONDS.

        Raises:
            ObjectChanged: it has another version, or exists.
        """
        tries, wanted = 0, version

        def attempt() -> ObjectInfo:
            nonlocal tries, wanted
            tries += 1
            written = self._write(key, data, wanted)
            if written.md5 not in (None, md5(data)):
                # What is replaced is what this attempt has written.
                wanted = None if version is None else written.version
                raise ConnectionError(f"{self.url}/{key} has arrived with other bytes than were sent")
            return written

        try:
            return self._retried("write", key, attempt, seconds)
        except ObjectChanged:
            # A write that succeeded is tried again if its answer was lost.
            if tries > 1 and (there := self.stat(key)) and there.bytes == len(data) and self.read(key) == data:
                return there
            raise

    def upload(self, key: str, file: Path) -> None:
        """Writes a file as an object, in parts if it is large."""
        size = file.stat().st_size
        if size <= PART_BYTES:
            self.write(key, file.read_bytes())
        else:
            self._retried("write", key, lambda: self._upload(key, file))

    def download(self, key: str, file: Path) -> ObjectInfo:
        """Writes an object into a file, in parts that are read at the same time.

        Raises:
            FileNotFoundError: there is no such object.
            ObjectChanged: it was written meanwhile.
        """
        info = self.stat(key)
        if info is None:
            raise FileNotFoundError(f"there is no {self.url}/{key}")
        with file.open("wb") as target, ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            target.truncate(info.bytes)

            def part(start: int) -> None:
                end = min(start + PART_BYTES, info.bytes)
                data = self.read(key, start, end, info.version)
                if len(data) != end - start:
                    raise StoreUnavailable(f"{self.url}/{key} was cut off at byte {start + len(data)}")
                os.pwrite(target.fileno(), data, start)

            list(pool.map(part, range(0, info.bytes, PART_BYTES)))
        if info.md5 is not None:
            with file.open("rb") as source:
                if hashlib.file_digest(source, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() != info.md5:
                    raise StoreUnavailable(f"{self.url}/{key} has arrived damaged")
        return info

    def copy(self, key: str, to: str) -> None:
        """Copies an object within the bucket; its bytes do not leave the store."""
        self._retried("write", to, lambda: self._copy(key, to))

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects; those that are gone are no error."""
        groups = [keys[first : first + self.deleted_at_once] for first in range(0, len(keys), self.deleted_at_once)]

        def delete(group: Sequence[str]) -> None:
            self._retried("delete", group[0], lambda: self._delete(group))

        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            list(pool.map(delete, groups))

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yields all objects whose key begins with a prefix, in the order of their keys."""
        for objects, _ in self._pages(prefix, None):
            yield from objects

    def children(self, prefix: str) -> tuple[list[ObjectInfo], list[str]]:
        """Returns the objects right under a prefix, and the prefixes under it, as directories."""
        pages = list(self._pages(prefix, "/"))
        return [info for objects, _ in pages for info in objects], [each for _, prefixes in pages for each in prefixes]

    def has(self, prefix: str) -> bool:
        """True if any key begins with a prefix."""
        objects, prefixes = next(self._pages(prefix, None))
        return bool(objects or prefixes)

    def _pages(self, prefix: str, delimiter: str | None) -> Iterator[tuple[list[ObjectInfo], list[str]]]:
        page: str | None = None
        while True:
            objects, prefixes, page = self._retried("list", prefix, lambda page=page: self._list(prefix, delimiter, page))
            yield [info for info in objects if not info.key.endswith("/")], prefixes
            if page is None:
                return

    def _retried(self, what: str, key: str, request: Callable[[], T], seconds: float | None = None) -> T:
        """Makes a request until it succeeds, fails for good, or the time is over."""
        began, limit, delay = time.monotonic(), _limit() if seconds is None else seconds, FIRST_DELAY
        place = f"{self.url}/{key}"
        while True:
            try:
                return request()
            except Exception as error:
                match self._problem(error):
                    case "transient":
                        if time.monotonic() - began + delay > limit:
                            raise StoreUnavailable(
                                f"{place} could not be {_DONE[what]} for {limit:g} seconds: {_short(error)}"
                            ) from error
                    case "missing" if what == "read":
                        raise FileNotFoundError(f"there is no {place}") from error
                    case "missing":
                        raise BucketError(f"there is no bucket {self.url}: create it, or give another") from error
                    case "changed":
                        raise ObjectChanged(f"{place} is not what it was: another program has written it") from error
                    case "denied":
                        raise BucketError(f"no permission to {what} {place}: {_short(error)}") from error
                    case "credentials":
                        raise self._no_credentials(error) from error
                    case "refused":
                        raise BucketError(f"{place} could not be {_DONE[what]}: {_short(error)}") from error
                    case None:
                        raise
            time.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(2 * delay, LONGEST_DELAY)

    @abstractmethod
    def _no_credentials(self, error: Exception) -> BucketError: ...


_DONE = {"read": "read", "write": "written", "delete": "deleted", "list": "listed"}


def md5(data: bytes) -> str:
    """MD5 of bytes in hexadecimal, which stores keep of their objects."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def md5_from_base64(text: str | None) -> str | None:
    return base64.b64decode(text).hex() if text else None


def missing_package(scheme: str, extra: str) -> BucketError:
    """Error of a path whose client is not installed."""
    return BucketError(f"{scheme}:// paths need an extra: {how_to_install(extra)}")


def _limit() -> float:
    text = os.environ.get("JINA_JAX_BUCKET_SECONDS") or str(BUCKET_SECONDS)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit <= 10**9:
        raise ValueError(f"JINA_JAX_BUCKET_SECONDS must be a number of seconds, not {text!r}")
    return limit


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."

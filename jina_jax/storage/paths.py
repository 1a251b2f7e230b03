"""The one place that decides what a path is.

A path is local, a `pathlib.Path`, or in a bucket: gs://BUCKET/KEY or s3://BUCKET/KEY, a
`BucketPath`. Both have the methods that this library uses, so most code takes either. They differ
in what they can do, and code that needs one of these asks `is_bucket`:

              rename          append    lock          create under a precondition    whole when
  local       atomically      yes       flock         by a link                      it has its name
  bucket      no, only copy   no        no, a lease   yes                            it is written

A bucket has no directories: a directory is there if an object lies under it, and is made by that.
"""

import fnmatch
import io
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from typing_extensions import TypeIs

from .store import PART_BYTES, ObjectChanged, ObjectInfo, Store

SCHEMES = ("gs", "s3")


class BucketPath:
    """An object in a bucket, or a prefix of objects as a directory, with the methods of `Path`."""

    def __init__(self, scheme: str, bucket: str, key: str = ""):
        self.scheme, self.bucket, self.key = scheme, bucket, key

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __repr__(self) -> str:
        return f"BucketPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: "BucketPath") -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str) -> "BucketPath":
        return BucketPath(self.scheme, self.bucket, f"{self.key}/{name}".strip("/"))

    @property
    def store(self) -> Store:
        """The bucket, and the client that this process has for it."""
        return _store(self.scheme, self.bucket, os.getpid())

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.key).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> "BucketPath":
        return BucketPath(self.scheme, self.bucket, self.key.rpartition("/")[0])

    @property
    def parents(self) -> Sequence["BucketPath"]:
        return [] if not self.key else [self.parent, *self.parent.parents]

    @property
    def prefix(self) -> str:
        """What the keys of the objects in this directory begin with."""
        return f"{self.key}/" if self.key else ""

    def with_name(self, name: str) -> "BucketPath":
        return self.parent / name

    def relative_to(self, directory: "BucketPath") -> PurePosixPath:
        return PurePosixPath(self.key).relative_to(directory.key)

    def absolute(self) -> "BucketPath":
        return self

    def expanduser(self) -> "BucketPath":
        return self

    # ---- what is there

    def info(self) -> ObjectInfo:
        """Size, version and hash of the object.

        Raises:
            FileNotFoundError: there is none.
        """
        found = self.store.stat(self.key) if self.key else None
        if found is None:
            self.is_dir()  # a bucket that does not exist is an error here, and not to `stat`
            raise FileNotFoundError(f"there is no {self}")
        return found

    def is_file(self) -> bool:
        return bool(self.key) and self.store.stat(self.key) is not None

    def is_dir(self) -> bool:
        return self.store.has(self.prefix)

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator["BucketPath"]:
        objects, prefixes = self.store.children(self.prefix)
        for key in sorted([info.key for info in objects] + [prefix.rstrip("/") for prefix in prefixes]):
            yield BucketPath(self.scheme, self.bucket, key)

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yields what matches a pattern such as *.json or */*.json, level by level."""
        first, _, rest = pattern.partition("/")
        for path in self.iterdir():
            if fnmatch.fnmatchcase(path.name, first):
                if rest:
                    yield from path.glob(rest)
                else:
                    yield path

    def objects(self) -> Iterator[tuple["BucketPath", ObjectInfo]]:
        """Yields all objects under this directory, with what the store knows of them."""
        for info in self.store.objects(self.prefix):
            yield BucketPath(self.scheme, self.bucket, info.key), info

    # ---- contents

    def read_bytes(self) -> bytes:
        return self.store.read(self.key)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> ObjectInfo:
        return self.store.write(self.key, data)

    def write_text(self, text: str, encoding: str = "utf-8") -> ObjectInfo:
        return self.write_bytes(text.encode(encoding))

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Opens the object for reading, by ranges: no more than a part of it is in memory."""
        if mode != "rb":
            raise ValueError(f"objects are opened with mode 'rb', not {mode!r}")
        return io.BufferedReader(_ObjectReader(self), PART_BYTES)

    def unlink(self, missing_ok: bool = False) -> None:
        self.store.delete([self.key])

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a directory is there as soon as an object is."""

    def rmtree(self) -> None:
        """Deletes every object under this directory."""
        self.store.delete([info.key for info in self.store.objects(self.prefix)])


StoragePath = Path | BucketPath
"""Where a file or a directory may be."""


class _ObjectReader(io.RawIOBase):
    """Reads an object by ranges, of the version that it had when it was opened."""

    def __init__(self, path: BucketPath):
        self._path, self._info, self._at = path, path.info(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._info.bytes}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._info.bytes)
        data = self._path.store.read(self._path.key, self._at, end, self._info.version)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def is_bucket(path: object) -> TypeIs[BucketPath]:
    """True if a path is in a bucket, where nothing can be renamed, appended to or locked."""
    return isinstance(path, BucketPath)


def as_path(path: "str | StoragePath") -> StoragePath:
    """Returns the path that a string names, local or in a bucket.

    Raises:
        ValueError: it is a URL that names no place in a bucket.
    """
    if isinstance(path, BucketPath):
        return path
    text = str(path)
    if isinstance(path, Path):
        if text.partition(":/")[0] in SCHEMES and ":/" in text:
            raise ValueError(f"{text} was a URL before it became a pathlib.Path; give it as a string")
        return path
    if "://" not in text:
        return Path(text)
    scheme, _, rest = text.partition("://")
    if scheme not in SCHEMES:
        raise ValueError(
            f"{text} is at no known store; buckets are named {' or '.join(f'{each}://BUCKET/KEY' for each in SCHEMES)}"
        )
    bucket, _, key = rest.partition("/")
    key = key.rstrip("/")
    if not bucket or not bucket.isascii() or not bucket.replace("-", "").replace(".", "").replace("_", "").isalnum():
        raise ValueError(f"{text} names no bucket: write {scheme}://BUCKET/KEY")
    if any(part in ("", ".", "..") for part in key.split("/")) and key or not key.isprintable():
        raise ValueError(f"{text} has an empty part, . or .., or a character that cannot be printed, in its key")
    return BucketPath(scheme, bucket, key)


def expand(pattern: str) -> list[str]:
    """Returns the objects that match a pattern in a bucket, such as gs://b/texts/*.parquet.

    A path without *, and a local one, which the shell has expanded, is returned as it is. So is the
    name of an object that itself has a *.

    Raises:
        FileNotFoundError: none matches.
    """
    path = as_path(pattern)
    if not is_bucket(path) or "*" not in pattern or path.is_file():
        return [pattern]
    parts = path.key.split("/")
    fixed = next(place for place, part in enumerate(parts) if "*" in part)
    directory = BucketPath(path.scheme, path.bucket, "/".join(parts[:fixed]))
    # [ and ? are common in names, and stand for themselves.
    escaped = "/".join(parts[fixed:]).replace("[", "[[]").replace("?", "[?]")
    found = [str(each) for each in directory.glob(escaped) if each.is_file()]
    if not found:
        raise FileNotFoundError(f"no object matches {pattern}")
    return found


def create(path: StoragePath, data: bytes) -> bool:
    """Writes a file only if there is none; returns False, and leaves it as it is, if there is.

    Of several programs that create the same file, one gets True.
    """
    if is_bucket(path):
        try:
            path.store.write(path.key, data, version="")
        except ObjectChanged:
            return False
        return True
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


@lru_cache(maxsize=64)
def _store(scheme: str, bucket: str, process: int) -> Store:
    """Returns this process's client for a bucket; clients do not outlive a fork."""
    if scheme == "gs":
        from .gcs import GoogleStore

        return GoogleStore(bucket)
    from .s3 import S3Store

    return S3Store(bucket)


def check_file(path: StoragePath) -> None:
    """Raises FileNotFoundError if there is no such file, and BucketError if there is no bucket."""
    if is_bucket(path):
        path.info()
    elif not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")

"""TFDS datasets of training records, as ArrayRecord files, written and read without TensorFlow.

`RecordFiles` is made from a user's files of records, `DebianPackages` from the bundled corpus.
`open_dataset` gives random access to either.
"""

import contextlib
import hashlib
import io
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jina_jax.errors import BucketError, DataError
from jina_jax.storage import BucketPath, StoragePath, as_path, is_bucket
from jina_jax.storage.cache import fetch_directory
from jina_jax.storage.store import StoreUnavailable
from jina_jax.storage.upload import publish

from .cached_shards import CachedShards, Shard
from .corpus import BUNDLED, SPLITS, read_corpus
from .corpus_records import CORPUS_RECORDS
from .records import KINDS, Pair, Record, kind_named, read_records
from .word_overlap import overlaps

DESCRIPTION = "dataset_info.json"

HASHES = "records_sha256"
"""Key of the dataset's metadata under which each split has the SHA-256 of its records."""


class RecordFiles(tfds.core.GeneratorBasedBuilder):
    """A user's records of one kind, from files that `records.read_records` reads."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, kind: str, files: dict[str, list[StoragePath]], skip: Callable[[Record], bool], **arguments: Any):
        self.kind, self.files, self.skip = kind, files, skip
        super().__init__(**arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, self.kind)

    def _split_generators(self, _: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        return {split: self._generate_examples(split) for split in self.files}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        records = (record for file in self.files[split] for record in read_records(file, self.kind))
        yield from _examples(self, split, (record for record in records if not self.skip(record)))


class DebianPackages(tfds.core.GeneratorBasedBuilder):
    """The bundled corpus as records; each configuration is one of `CORPUS_RECORDS`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=name) for name in ("texts", "pairs", "translations", "searches", "scored", "labelled")
    ]

    def __init__(self, *, file: Path = BUNDLED, **arguments: Any):
        self.file = file
        super().__init__(**arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, CORPUS_RECORDS[self._name()][0])

    def _split_generators(self, _: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        records = CORPUS_RECORDS[self._name()][1](read_corpus(self.file, split))
        yield from _examples(self, split, records)

    def _name(self) -> str:
        assert self.builder_config is not None and self.builder_config.name is not None
        return self.builder_config.name


def prepare_records(
    files: dict[str, list[StoragePath]], kind: str, directory: StoragePath, *, drop_overlapping: bool = False
) -> StoragePath:
    """Turns files of records into a TFDS dataset.

    Args:
        files: files of records of each split, in any format that `records.read_records` reads.
        kind: one of `records.KINDS`.
        directory: directory under which the dataset is written, local or in a bucket.
        drop_overlapping: leave out pairs whose texts share nearly all words (`word_overlap.py`).

    Returns:
        The directory of the dataset itself, as `open_dataset` takes it.

    Raises:
        DataError: a malformed record, with file and line, in which case there is no dataset; or a
            split without records.
        ValueError: unknown kind, or `drop_overlapping` for records that are not pairs or triplets.
    """
    kind_named(kind)
    if drop_overlapping and not issubclass(KINDS[kind], Pair):
        raise ValueError(f"overlapping texts are dropped from pair and triplet records, not from {kind} records")

    def skip(record: Record) -> bool:
        return drop_overlapping and isinstance(record, Pair) and overlaps(record.anchor, record.positive)

    make = partial(RecordFiles, kind=kind, files=files, skip=skip)
    return _prepared(make, directory, itertools.chain(*files.values()))


def prepare_corpus(name: str, directory: StoragePath, file: Path = BUNDLED) -> StoragePath:
    """Turns the corpus into a TFDS dataset of records; returns its directory.

    Args:
        name: one of `CORPUS_RECORDS`.
        directory: directory under which the dataset is written, local or in a bucket.
        file: the corpus, as `read_corpus` takes it.
    """
    if name not in CORPUS_RECORDS:
        raise ValueError(f"unknown records {name!r}; valid are {list(CORPUS_RECORDS)}")
    return _prepared(partial(DebianPackages, config=name, file=file), directory, [file])


class RecordSource(Sequence[Record]):
    """Random access to the records of one split, shuffled by TFDS always in the same way.

    Attributes:
        sha256: hash of the records, made when they were written; None for a dataset that an earlier
            version prepared.
    """

    def __init__(self, source: Any, kind: str, path: StoragePath, sha256: str | None = None):
        self._source, self._record, self._path, self.sha256 = source, KINDS[kind], path, sha256

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        with self._damage(f"record {index}"):
            return self._made(self._source[int(index)])

    def __iter__(self) -> Iterator[Record]:
        return self.many(range(len(self)))

    def many(self, indices: Sequence[int] | np.ndarray) -> Iterator[Record]:
        """Yields records that are read together, several times as fast as one by one."""
        for start in range(0, len(indices), 1024):
            block = [int(index) for index in indices[start : start + 1024]]
            with self._damage(f"one of the records {min(block)} to {max(block)}"):
                read = self._source.__getitems__(block)
            yield from map(self._made, read)

    def _made(self, fields: dict[str, Any]) -> Record:
        # Text comes as bytes.
        return self._record.model_construct(**{name: _text(value) for name, value in fields.items()})

    @contextlib.contextmanager
    def _damage(self, where: str) -> Iterator[None]:
        try:
            yield
        except (BucketError, StoreUnavailable):
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{self._path} is damaged: {where} cannot be read: {error}") from error


def open_dataset(path: str | StoragePath, kind: str, split: str) -> RecordSource:
    """Opens one split of a TFDS directory, local or in a bucket.

    Raises:
        FileNotFoundError: no such directory.
        DataError: it is not a dataset, has another kind, lacks this split or records, or is
            truncated.
    """
    path = as_path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no dataset {path}")
    try:
        described = fetch_directory(path, _descriptions) if is_bucket(path) else path
        builder = tfds.builder_from_directory(str(described))
        hashes = dict(builder.info.metadata or {}).get(HASHES, {})  # type: ignore[call-overload]
    except (BucketError, StoreUnavailable):
        raise
    except Exception as error:  # raised by TFDS, the JSON reader or protobuf
        raise DataError(f"{path} is not a TFDS dataset: {error}") from error
    fields = set(builder.info.features or ())  # type: ignore[arg-type]
    # Fields that may be left out came into being one after the other.
    required = {name for name, field in kind_named(kind).model_fields.items() if field.is_required()}
    if missing := sorted(required - fields):
        raise DataError(f"{path} holds no {kind} records: they lack {missing}, and have {sorted(fields)}")
    if split not in builder.info.splits:
        raise DataError(f"{path} has no split {split!r}; it has {sorted(builder.info.splits)}")
    expected = builder.info.splits[split].num_examples
    try:
        source: Any = _in_bucket(path, builder, split) if is_bucket(path) else builder.as_data_source(split=split)  # type: ignore[call-arg]
        held = len(source)
        if held and held == expected:
            source[held - 1]
    except (BucketError, StoreUnavailable):
        raise
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if held != expected or not held:
        raise DataError(f"{path} holds {held} records of {split!r}, its own count is {expected}: it is damaged or empty")
    return RecordSource(source, kind, path, hashes.get(split))


class _OwnInfo(tfds.core.DatasetInfo):
    """Of a dataset that is made here: TFDS would ask its own bucket, over the network, whether it
    has the dataset, and leave a temporary directory behind."""

    def initialize_from_bucket(self) -> None:
        pass


def _info(builder: Any, kind: str) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict(_features(KINDS[kind]))
    return _OwnInfo(builder=builder, features=features, metadata=tfds.core.MetadataDict())


def _examples(builder: Any, split: str, records: Iterable[Record]) -> Iterator[tuple[int, dict]]:
    """Yields the records' fields by number; puts their hash into the dataset's metadata at the end.

    The hash is of what a run learns from, in its order, and not of the files that it came from.
    """
    digest = hashlib.sha256()
    for number, record in enumerate(records):
        digest.update(json.dumps(record.model_dump(exclude_defaults=True), sort_keys=True).encode() + b"\n")
        yield number, _fields(record)
    builder.info.metadata.setdefault(HASHES, {})[split] = digest.hexdigest()


def _features(record: type[Record]) -> dict[str, Any]:
    # Without an encoding of its own, TFDS would store every float in 32 bits.
    score = tfds.features.Tensor(shape=(), dtype=np.float64, encoding=tfds.features.Encoding.BYTES)
    texts = tfds.features.Sequence(tfds.features.Text())
    own = {"negatives": texts, "negative_groups": texts, "score": score}
    return {name: own.get(name, tfds.features.Text()) for name in record.model_fields}


def _fields(record: Record) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in record.model_dump().items()}


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        return value.item()
    return tuple(map(_text, value)) if isinstance(value, list | np.ndarray) else value


def _descriptions(names: Sequence[str]) -> list[str]:
    """Those files of a dataset that describe it."""
    return [name for name in names if name.endswith(".json")]


def _in_bucket(path: BucketPath, builder: Any, split: str) -> CachedShards:
    """Opens the records of a split whose files are in a bucket.

    Raises:
        ValueError: a file is missing, or parts of files are asked for.
    """
    sizes = {file.name: info.bytes for file, info in path.objects()}
    shards = []
    for part in builder.info.splits[split].file_instructions:
        name = Path(part.filename).name
        if name not in sizes:
            raise ValueError(f"{name} is missing")
        if part.skip or part.take not in (-1, part.examples_in_shard):
            raise ValueError(f"{split} is a part of {name}; give a whole split")
        shards.append(Shard(path / name, part.examples_in_shard, sizes[name]))
    return CachedShards(shards, builder.info.features.deserialize_example_np)


def _prepared(make: Callable[..., Any], directory: StoragePath, files: Iterable[StoragePath]) -> StoragePath:
    """Writes a builder's dataset, unless it exists; returns its directory.

    An unfinished one has another name and is written again. One for a bucket is written locally
    and copied, with its description last.
    """
    if not is_bucket(directory):
        return _built(make(data_dir=directory, file_format="array_record"), files)
    with tempfile.TemporaryDirectory(prefix="jina-jax-") as scratch:
        local = _built(make(data_dir=scratch, file_format="array_record"), files)
        target = directory / local.relative_to(scratch).as_posix()
        if not is_dataset(target):
            target.rmtree()  # what was left of a killed program
            publish(local, target, DESCRIPTION)
    return target


def is_dataset(directory: StoragePath) -> bool:
    """True if a prepared dataset is complete."""
    return (directory / DESCRIPTION).is_file()


def _built(builder: Any, files: Iterable[StoragePath]) -> Path:
    tfds.disable_progress_bar()
    local = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        # TFDS prints messages about a download.
        with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_dir=downloads, download_config=local)
    except AssertionError as error:  # raised by TFDS for a split without records
        raise DataError(f"no records for a split of {builder.data_dir} in {', '.join(map(str, files))}") from error
    return Path(builder.data_dir)

"""Arrays as chunks, an object each, which every process writes and reads without the others.

This is the layout of a checkpoint in a bucket: a zarr 3 group with consolidated metadata, whose
chunks are bytes in C order, little-endian, not compressed. Orbax's own files need renames, or a
pass that merges them. Here the bytes of a chunk are known before they are sent, so their hash is of
what was sent; a process writes the shards of its devices, and reads the chunks that overlap them.
"""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import CheckpointError
from ..parallel.mesh import split_axis
from ..storage import BucketPath, StoragePath
from ..storage.store import CONCURRENT_REQUESTS, PART_BYTES

METADATA = "zarr.json"

READ_BYTES = 256 * 2**20
"""Bytes of arrays that are read at the same time, unless one array alone has more."""

ATTEMPTS = 3
"""Times that a chunk is read before its checkpoint counts as damaged."""


class Part(NamedTuple):
    """A piece of an array that this process holds, copied to the host."""

    name: str
    start: tuple[int, ...]
    data: np.ndarray


class ChunkedArray(NamedTuple):
    """Shape, dtype and chunks of a stored array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]

    def file(self, name: str, index: tuple[int, ...]) -> str:
        """Name of a chunk's file in the directory of the arrays."""
        return "/".join([name, "c", *map(str, index)])

    def overlapping(self, start: tuple[int, ...], stop: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Indices of the chunks that overlap a region."""
        spans = zip(start, stop, self.chunk, strict=True)
        return itertools.product(*(range(low // size, -(-high // size)) for low, high, size in spans))


class Written(NamedTuple):
    """A file as it was sent, and as the store has it."""

    sha256: str
    bytes: int
    tag: str


# ---- writing


def local_parts(arrays: Mapping[str, Any]) -> list[Part]:
    """Copies what this process is to write of some arrays: one copy of each of their shards.

    Arrays of the host are taken as they are.
    """
    parts = []
    for name, array in arrays.items():
        if isinstance(array, np.ndarray):
            parts.append(Part(name, (0,) * array.ndim, array))
            continue
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                start = tuple(each.start or 0 for each in shard.index)
                parts.append(Part(name, start, np.array(shard.data)))
    return parts


def layouts(arrays: Mapping[str, Any]) -> dict[str, ChunkedArray]:
    """Chooses the chunks of arrays, by name: none lies in two shards."""
    found = {}
    for name, array in arrays.items():
        shape, dtype = tuple(array.shape), np.dtype(array.dtype)
        shard = array.sharding.shard_shape(shape) if isinstance(array, jax.Array) else shape
        found[name] = ChunkedArray(shape, dtype, _chunk(name, shape, shard, dtype.itemsize))
    return found


def _chunk(name: str, shape: tuple[int, ...], shard: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Cuts a shard to PART_BYTES, along the axis that a mesh splits first.

    So a device of another mesh reads little more than its shard.
    """
    chunk = [max(size, 1) for size in shard]
    split = split_axis(name.rpartition("/")[2])
    for axis in ([] if split is None else [split]) + [axis for axis in range(len(shape)) if axis != split]:
        whole = math.prod(chunk) * itemsize
        if whole <= PART_BYTES:
            break
        most = max(PART_BYTES * chunk[axis] // whole, 1)
        # In several shards, chunks must begin where shards do.
        chunk[axis] = most if shard[axis] == shape[axis] else _divisor(chunk[axis], most)
    return tuple(chunk)


def _divisor(size: int, most: int) -> int:
    """Largest divisor up to `most`, unless it would make very small chunks."""
    divisor = max(n for n in range(1, most + 1) if size % n == 0)
    return divisor if 64 * divisor >= most else size


def write_parts(directory: BucketPath, parts: list[Part], stored: Mapping[str, ChunkedArray]) -> dict[str, Written]:
    """Writes the chunks of parts; returns what was written, by name in the directory."""

    def write(job: tuple[Part, tuple[int, ...]]) -> tuple[str, Written]:
        part, index = job
        array = stored[part.name]
        file = array.file(part.name, index)
        return file, write_file(directory / file, _encoded(part, array, index))

    jobs = [
        (part, index)
        for part in parts
        for index in stored[part.name].overlapping(part.start, _stop(part.start, part.data.shape))
    ]
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        return dict(pool.map(write, jobs))


def write_metadata(directory: BucketPath, stored: Mapping[str, ChunkedArray]) -> dict[str, Written]:
    """Writes shapes, dtypes and chunks of all arrays; returns what was written."""
    data = json.dumps(_metadata(stored), indent=1).encode()
    return {METADATA: write_file(directory / METADATA, data)}


def write_file(file: BucketPath, data: bytes) -> Written:
    """Writes an object, and returns its hash and what the store says of it."""
    info = file.write_bytes(data)
    return Written(hashlib.sha256(data).hexdigest(), len(data), info.tag)


def _encoded(part: Part, array: ChunkedArray, index: tuple[int, ...]) -> bytes:
    """Bytes of a chunk; one at the end of an array is filled with zeros."""
    low = [i * size - start for i, size, start in zip(index, array.chunk, part.start, strict=True)]
    block = part.data[tuple(slice(first, first + size) for first, size in zip(low, array.chunk, strict=True))]
    if block.shape != array.chunk:
        block = np.pad(block, [(0, size - n) for size, n in zip(array.chunk, block.shape, strict=True)])
    return np.ascontiguousarray(block).tobytes()


def _stop(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(low + size for low, size in zip(start, shape, strict=True))


def _metadata(stored: Mapping[str, ChunkedArray]) -> dict[str, Any]:
    arrays = {
        name: {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(array.shape),
            "data_type": array.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(array.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "fill_value": False if array.dtype == bool else 0,
            "attributes": {},
        }
        for name, array in stored.items()
    }
    consolidated = {"kind": "inline", "must_understand": False, "metadata": arrays}
    return {"zarr_format": 3, "node_type": "group", "attributes": {}, "consolidated_metadata": consolidated}


# ---- reading


def read_metadata(directory: StoragePath, hashes: Mapping[str, str] | None) -> dict[str, ChunkedArray]:
    """Returns the arrays of a directory, by name.

    Args:
        directory: of the arrays.
        hashes: SHA-256 of each of its files; None = they are not compared.

    Raises:
        CheckpointError: their metadata are damaged.
    """
    try:
        arrays = json.loads(_verified(directory / METADATA, _hash_of(METADATA, hashes)))["consolidated_metadata"]["metadata"]
        return {
            name: ChunkedArray(
                tuple(fields["shape"]),
                jnp.dtype(fields["data_type"]),
                tuple(fields["chunk_grid"]["configuration"]["chunk_shape"]),
            )
            for name, fields in arrays.items()
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory} cannot be read: its metadata are damaged: {error}") from error


def read_arrays(
    directory: StoragePath,
    stored: Mapping[str, ChunkedArray],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    hashes: Mapping[str, str] | None,
) -> dict[str, jax.Array]:
    """Reads arrays, of each the chunks that this process's devices need.

    Args:
        directory: of the arrays.
        stored: from `read_metadata`.
        targets: shape, dtype and sharding of each array, by name.
        hashes: SHA-256 of each file of the directory; None = they are not compared.

    Raises:
        CheckpointError: a chunk is missing, or is not what was written.
    """
    made: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        for names in _batches(targets):
            regions = {name: _regions(targets[name]) for name in names}
            blocks = {
                (name, start): np.empty([high - low for low, high in zip(start, stop, strict=True)], stored[name].dtype)
                for name in names
                for start, stop in regions[name]
            }
            read = functools.partial(_read_into, directory, stored, hashes, blocks)
            jobs = [
                (name, start, index)
                for name in names
                for start, stop in regions[name]
                for index in stored[name].overlapping(start, stop)
            ]
            list(pool.map(read, jobs))
            for name in names:
                target = targets[name]
                assert target.sharding is not None
                pieces = [
                    jax.device_put(blocks[name, start].astype(target.dtype, copy=False), device)
                    for (start, _), devices in regions[name].items()
                    for device in devices
                ]
                made[name] = jax.make_array_from_single_device_arrays(target.shape, target.sharding, pieces)
            jax.block_until_ready([made[name] for name in names])
    return made


def _batches(targets: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    """Yields names of arrays that are read at the same time."""
    batch: list[str] = []
    size = 0
    for name, target in targets.items():
        own = math.prod(target.shape) * target.dtype.itemsize
        if batch and size + own > READ_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += own
    if batch:
        yield batch


def _regions(target: jax.ShapeDtypeStruct) -> dict[tuple[tuple[int, ...], tuple[int, ...]], list[Any]]:
    """Devices of this process by the region (start, stop) of the array that they hold."""
    assert target.sharding is not None
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Any]] = {}
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        assert index is not None
        spans = [each.indices(size)[:2] for each, size in zip(index, target.shape, strict=True)]
        region = tuple(low for low, _ in spans), tuple(high for _, high in spans)
        found.setdefault(region, []).append(device)
    return found


def _read_into(
    directory: StoragePath,
    stored: Mapping[str, ChunkedArray],
    hashes: Mapping[str, str] | None,
    blocks: Mapping[tuple[str, tuple[int, ...]], np.ndarray],
    job: tuple[str, tuple[int, ...], tuple[int, ...]],
) -> None:
    """Reads a chunk, and copies what overlaps a region into the block of the region."""
    name, start, index = job
    array, block = stored[name], blocks[name, start]
    file = array.file(name, index)
    data = _verified(directory / file, _hash_of(file, hashes))
    if len(data) != math.prod(array.chunk) * array.dtype.itemsize:
        raise CheckpointError(f"{directory / file} is damaged: it has {len(data)} bytes")
    chunk = np.frombuffer(data, array.dtype).reshape(array.chunk)
    low = [i * size for i, size in zip(index, array.chunk, strict=True)]
    first = [max(a, b) for a, b in zip(low, start, strict=True)]
    last = [min(a + size, b + n) for a, size, b, n in zip(low, array.chunk, start, block.shape, strict=True)]
    into = tuple(slice(a - b, z - b) for a, z, b in zip(first, last, start, strict=True))
    out_of = tuple(slice(a - b, z - b) for a, z, b in zip(first, last, low, strict=True))
    block[into] = chunk[out_of]


def _hash_of(file: str, hashes: Mapping[str, str] | None) -> str | None:
    """SHA-256 that a file must have; "" for one that is not listed, None if any will do."""
    return None if hashes is None else hashes.get(file, "")


def _verified(file: StoragePath, sha256: str | None) -> bytes:
    for _ in range(ATTEMPTS):
        try:
            data = file.read_bytes()
        except FileNotFoundError as error:
            raise CheckpointError(f"{file} is missing") from error
        if sha256 is None or hashlib.sha256(data).hexdigest() == sha256:
            return data
    raise CheckpointError(f"{file} is not what was written: its SHA-256 differs from the manifest")

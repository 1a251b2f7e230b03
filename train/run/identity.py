"""Identity of a run: a checkpoint of another run is refused."""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax import Array

from jina_jax.model.encoder import Encoder

from ..config import TrainConfig, to_dict
from ..data.records import Record
from ..step.trainable_split import split_trainable


def fingerprint(arrays: Mapping[str, Array]) -> str:
    """SHA-256 over arrays and their paths, in the order of the paths."""
    digest = hashlib.sha256()
    for path in sorted(arrays):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(arrays[path]).data)
    return digest.hexdigest()


RUNNING = ("mesh", "checkpoint_every", "keep_checkpoints", "log_every", "read_threads")
"""Fields that set how a run is executed and do not identify it: a resumed run may change them."""


def run_identity(config: TrainConfig, encoder: Encoder) -> dict[str, Any]:
    """Returns the fields that a checkpoint must agree with to belong to this run."""
    fields = {name: value for name, value in to_dict(config).items() if name not in RUNNING}
    frozen = split_trainable(encoder, config.stages[0]).frozen
    return {"config": fields, "model": encoder.config.to_dict(), "frozen": fingerprint(frozen)}


def dataset_fingerprint(source: Sequence[Record]) -> str:
    """Fingerprint that tells a dataset from another one under the same path.

    It is the number of records, and a checksum of some of them.
    """
    some = [repr(source[i * (len(source) - 1) // 15]) for i in range(16)]
    return f"{len(source)} records, {zlib.crc32(''.join(some).encode()):08x}"

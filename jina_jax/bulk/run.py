"""Embeds the rows of many files, or their chunks, as Parquet shards.

Any number of processes work on a run, and each of them may end at any moment.

OUTPUT/part-00000.parquet     a shard: rows of the input, in its order
OUTPUT/_manifest.json         description of the run and all its shards; written last
OUTPUT/_run/                  state for a restart: identity of the run, size, row count and hash of
                              each input, hash of each finished shard

The rows of a shard depend on the files alone, and their batches on the shard alone. The shards are
therefore the same for any number of processes, which never communicate. Readers of a directory of
Parquet files skip names with a leading underscore.
"""

import dataclasses
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from ..checkpoints.pipeline import transformer_folder
from ..checkpoints.sources import MODEL_FILES
from ..config import Side
from ..embed.chunk_rows import check_chunk_options, chunker, embed_in_chunks
from ..embed.embedder import Embedder
from ..embed.progress import progress_bar
from ..embed.quantize import EmbeddingPrecision
from ..embed.results import not_finite
from ..embed.sides import check_exclusive, embedded_with, encode_options
from ..errors import NotFiniteError, RunError
from ..files import dump_json, json_diff, read_json, repeated_files, sha256, write_json
from ..parallel.mesh import make_mesh
from ..storage import StoragePath, is_bucket
from ..storage.paths import create
from ..text.readers import TextRecord, check_file, parquet
from .inputs import first_names, id_type, read_rows, scan_inputs
from .parquet_shards import (
    CHUNK_COLUMNS,
    RUN,
    Shard,
    is_finished,
    records_if_all_there,
    remove_unfinished,
    rows_done,
    shard_schema,
    split_into_shards,
    write_shard,
)

logger = logging.getLogger(__name__)

FORMAT = "jina-jax embeddings"
VERSION = 1
MANIFEST = "_manifest.json"

SHARD_ROWS = 32_768
CALL_ROWS = 4096
"""Rows of a shard embedded in one call.

The number bounds memory, and is large enough to fill packed rows well.
"""
CALL_DOCUMENTS = 256
"""The same of rows that are embedded in chunks, which are longer and have several embeddings."""


@dataclasses.dataclass(frozen=True)
class BulkOptions:
    """Options that the embeddings depend on, beside model and input.

    See `Embedder.encode` and `readers.read_texts`. A run that an earlier version began may lack
    some; it has them at their defaults.
    """

    task: str | None = None
    dim: int | None = None
    precision: EmbeddingPrecision = "float32"
    batch_size: int = 32
    field: str = "text"
    id_field: str | None = None
    shard_rows: int = SHARD_ROWS
    """Rows of a shard; the last may have fewer."""
    prompt: str | None = None
    prompt_name: str | None = None
    side: Side | None = None
    """As `encode_query` or `encode_document`; in place of task and prompt."""
    max_length: int | None = None
    chunk_tokens: int | None = None
    """Rows are embedded in chunks of so many tokens; None = as a whole, or by sentences."""
    chunk_sentences: int | None = None
    late_chunking: bool | None = None
    """As `late` of `Embedder.encode_chunks`; None = True."""

    @property
    def is_chunked(self) -> bool:
        return self.chunk_tokens is not None or self.chunk_sentences is not None

    @property
    def choice(self) -> dict[str, Any]:
        """What the texts are embedded with, as `embed.sides` takes it."""
        return {name: getattr(self, name) for name in ("task", "prompt", "prompt_name", "side")}

    def __post_init__(self) -> None:
        check_exclusive(**self.choice)
        check_chunk_options(self.chunk_tokens, self.chunk_sentences, self.late_chunking)
        if self.shard_rows < 1:
            raise ValueError(f"shard_rows must be at least 1, not {self.shard_rows}")
        if self.precision in ("int8", "uint8"):
            raise ValueError(
                f"{self.precision} takes its ranges from all embeddings, which are never together here; "
                "write float32 and quantise what you read, or take binary or ubinary"
            )


class BulkResult(NamedTuple):
    """State of the output when a process has finished its shards."""

    rows: int
    shards: int
    complete: bool
    """Whether all shards and the manifest are written; else other processes are still at work."""


def load_on_this_host(directory: Path, *, dtype: DTypeLike | None = None) -> Embedder:
    """Loads the model on all devices of this host.

    Args:
        directory: of the model, local.
        dtype: as `Embedder.load` takes it.

    Raises:
        ValueError: the devices belong to a larger slice, which runs as one program and not as
            independent processes.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"this host is one of {jax.process_count()} of a TPU slice; to use it alone set TPU_PROCESS_BOUNDS=1,1,1 and "
            "TPU_CHIPS_PER_PROCESS_BOUNDS to its chips, such as 2,2,1"
        )
    devices = jax.local_devices()
    return Embedder.load(directory, dtype=dtype, mesh=make_mesh(devices=devices) if len(devices) > 1 else None)


def model_fingerprint(directory: Path) -> str:
    """SHA-256 over the files of a model."""
    folders = {directory, transformer_folder(directory)}
    paths = sorted({path for folder in folders for pattern in MODEL_FILES for path in folder.glob(pattern)})
    if (directory / "manifest.json") in paths:  # it has the hashes of all others
        paths = [directory / "manifest.json"]
    hashes = [f"{path.relative_to(directory).as_posix()} {sha256(path)}" for path in paths]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def embed_files(
    embedder: Embedder,
    fingerprint: str,
    files: Sequence[str],
    output: StoragePath,
    options: BulkOptions,
    *,
    process: int = 0,
    processes: int = 1,
    progress: bool = False,
) -> BulkResult:
    """Embeds this process's shards of the rows of `files`.

    They are those whose number modulo `processes` is `process`, without the finished ones.

    Args:
        embedder: on this process's local devices.
        fingerprint: `model_fingerprint` of its model.
        files: as `readers.read_texts` takes them.
        output: a directory that all processes share, local or in a bucket, new or of the same run.
        options: the same in all processes.
        process: number of this process, from 0.
        processes: number of processes; it may differ from that of an earlier call.
        progress: show a progress bar.

    Raises:
        RunError: `output` holds another run.
        ValueError, OSError: an argument, an input or the disk is at fault. Finished shards stay,
            and a later call resumes after them.
    """
    check_arguments(files, options, process, processes)
    # Raises ValueError if an option is not valid for the model.
    no_embeddings = np.asarray(embedder.encode([], **_arguments(embedder, options)))
    _open_output(output)
    inputs = scan_inputs(
        files, output, options.field, options.id_field, process=process, processes=processes, progress=progress
    )
    schema = shard_schema(id_type(inputs), no_embeddings, CHUNK_COLUMNS if options.is_chunked else ())
    names = first_names(output, inputs)
    identity = _identity(embedder, fingerprint, options, inputs, names)
    _check_same_run(output, identity)

    total = sum(known["rows"] for known in inputs)
    shards = split_into_shards(total, options.shard_rows)
    own = shards[process::processes]
    remove_unfinished(output, own)
    todo = [shard for shard in own if not is_finished(output, shard)]
    if todo:
        (output / MANIFEST).unlink(missing_ok=True)
    rows = read_rows(inputs, names, todo, options.field, options.id_field)
    encode, size = _encoder(embedder, options), CALL_DOCUMENTS if options.is_chunked else CALL_ROWS
    with progress_bar(total, "Embedding", "text", show=progress) as bar:
        bar.update(rows_done(output, shards))
        for shard in todo:
            began = time.perf_counter()
            # The first shard runs one call at a time: it compiles, and folds the adapter. After it,
            # one call is tokenised during another.
            batches = _embedded(encode, islice(rows, shard.rows), size, bar, calls=1 if shard is todo[0] else 2)
            write_shard(output, shard, schema, batches)
            bar.n = rows_done(output, shards)  # includes those of other processes
            bar.refresh()
            speed = shard.rows / (time.perf_counter() - began)
            logger.info("%s: %d of %d rows are done; %.0f rows/s", shard.name, bar.n, total, speed)
    return BulkResult(total, len(shards), _finish(output, identity, shards, options.is_chunked))


def check_arguments(files: Sequence[str], options: BulkOptions, process: int, processes: int) -> None:
    """Checks the arguments of a run, before a model is loaded.

    Raises:
        ValueError: an argument is not valid, a file is of no known type, or pyarrow is missing.
        FileNotFoundError: a file does not exist.
    """
    if not files:
        raise ValueError("there are no files to embed")
    if processes < 1:
        raise ValueError(f"there must be at least 1 process, not {processes}")
    if not 0 <= process < processes:
        raise ValueError(f"the number of a process must be in 0..{processes - 1}, not {process}")
    for file in files:
        check_file(file, options.id_field)
    if twice := repeated_files(files):
        raise ValueError(f"files are given twice: {', '.join(' = '.join(dict.fromkeys(same)) for same in twice)}")
    parquet()


# ---- the run and its inputs


def _open_output(output: StoragePath) -> None:
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file, not a directory")
    if output.exists() and any(output.iterdir()) and not (output / RUN).is_dir():
        raise FileExistsError(f"{output} is not empty and holds no embeddings of this program; choose another directory")
    (output / RUN).mkdir(parents=True, exist_ok=True)


def _identity(
    embedder: Embedder, fingerprint: str, options: BulkOptions, inputs: list[dict[str, Any]], names: list[str]
) -> dict[str, Any]:
    """Identity of the run, which a restart must match."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {"sha256": fingerprint, "dtype": str(np.dtype(embedder.encoder.dtype))},
        "options": dataclasses.asdict(options),
        "embedded": embedded_with(embedder.config, **options.choice),
        "inputs": [
            {"file": name} | {key: known[key] for key in ("bytes", "rows", "sha256")}
            for name, known in zip(names, inputs, strict=True)
        ],
    }


def _check_same_run(output: StoragePath, identity: dict[str, Any]) -> None:
    """Records the identity of the run in a new output; raises RunError if it holds another run."""
    file = output / RUN / "run.json"
    if is_bucket(file):
        create(file, dump_json(identity).encode())
    elif not file.exists():
        write_json(file, identity)
    if changed := json_diff(_completed(read_json(file, RunError), identity), identity):
        raise RunError(
            f"{output} holds other embeddings; they differ in: {'; '.join(changed)}. "
            "Give the same files, model and options, or another directory"
        )


def _completed(saved: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """Adds to the identity of a run what an earlier version did not record: options that it lacked
    are at their defaults, and what follows from options and model is as now."""
    if not isinstance(saved.get("options"), dict):
        return saved
    defaults = {field.name: field.default for field in dataclasses.fields(BulkOptions)}
    added = {"options": defaults | saved["options"], "embedded": saved.get("embedded", identity["embedded"])}
    return saved | added


# ---- embedding


def _embedded(
    encode: Callable[[list[TextRecord]], dict[str, Any]], rows: Iterator[TextRecord], size: int, bar: Any, *, calls: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields how many rows of the input, in order, and the columns that `encode` makes of them,
    `size` at a time.

    Up to `calls` calls of the embedder run at once.
    """
    running: deque[tuple[list[TextRecord], Future[dict[str, Any]]]] = deque()
    with ThreadPoolExecutor(calls) as pool:
        while True:
            if batch := list(islice(rows, size)):
                running.append((batch, pool.submit(encode, batch)))
            if not running:
                return
            if not batch or len(running) == calls:
                done, call = running.popleft()
                try:
                    columns = call.result()
                except NotFiniteError as error:
                    wrong = [done[index].id for index in error.indices]
                    raise not_finite(error.indices, f"{len(wrong)} of the texts, by id", wrong) from error
                yield len(done), columns
                bar.update(len(done))


def _encoder(embedder: Embedder, options: BulkOptions) -> Callable[[list[TextRecord]], dict[str, Any]]:
    """Returns what embeds rows of the input, into the columns of a shard."""
    arguments = _arguments(embedder, options)
    cut = chunker(embedder.tokenizer, options.chunk_tokens, options.chunk_sentences)

    def whole(rows: list[TextRecord]) -> dict[str, Any]:
        embeddings = embedder.encode([row.text for row in rows], **arguments)
        return {"id": [row.id for row in rows], "embedding": np.asarray(embeddings)}

    def in_chunks(rows: list[TextRecord]) -> dict[str, Any]:
        assert cut is not None
        found = embed_in_chunks(embedder, [row.text for row in rows], cut, late=options.late_chunking is not False, **arguments)
        spans = {"chunk": found.numbers, "start": found.starts, "end": found.ends}
        return {"id": [rows[index].id for index in found.texts], "embedding": found.embeddings} | spans

    return whole if cut is None else in_chunks


def _arguments(embedder: Embedder, options: BulkOptions) -> dict[str, Any]:
    return encode_options(embedder.config, **options.choice) | {
        "truncate_dim": options.dim,
        "precision": options.precision,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "show_progress_bar": False,
    }


def _finish(output: StoragePath, identity: dict[str, Any], shards: list[Shard], is_chunked: bool) -> bool:
    """Writes the manifest and returns True if all shards are finished.

    Whichever process ends last finds them all.
    """
    records = records_if_all_there(output, shards)
    if records is None:
        return False
    listed = [{"file": shard.file(output).name} | record for shard, record in zip(shards, records, strict=True)]
    counts = {"rows": sum(record["rows"] for record in records)}
    if is_chunked:
        counts["documents"] = sum(shard.rows for shard in shards)
    write_json(output / MANIFEST, identity | counts | {"shards": listed})
    return True

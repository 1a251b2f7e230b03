"""The stream of a stage's batches: a pure function of the batch number, the seed and the datasets.

Record order, random draws and the dataset that a batch comes from depend on the number alone, so a
run that resumes from a number sees the batches that it would have seen. Batch i holds the same
records, however many processes it is split over.
"""

import contextlib
import hashlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int

from jina_jax.config import ModelConfig
from jina_jax.errors import DataError
from jina_jax.files import kept_sha256
from jina_jax.parallel.processes import main_process_first
from jina_jax.storage import StoragePath, as_path
from jina_jax.text.tokenizer import Tokenizer

from ..config import DatasetConfig, Stage
from .collate import BatchShape, Encode, TrainBatch, collate, text_encoder
from .examples import Example, texts_per_example, to_example
from .records import Record
from .row_counts import SAMPLED_EXAMPLES, fitted_row_counts, most_rows, rows_needed, texts_per_row
from .tfds_datasets import RecordFiles, RecordSource, is_dataset, open_dataset, prepare_records
from .whole_batch import Ask, agree_on, ask_nobody

logger = logging.getLogger(__name__)


def open_datasets(stage: Stage, workdir: StoragePath) -> list[Sequence[Record]]:
    """Opens the stage's datasets.

    The main process turns files of records into TFDS datasets under `workdir`, once. The hash by
    which their contents are known is kept there too.

    Raises:
        ValueError: a dataset is empty, damaged, or has malformed records; the message says where.
        FileNotFoundError: a dataset does not exist.
    """
    with main_process_first(f"datasets/{stage.name}"):
        prepared = [_prepared(dataset, workdir) for dataset in stage.datasets]
    return [open_dataset(path, dataset.kind, dataset.split) for path, dataset in zip(prepared, stage.datasets, strict=True)]


def batch_stream(
    stage: Stage,
    sources: Sequence[Sequence[Record]],
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    devices: int = 1,
    process: int = 0,
    processes: int = 1,
    asking_main: Callable[[str], Ask] = lambda name: ask_nobody,
) -> grain.MapDataset[tuple[str, TrainBatch]]:
    """Returns the process-local batches of a stage, endless and by number, with their record kind.

    Args:
        stage: stage that the batches are for.
        sources: from `open_datasets`.
        config: configuration of the model; its prompts are the tasks' instructions.
        tokenizer: tokenizer of the model.
        seed: seed of the order of records and of all random draws.
        devices: devices of this process.
        process, processes: index of this process, and number of processes.
        asking_main: as in `jina_jax.parallel.processes`; needed with several processes, which must
            agree on each batch.

    Raises:
        DataError: labelled texts, of a dataset or of a language by itself, have only one label.
        ValueError: the batch size is not divisible by the devices.
    """
    if stage.batch_size % (devices * processes):
        raise ValueError(f"stage {stage.name}: batch_size {stage.batch_size} is not divisible by {devices * processes} devices")
    share = stage.batch_size // processes
    encode = text_encoder(stage, dict(config.prompts), tokenizer)
    tell = _telling_once(stage)
    sets = list(_example_sets(stage, sources, seed))
    shapes = _fitted_shapes(stage, sets, encode, devices * processes, seed)

    def batches_of(each: _ExampleSet) -> grain.MapDataset[tuple[str, TrainBatch]]:
        ask = asking_main(each.name)

        def collated(batch: int, examples: list[Example]) -> tuple[str, TrainBatch]:
            agree = partial(agree_on, ask=partial(ask, batch), tell=tell)
            return each.kind, collate(examples, encode, shapes[each.kind], devices, config.pad_id, agree)

        batched = each.examples[process::processes].batch(share, drop_remainder=True, batch_fn=list)
        return batched.map_with_index(collated)

    batches = [batches_of(each) for each in sets]
    return grain.MapDataset.mix(batches, weights=[each.weight for each in sets]) if len(batches) > 1 else batches[0]


def prefetch(dataset: grain.MapDataset[tuple[str, TrainBatch]], threads: int) -> grain.DatasetIterator[tuple[str, TrainBatch]]:
    """Reads batches in order and ahead of their use; its state is the number of the next batch."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * threads, 1) if threads else 0)
    return iter(dataset.to_iter_dataset(options))


class _ExampleSet(NamedTuple):
    """Examples that batches are made of: those of a dataset, or of one language in it."""

    name: str
    kind: str
    weight: float
    """Fraction of the batches, relative to other sets."""
    records: int
    examples: grain.MapDataset[Example]
    """Endless and by number."""


def _example_sets(stage: Stage, sources: Sequence[Sequence[Record]], seed: int) -> Iterator[_ExampleSet]:
    for index, (dataset, source) in enumerate(zip(stage.datasets, sources, strict=True)):
        cure = "; set by_language=False, or leave these records out" if dataset.by_language else ""
        languages = list(_by_language(source, dataset, stage.batch_size))
        shares = np.array([len(records) for _, records in languages]) ** dataset.language_exponent
        weights = dataset.weight * shares / shares.sum()
        for number, ((place, records), weight) in enumerate(zip(languages, weights, strict=True)):
            with _named(f"{dataset.path}, split {dataset.split!r}{place}", cure):
                make = to_example(stage, dataset.kind, records)
            examples = (
                grain.MapDataset.source(records)
                .seed(_seed(seed, stage.name, index, number))
                .shuffle()
                .repeat()
                .random_map(lambda record, rng, make=make: make(record, rng))
            )
            yield _ExampleSet(f"{stage.name}/{index}/{number}", dataset.kind, float(weight), len(records), examples)


def _fitted_shapes(stage: Stage, sets: Sequence[_ExampleSet], encode: Encode, devices: int, seed: int) -> dict[str, BatchShape]:
    """Returns the shapes of the batches of each record kind.

    They are the same in each process: all sample the same examples, those of the first batches.
    """
    kinds = list(dict.fromkeys(each.kind for each in sets))
    fitted = -(-(stage.num_row_counts - 1) // len(kinds))
    shapes = {}
    for kind in kinds:
        own = [each for each in sets if each.kind == kind]
        weights = np.array([each.weight for each in own])
        counts = (most := most_rows(stage.batch_size // devices, texts_per_example(stage, kind), stage),)
        if fitted:
            sizes = np.ceil(SAMPLED_EXAMPLES * weights / weights.sum()).astype(int)
            lengths = [_sampled_lengths(each, encode, size) for each, size in zip(own, sizes, strict=True)]
            rng = np.random.default_rng(_seed(seed, stage.name, kind))
            needed = rows_needed(stage, lengths, weights, devices, rng)
            counts = fitted_row_counts(needed, most, fitted, stage.encode_chunk_rows)
        shapes[kind] = BatchShape(stage.row_length, texts_per_row(stage), counts)
    return shapes


def _sampled_lengths(each: _ExampleSet, encode: Encode, size: int) -> list[Int[np.ndarray, "n texts"]]:
    """Lengths of the texts of some examples, for each part of a batch."""
    size = min(size, each.records)
    texts = encode([each.examples[i] for i in range(size)])  # type: ignore[arg-type]
    lengths = np.array([len(ids) for ids in texts.ids]).reshape(size, -1)
    parts = np.array(texts.parts).reshape(size, -1)[0]  # equal for all examples
    return [lengths[:, parts == part] for part in range(parts.max() + 1)]


class _Subset(Sequence[Record]):
    """Subset of the records of a source."""

    def __init__(self, source: Sequence[Record], indices: np.ndarray):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        return self._source[int(self._indices[index])]

    def __iter__(self) -> Iterator[Record]:
        return self._source.many(self._indices) if isinstance(self._source, RecordSource) else super().__iter__()


def _telling_once(stage: Stage) -> Callable[[int], None]:
    """Returns a function that tells, the first time it is called, of records that it counts."""
    calls = itertools.count()  # read by several threads

    def tell(count: int) -> None:
        if next(calls) == 0:
            logger.warning(
                "stage %s: %d of the %d records of a batch have their own anchor, positive or group among their negatives; "
                "such negatives do not count, here and in later batches",
                *(stage.name, count, stage.batch_size),
            )

    return tell


@contextlib.contextmanager
def _named(place: str, cure: str) -> Iterator[None]:
    """Adds the place of some records, and a cure, to the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"{place}: {error}{cure}") from error


def _by_language(source: Sequence[Record], dataset: DatasetConfig, least: int) -> Iterator[tuple[str, Sequence[Record]]]:
    """Yields the dataset, or one subset for each language, with its place in the dataset's name.

    Languages with less than a batch of records are joined in one subset.
    """
    if not dataset.by_language:
        yield "", source
        return
    by_language = defaultdict(list)
    for index, record in enumerate(source):
        by_language[record.language].append(index)
    rare = {language: indices for language, indices in sorted(by_language.items()) if len(indices) < least}
    for language, indices in sorted(by_language.items()):
        if language not in rare:
            yield f", language {language!r}", _Subset(source, np.array(indices))
    if rare:
        joined = sorted(index for indices in rare.values() for index in indices)
        yield f", languages {list(rare)} (fewer than {least} records each)", _Subset(source, np.array(joined))


def _prepared(dataset: DatasetConfig, workdir: StoragePath) -> StoragePath:
    path = as_path(dataset.path)
    if path.is_dir():
        return path
    if not path.exists():
        raise FileNotFoundError(f"there is no dataset {path}")
    digest = kept_sha256(path, workdir / "data")
    directory = workdir / "data" / f"{dataset.kind}-{dataset.split}-{digest[:16]}"
    ready = directory / RecordFiles.name / str(RecordFiles.VERSION)
    if is_dataset(ready):
        return ready
    return prepare_records({dataset.split: [path]}, dataset.kind, directory)


def _seed(seed: int, *names: Any) -> int:
    """Returns a seed that differs for each name, and does not depend on what else the run has."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:4])

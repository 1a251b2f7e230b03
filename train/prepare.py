"""Prepares datasets for training.

python -m train.prepare records FILES... --kind KIND --out DIR
python -m train.prepare corpus NAME --out DIR

Both print the directory that a configuration's `DatasetConfig` takes, and its number of records.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import click

from jina_jax.checkpoints.sealed_directory import check_free
from jina_jax.command import CommandGroup
from jina_jax.files import repeated_files
from jina_jax.storage import StoragePath, as_path, is_bucket
from jina_jax.storage.paths import expand

from .data.corpus import BUNDLED, SPLITS
from .data.corpus_records import CORPUS_RECORDS
from .data.records import KINDS
from .data.tfds_datasets import open_dataset, prepare_corpus, prepare_records

out_option = click.option("--out", required=True, help="A new or empty directory, local or in a bucket.")


@click.group(cls=CommandGroup)
def main() -> None:
    """Turn records into TFDS datasets, once, before training."""


@main.command("records")
@click.argument("files", nargs=-1, required=True)
@click.option("--kind", type=click.Choice(list(KINDS)), required=True, help="Of all records.")
@out_option
@click.option("--split", default="train", show_default=True, help="Name of the split that the records become.")
@click.option("--drop-overlapping", is_flag=True, help="Leave out pairs whose texts say the same words, as the paper does.")
def records(files: tuple[str, ...], kind: str, out: str, split: str, drop_overlapping: bool) -> None:
    """Prepare the records of FILES (.jsonl, .csv, .tsv or .txt, also as .gz or .xz, or .parquet),
    local or in a bucket, where * in a name stands for any characters."""
    paths = [as_path(file) for pattern in files for file in expand(pattern)]
    if twice := repeated_files(path for path in paths if path.exists()):
        raise ValueError(f"files are given twice: {', '.join(' = '.join(dict.fromkeys(same)) for same in twice)}")
    with _new(as_path(out)) as place:
        dataset = prepare_records({split: paths}, kind, place, drop_overlapping=drop_overlapping)
    _tell(dataset, kind, (split,))


@main.command("corpus")
@click.argument("name", type=click.Choice([*CORPUS_RECORDS, "all"]))
@out_option
@click.option("--file", type=click.Path(path_type=Path), default=BUNDLED, help="Default: the bundled corpus.")
def corpus(name: str, out: str, file: Path) -> None:
    """Prepare the corpus as records of one sort, or of all."""
    with _new(as_path(out)) as place:
        for each in CORPUS_RECORDS if name == "all" else [name]:
            _tell(prepare_corpus(each, place, file), CORPUS_RECORDS[each][0], SPLITS)


@contextlib.contextmanager
def _new(out: StoragePath) -> Iterator[StoragePath]:
    """Checks that `out` is new or empty, and removes it on failure."""
    check_free(out)
    try:
        yield out
    except BaseException:
        with contextlib.suppress(OSError):
            out.rmtree() if is_bucket(out) else shutil.rmtree(out)
        raise


def _tell(dataset: StoragePath, kind: str, splits: tuple[str, ...]) -> None:
    counts = ", ".join(f"{len(open_dataset(dataset, kind, split)):,} in {split}" for split in splits)
    click.echo(f"{dataset}: {kind} records, {counts}")


if __name__ == "__main__":
    main(prog_name="python -m train.prepare")

"""Datasets on disk: the same wherever they are prepared.

Damage is found before training, or where it is read.
"""

import shutil
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("tensorflow_datasets")
import tensorflow_datasets as tfds

from jina_jax.errors import DataError
from train.data.records import Pair, write_records
from train.data.tfds_datasets import open_dataset, prepare_records

ROOT = Path(__file__).resolve().parents[3]


def prepared(file: Path, count: int, directory: Path) -> Path:
    write_records(file, (Pair(anchor=f"anchor {i}", positive=f"positive {i}") for i in range(count)))
    return prepare_records({"train": [file]}, "pair", directory)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A dataset of pairs that tests copy and damage."""
    directory = tmp_path_factory.mktemp("pairs")
    return prepared(directory / "pairs.jsonl", 200, directory / "out")


def test_order_is_the_same_wherever_it_is_prepared(tmp_path, pairs):
    again = prepared(tmp_path / "pairs.jsonl", 200, tmp_path / "again")
    assert list(open_dataset(again, "pair", "train")) == list(open_dataset(pairs, "pair", "train"))


def test_preparing_asks_no_bucket_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def asked(name: str) -> None:
        raise AssertionError(f"TFDS asked its bucket for {name}")

    monkeypatch.setattr(tfds.core.utils.gcs_utils, "gcs_dataset_info_files", asked)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    prepared(tmp_path / "pairs.jsonl", 20, tmp_path / "out")
    assert not [*(tmp_path / "temporary").iterdir()]


def test_a_dataset_of_an_earlier_version_is_opened():
    """It lacks the fields that a record may leave out and that came later."""
    (path,) = (ROOT / "tests/fixtures/commit_4fe3f70/runs/adapters/data").glob("triplet-*/record_files/1.0.0")
    assert "negative_groups" not in (path / "features.json").read_text()
    records = list(open_dataset(path, "triplet", "train"))
    assert len(records) == 48 and all(record.negative_groups == () and len(record.negatives) == 3 for record in records)


def test_datasets_of_another_sort_are_refused(pairs, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no dataset"):
        open_dataset(tmp_path / "none", "pair", "train")
    with pytest.raises(DataError, match="is not a TFDS dataset"):
        open_dataset(tmp_path, "pair", "train")
    with pytest.raises(DataError, match=r"holds no text records: they lack \['text'\], and have"):
        open_dataset(pairs, "text", "train")
    with pytest.raises(DataError, match=r"has no split 'test'; it has \['train'\]"):
        open_dataset(pairs, "pair", "test")


@pytest.mark.parametrize("share", [0, 0.0001, 0.3, 0.6, 0.9999, None])
def test_a_truncated_or_missing_file_is_found(share, pairs, tmp_path):
    copy = shutil.copytree(pairs, tmp_path / "copy")
    (file,) = copy.glob("*.array_record*")
    file.unlink() if share is None else file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(DataError, match="copy (cannot be read|holds)"):
        open_dataset(copy, "pair", "train")


def test_a_file_of_fewer_records_is_found(pairs, tmp_path):
    copy = shutil.copytree(pairs, tmp_path / "copy")
    (other,) = prepared(tmp_path / "r.jsonl", 150, tmp_path / "out").glob("*.array_record*")
    shutil.copy(other, copy)
    with pytest.raises(DataError, match="copy (cannot be read: .* 150|holds 150)"):
        open_dataset(copy, "pair", "train")


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_damaged_metadata_is_found(name, text, pairs, tmp_path):
    copy = shutil.copytree(pairs, tmp_path / "copy")
    (copy / name).write_text(text)
    with pytest.raises(DataError, match="copy"):
        open_dataset(copy, "pair", "train")


def test_a_flipped_bit_is_found_or_does_no_harm(pairs, tmp_path):
    copy = shutil.copytree(pairs, tmp_path / "copy")
    (file,) = copy.glob("*.array_record*")
    intact, expected, found = file.read_bytes(), list(open_dataset(pairs, "pair", "train")), 0
    for place in range(0, len(intact), len(intact) // 120):
        damaged = bytearray(intact)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        try:
            assert list(open_dataset(copy, "pair", "train")) == expected
        except DataError as error:
            found += str(copy) in str(error)
    assert found > 5

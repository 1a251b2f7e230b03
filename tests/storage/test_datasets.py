"""Datasets in buckets have the records that they have on a disk, in the same order."""

import json

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner

from helpers.training import KINDS, records, stages
from jina_jax.errors import BucketError, DataError
from jina_jax.storage import cache
from train.config import DatasetConfig
from train.data import tfds_datasets
from train.data.cached_shards import CachedShards, Shard
from train.data.records import read_records
from train.data.stream import open_datasets
from train.data.tfds_datasets import open_dataset, prepare_records
from train.mine import main as mine
from train.prepare import main as prepare


def lines(kind: str) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records(kind)).encode()


@pytest.fixture
def files(root, tmp_path):
    """The same records in a bucket and on a disk, in two formats."""
    for place in (root, tmp_path):
        (place / "pairs.jsonl").write_bytes(lines("pair"))
        with pa.BufferOutputStream() as buffer:
            pq.write_table(pa.Table.from_pylist(records("pair")), buffer, row_group_size=16)
        (place / "pairs.parquet").write_bytes(buffer.getvalue().to_pybytes())
    return root, tmp_path


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_records_stream_from_a_bucket(files, name):
    remote, local = files
    assert [*read_records(remote / name, "pair")] == [*read_records(local / name, "pair")]


def test_negatives_are_mined_from_a_bucket_into_it(files):
    for place in files:
        options = ["--bm25", "--num-negatives", "1", "--range-min", "0"]
        result = CliRunner().invoke(mine, [f"{place}/pairs.jsonl", "--out", f"{place}/triplets.jsonl", *options])
        assert result.exit_code == 0, result.output
    remote, local = files
    assert (remote / "triplets.jsonl").read_bytes() == (local / "triplets.jsonl").read_bytes()
    lost = CliRunner().invoke(mine, [f"{remote}/pairs.jsonl", "--out", f"{remote}/pairs.jsonl", "--bm25"])
    assert lost.exit_code == 1 and "would be lost" in lost.output
    absent = CliRunner().invoke(mine, [f"{remote}/none.jsonl", "--out", f"{remote}/triplets.jsonl", "--bm25"])
    assert absent.exit_code == 1 and "none.jsonl" in absent.output


def test_a_dataset_prepared_in_a_bucket_has_the_same_records(files):
    remote, local = files
    result = CliRunner().invoke(prepare, ["records", f"{remote}/*.jsonl", "--kind", "pair", "--out", f"{remote}/prepared"])
    assert result.exit_code == 0, result.output
    there = open_dataset(result.output.split(": ")[0].strip(), "pair", "train")
    here = open_dataset(prepare_records({"train": [local / "pairs.jsonl"]}, "pair", local / "prepared"), "pair", "train")
    assert [*there] == [*here] and there.sha256 == here.sha256
    order = np.random.default_rng(0).permutation(len(here))
    assert [there[i] for i in order] == [here[i] for i in order]
    again = CliRunner().invoke(prepare, ["records", f"{remote}/*.jsonl", "--kind", "pair", "--out", f"{remote}/prepared"])
    assert again.exit_code == 1 and "exists and is not empty" in again.output


def test_a_file_of_records_is_prepared_in_the_bucket_of_the_run(files, server):
    remote, _ = files
    of_kinds = {kind: DatasetConfig(str(remote / f"{kind}s.jsonl"), kind) for kind in KINDS}
    stage = stages(of_kinds)["pairs"]
    (source,) = open_datasets(stage, remote / "run")
    server.log.clear()
    (again,) = open_datasets(stage, remote / "run")
    assert [*again] == [*source] and len(source) == len(records("pair"))
    assert not [path for method, path, size in server.log if method in ("POST", "PUT")]


def test_shards_beyond_the_cache_are_let_go_and_fetched_again(root, tmp_path, monkeypatch, caplog):
    (tmp_path / "r.jsonl").write_bytes(lines("pair") * 5)
    prepared = prepare_records({"train": [tmp_path / "r.jsonl"]}, "pair", tmp_path / "prepared")
    (shard,) = prepared.glob("*.array_record*")
    builder = tfds_datasets.tfds.builder_from_directory(str(prepared))
    count, size = builder.info.splits["train"].num_examples, shard.stat().st_size
    for number in range(4):
        (root / f"shard-{number}").write_bytes(shard.read_bytes())
    monkeypatch.setenv("JINA_JAX_CACHE_GB", str(2.5 * size / 1e9))
    many = CachedShards(
        [Shard(root / f"shard-{number}", count, size) for number in range(4)], builder.info.features.deserialize_example_np
    )
    assert "shards will be fetched again and again" in caplog.text
    one = builder.as_data_source(split="train")
    order = np.random.default_rng(0).permutation(4 * count)[:60]
    got = many.__getitems__([int(i) for i in order]) + [many[int(i)] for i in order]
    assert [each["anchor"] for each in got] == [one[int(i) % count]["anchor"] for i in [*order, *order]]
    with pytest.raises(IndexError):
        many[4 * count]
    assert len([path for path in cache.cache_directory().iterdir() if path.is_dir()]) <= 3


def test_datasets_that_are_damaged_or_absent_are_named(files, server):
    remote, local = files
    path = prepare_records({"train": [remote / "pairs.jsonl"]}, "pair", remote / "prepared")
    with pytest.raises(FileNotFoundError, match="there is no dataset"):
        open_dataset(remote / "none", "pair", "train")
    with pytest.raises(DataError, match="is not a TFDS dataset"):
        open_dataset(remote, "pair", "train")
    (shard,) = path.glob("*.array_record*")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset(path, "pair", "train")
    shard.unlink()
    with pytest.raises(DataError, match="is missing"):
        open_dataset(path, "pair", "train")
    with pytest.raises(BucketError, match="there is no bucket"):
        open_dataset(f"{server.scheme}://jina-nowhere/a", "pair", "train")

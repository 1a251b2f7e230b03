"""Shards that are opened again: every row as it was written, texts found, damage named."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")
import pyarrow as pa
import pyarrow.parquet as pq

from jina_jax.bulk import run
from jina_jax.bulk.read_shards import find_texts, open_shards, read_blocks
from jina_jax.bulk.run import BulkOptions, embed_files
from jina_jax.errors import DataError, RunError

TEXTS = [f"an image editor of kind {number}" for number in range(23)]


@pytest.fixture(scope="module")
def written(embedder, tmp_path_factory):
    """A finished run: 23 rows of four files, one of them empty, in five shards of several calls."""
    directory = tmp_path_factory.mktemp("shards")
    with gzip.open(directory / "a.txt.gz", "wb") as file:
        file.write("\n".join(TEXTS[:8]).encode())
    (directory / "empty.jsonl").write_text("")
    (directory / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[8:12]))
    pq.write_table(pa.table({"text": TEXTS[12:]}), directory / "c.parquet", row_group_size=4)
    files = [str(directory / name) for name in ("a.txt.gz", "empty.jsonl", "b.jsonl", "c.parquet")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "CALL_ROWS", 3)
        embed_files(embedder, "fingerprint", files, directory / "out", BulkOptions(task="classification", dim=16, shard_rows=5))
    return directory


@pytest.fixture
def copied(written, tmp_path):
    """A copy of the run's directory, to be damaged."""
    return Path(shutil.copytree(written / "out", tmp_path / "out"))


def change(directory: Path, **fields: object) -> None:
    path = directory / "_manifest.json"
    manifest = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in manifest.items() if value is not None}))


def test_every_row_in_order_as_it_was_written(written, monkeypatch):
    monkeypatch.setattr("jina_jax.bulk.read_shards.BLOCK_ROWS", 2)
    opened = open_shards(written / "out")
    assert (opened.rows, opened.dim, opened.task, opened.dtype) == (23, 16, "classification", "float32")
    assert opened.fingerprint == "fingerprint" and opened.field == "text" and opened.id_field is None
    blocks = list(read_blocks(opened))
    assert max(len(ids) for ids, _ in blocks) == 2
    table = pq.read_table(written / "out")
    assert [row for ids, _ in blocks for row in ids] == table["id"].to_pylist()
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), table["embedding"].to_pylist())


def test_texts_of_rows_come_from_the_files(written):
    opened = open_shards(written / "out")
    assert find_texts(opened, [22, 0, 8, 7, 11, 12]) == {row: TEXTS[row] for row in (0, 7, 8, 11, 12, 22)}
    assert find_texts(opened, []) == {}


@pytest.mark.parametrize("what", ["removed", "shorter", "another of the same size"])
def test_texts_of_a_file_that_has_changed_are_left_out(embedder, tmp_path, what):
    for name, texts in {"a.txt": TEXTS[:4], "b.txt": TEXTS[4:9]}.items():
        (tmp_path / name).write_text("\n".join(texts) + "\n")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    embed_files(embedder, "fingerprint", files, tmp_path / "out", BulkOptions())
    opened, changed = open_shards(tmp_path / "out"), tmp_path / "a.txt"
    match what:
        case "removed":
            changed.unlink()
        case "shorter":
            changed.write_text("\n".join(TEXTS[:3]))
        case _:
            changed.write_text(changed.read_text().replace("image", "audio"))
    assert find_texts(opened, [1, 4, 8]) == {4: TEXTS[4], 8: TEXTS[8]}


def test_ids_and_fields_of_the_run(embedder, tmp_path):
    rows = [{"n": 100 + number, "in": {"body": text}} for number, text in enumerate(TEXTS[:4])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    embed_files(embedder, "model", [str(tmp_path / "a.jsonl")], tmp_path / "out", BulkOptions(field="in.body", id_field="n"))
    opened = open_shards(tmp_path / "out")
    assert [ids for ids, _ in read_blocks(opened)] == [[100, 101, 102, 103]]
    assert find_texts(opened, [2]) == {2: TEXTS[2]} and opened.dim == 64


def test_what_was_embedded_is_read_from_the_manifest_of_any_version(copied):
    change(copied, embedded={"task": None, "prompt": "passage: ", "side": "document"})
    assert open_shards(copied).embedded == {"task": None, "prompt": "passage: ", "side": "document"}
    change(copied, embedded=None)  # as before this field was written
    opened = open_shards(copied)
    assert opened.embedded is None and opened.task == "classification"


# ---- what is refused


def test_an_unfinished_run_says_how_to_finish_it(copied):
    (copied / "_manifest.json").unlink()
    with pytest.raises(RunError, match="is not finished: run the same `jina-jax embed` again"):
        open_shards(copied)


def test_a_directory_of_something_else(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no directory .*nowhere"):
        open_shards(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        open_shards(tmp_path / "file")
    (tmp_path / "other").mkdir()
    shutil.copy(copied / "part-00000.parquet", tmp_path / "other")
    with pytest.raises(RunError, match="other holds no embeddings; give the DIR/"):
        open_shards(tmp_path / "other")
    change(copied, format="something else")
    with pytest.raises(RunError, match="another program: its format is 'something else'"):
        open_shards(copied)
    change(copied, format="jina-jax embeddings", version=99)
    with pytest.raises(RunError, match="is of version 99, and this program reads version 1"):
        open_shards(copied)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": 24}, "different numbers of rows"),
        ({"rows": "many"}, "rows is 'many'"),
        ({"shards": {"a": 1}}, "shards is {'a': 1}"),
        ({"shards": ["part-00000.parquet"]}, "file is None"),
        ({"inputs": None}, "inputs is None"),
        ({"model": "a"}, "model is 'a'"),
        ({"model": {"sha256": "a", "dtype": "int8"}}, "dtype is 'int8'"),
        ({"model": {"sha256": "a", "dtype": "brain"}}, "dtype is 'brain'"),
        ({"options": {"task": 3}}, "precision is None"),
        ({"embedded": {"task": 3}}, "task is 3"),
        ({"embedded": {"task": None}}, "prompt is None"),
        ({"embedded": {"prompt": "", "side": "left"}}, "side is 'left'"),
    ],
    ids=str,
)
def test_a_damaged_manifest_is_named_with_its_field(copied, fields, message):
    change(copied, **fields)
    with pytest.raises(DataError, match=f"_manifest.json is damaged: .*{message}"):
        open_shards(copied)


def test_a_manifest_that_is_no_json(copied):
    (copied / "_manifest.json").write_text("{")
    with pytest.raises(DataError, match="_manifest.json is not JSON"):
        open_shards(copied)


@pytest.mark.parametrize("damage", ["missing", "cut", "longer"])
@pytest.mark.parametrize("number", [0, 3])
def test_a_shard_of_another_size_is_found_at_once(copied, damage, number):
    path = copied / f"part-0000{number}.parquet"
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case _:
            path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(DataError, match=f"part-0000{number}.parquet is missing or damaged: .* embed` again"):
        open_shards(copied)


def test_one_changed_bit_is_found_before_its_shard_is_read(copied):
    path = copied / "part-00003.parquet"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    opened, rows = open_shards(copied), 0
    with pytest.raises(DataError, match="part-00003.parquet is missing or damaged"):
        for ids, _ in read_blocks(opened):
            rows += len(ids)
    assert rows == 15
    (copied / "part-00000.parquet").write_bytes(b"x" * (copied / "part-00000.parquet").stat().st_size)
    with pytest.raises(DataError, match="part-00000.parquet is missing or damaged"):
        open_shards(copied)


def test_bits_and_no_rows_are_refused(embedder, tmp_path):
    (tmp_path / "a.txt").write_text("text\n")
    embed_files(embedder, "model", [str(tmp_path / "a.txt")], tmp_path / "bits", BulkOptions(precision="ubinary"))
    with pytest.raises(RunError, match="of precision ubinary, .* embed the texts again with --precision float32"):
        open_shards(tmp_path / "bits")
    (tmp_path / "b.txt").write_text("")
    embed_files(embedder, "model", [str(tmp_path / "b.txt")], tmp_path / "none", BulkOptions())
    with pytest.raises(DataError, match="none holds no rows: there is nothing to search"):
        open_shards(tmp_path / "none")

"""Bulk embedding: the rows of many files in Parquet shards, whatever ends the processes.

Every row is there exactly once.
"""

import gzip
import itertools
import json
import lzma
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("click")
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner

from jina_jax import Embedder
from jina_jax.bulk import inputs
from jina_jax.bulk import parquet_shards as shards
from jina_jax.bulk import run as bulk
from jina_jax.bulk.run import BulkOptions, embed_files, load_on_this_host, model_fingerprint
from jina_jax.cli import main
from jina_jax.errors import DataError, NotFiniteError, RunError
from jina_jax.model.parameters import from_arrays, variables
from jina_jax.text.readers import read_texts

ROOT = Path(__file__).resolve().parents[2]
WORDS = "an image editor for paint sound and games 画像 エディタ très élégant".split()
OPTIONS = BulkOptions(task="classification", dim=16, shard_rows=10)


def text(number: int) -> str:
    return " ".join(WORDS[(number * k) % len(WORDS)] for k in range(1, 3 + number % 7)) if number % 11 else ""


TEXTS = [text(number) for number in range(47)]


@pytest.fixture(scope="module")
def model(embedder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bulk") / "model"
    embedder.save(directory)
    return directory


@pytest.fixture
def files(tmp_path):
    """Rows of every kind of file, five shards over file borders, and an empty file."""
    return write_inputs(tmp_path)


def write_inputs(directory: Path) -> list[str]:
    rows = [json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(TEXTS)]
    with gzip.open(directory / "a.txt.gz", "wb") as file:
        file.write("\n".join(TEXTS[:8]).encode())  # the last line has no end
    (directory / "b.jsonl").write_text("".join(rows[8:19]), "utf-8")
    (directory / "empty.jsonl").write_text("")
    with lzma.open(directory / "c.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write("".join(rows[19:30]))
    pq.write_table(pa.table({"text": TEXTS[30:]}), directory / "d.parquet", row_group_size=5)
    return [str(directory / name) for name in ("a.txt.gz", "b.jsonl", "empty.jsonl", "c.jsonl.xz", "d.parquet")]


@pytest.fixture(autouse=True)
def short_calls(monkeypatch):
    monkeypatch.setattr(bulk, "CALL_ROWS", 4)


def contents(output: Path) -> dict[str, bytes]:
    """What a run is judged by: shards, and the manifest. Nothing half-written is beside them."""
    assert not list(output.glob(".part-*"))
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file() and path.name[0] != "."}


# ---- what is written


def test_shards_hold_every_row_once_in_order_with_the_librarys_embeddings(embedder, files, tmp_path):
    done = embed_files(embedder, "model", files, tmp_path / "out", OPTIONS)
    assert done == (47, 5, True)
    table = pq.read_table(tmp_path / "out")  # the directory as a whole, as pandas and others read it
    assert sorted(contents(tmp_path / "out")) == ["_manifest.json", *(f"part-0000{i}.parquet" for i in range(5))]
    assert [pq.read_metadata(tmp_path / "out" / f"part-0000{i}.parquet").num_rows for i in range(5)] == [10, 10, 10, 10, 7]
    counts = zip(files, (8, 11, 0, 11, 17), strict=True)
    assert table["id"].to_pylist() == [f"{file}:{row + 1}" for file, count in counts for row in range(count)]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    expected = embedder.encode(TEXTS, "classification", truncate_dim=16)
    np.testing.assert_allclose(table["embedding"].to_pylist(), expected, atol=1e-6)


def test_manifest(embedder, files, tmp_path):
    embed_files(embedder, "model", files, tmp_path / "out", OPTIONS)
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["model"] == {"sha256": "model", "dtype": "float32"} and manifest["rows"] == 47
    assert manifest["options"]["task"] == "classification" and manifest["options"]["shard_rows"] == 10
    for file, known in zip(files, manifest["inputs"], strict=True):
        assert known["file"] == file and known["bytes"] == Path(file).stat().st_size
        assert known["sha256"] == shards.sha256(Path(file))
    assert [known["rows"] for known in manifest["inputs"]] == [8, 11, 0, 11, 17]
    for shard in manifest["shards"]:
        assert shard["sha256"] == shards.sha256(tmp_path / "out" / shard["file"])


def test_ids_of_a_field_and_fields_inside_others(embedder, tmp_path):
    rows = [{"doc": {"id": 2**40 + i, "body": text}} for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    pq.write_table(pa.Table.from_pylist(rows[20:]), tmp_path / "b.parquet")
    options = BulkOptions(field="doc.body", id_field="doc.id", shard_rows=30)
    embed_files(embedder, "model", [str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")], tmp_path / "out", options)
    table = pq.read_table(tmp_path / "out")
    assert table["id"].to_pylist() == [2**40 + i for i in range(47)] and table.schema.field("id").type == pa.int64()
    np.testing.assert_allclose(table["embedding"].to_pylist(), embedder.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize(("precision", "kind"), [("binary", pa.int8()), ("ubinary", pa.uint8())])
def test_bits(embedder, files, tmp_path, precision, kind):
    embed_files(embedder, "model", files, tmp_path / "out", BulkOptions(precision=precision, shard_rows=20))
    table = pq.read_table(tmp_path / "out")
    assert table.schema.field("embedding").type == pa.list_(kind, 8)
    bits = np.unpackbits((np.array(table["embedding"].to_pylist()) + (128 if precision == "binary" else 0)).astype(np.uint8))
    values = embedder.encode(TEXTS)
    clear = np.abs(values) > 1e-5  # else rounding decides
    np.testing.assert_array_equal(bits.reshape(values.shape)[clear], (values > 0)[clear])


def test_no_rows_at_all(embedder, tmp_path):
    (tmp_path / "a.txt").write_text("")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "b.parquet")
    done = embed_files(embedder, "model", [str(tmp_path / "a.txt"), str(tmp_path / "b.parquet")], tmp_path / "out", OPTIONS)
    assert done == (0, 0, True) and list(contents(tmp_path / "out")) == ["_manifest.json"]


# ---- processes and restarts


def test_any_number_of_processes_and_a_changed_one_give_the_same_bytes(embedder, files, tmp_path):
    embed_files(embedder, "model", files, tmp_path / "one", OPTIONS)
    for process in (1, 0):
        done = embed_files(embedder, "model", files, tmp_path / "two", OPTIONS, process=process, processes=2)
        assert done.complete == (process == 0)
    assert not embed_files(embedder, "model", files, tmp_path / "changed", OPTIONS, process=1, processes=3).complete
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "changed").glob("*.parquet")}
    assert sorted(before) == ["part-00001.parquet", "part-00004.parquet"]
    assert embed_files(embedder, "model", files, tmp_path / "changed", OPTIONS).complete
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "changed").glob("*.parquet")}
    assert before.items() <= after.items()  # not made again
    assert contents(tmp_path / "two") == contents(tmp_path / "changed") == contents(tmp_path / "one")


def test_rows_of_other_processes_are_not_decoded(tmp_path):
    """Passing over them is quick, and what is wrong with them is another's error."""
    lines = [json.dumps({"text": str(i)}) if i % 10 < 5 else "not JSON" for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    ranges = [(0, 5), (10, 12), (22, 25)]
    rows = list(read_texts(str(tmp_path / "a.jsonl"), "text", None, ranges))
    assert [row.text for row in rows] == "0 1 2 3 4 10 11 22 23 24".split()
    assert rows[-1].id == f"{tmp_path / 'a.jsonl'}:25"
    pq.write_table(pa.table({"text": [str(i) for i in range(30)]}), tmp_path / "b.parquet", row_group_size=7)
    assert [row.text for row in read_texts(str(tmp_path / "b.parquet"), "text", None, ranges)] == [row.text for row in rows]


def test_rows_are_read_as_a_stream(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nnot JSON\n')
    rows = read_texts(str(tmp_path / "a.jsonl"), "text")
    assert [row.text for row in itertools.islice(rows, 2)] == ["one", "two"]
    with pytest.raises(DataError, match="a.jsonl:3: not JSON"):
        next(rows)


def test_no_file_is_held_in_memory(tmp_path):
    """30 MB in one file, and in one row group of it."""
    texts = [f"{number} " * 150 for number in range(40_000)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "b.parquet", use_dictionary=False, compression="none")
    del texts
    assert (tmp_path / "a.txt").stat().st_size > 30e6 and pq.read_metadata(tmp_path / "b.parquet").num_row_groups == 1
    tracemalloc.start()
    assert sum(1 for _ in read_texts(str(tmp_path / "a.txt"), "text")) == 40_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
    before = pa.total_allocated_bytes()
    assert max(pa.total_allocated_bytes() - before for _ in read_texts(str(tmp_path / "b.parquet"), "text")) < 5e6


def test_an_error_on_the_way_leaves_whole_shards_and_nothing_else(embedder, files, tmp_path, monkeypatch):
    encode, calls = Embedder.encode, itertools.count()

    def failing(*arguments, **options):
        if next(calls) == 1 + 3 + 2:  # one call is for the options
            raise OSError("the device is gone")
        return encode(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "encode", failing)
        with pytest.raises(OSError, match="the device is gone"):
            embed_files(embedder, "model", files, tmp_path / "out", OPTIONS)
    assert list(contents(tmp_path / "out")) == ["part-00000.parquet"]
    embed_files(embedder, "model", files, tmp_path / "clean", OPTIONS)
    assert embed_files(embedder, "model", files, tmp_path / "out", OPTIONS).complete
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "record missing", "record cut", "record of another"])
def test_a_damaged_shard_is_made_again_and_no_other(embedder, files, tmp_path, caplog, damage):
    output = tmp_path / "out"
    embed_files(embedder, "model", files, output, OPTIONS)
    want = contents(output)
    shard, record = output / "part-00002.parquet", output / "_run" / "part-00002.json"
    match damage:
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-100])
        case "flipped":
            damaged = bytearray(shard.read_bytes())
            damaged[200] ^= 1
            shard.write_bytes(damaged)
        case "missing":
            shard.unlink()
        case "record missing":
            record.unlink()
        case "record cut":
            record.write_text(record.read_text()[:20])
        case "record of another":
            shutil.copy(output / "_run" / "part-00001.json", record)
    before = {path.name: path.stat().st_ino for path in output.glob("*.parquet")}
    assert embed_files(embedder, "model", files, output, OPTIONS).complete
    after = {path.name: path.stat().st_ino for path in output.glob("*.parquet")}
    assert {name for name in after if before.get(name) != after[name]} == {"part-00002.parquet"}
    assert contents(output) == want
    assert ("part-00002.parquet is damaged" in caplog.text) == (damage == "flipped")


def test_the_manifest_is_there_only_when_all_shards_are(embedder, files, tmp_path, monkeypatch):
    output = tmp_path / "out"
    embed_files(embedder, "model", files, output, OPTIONS)
    (output / "part-00003.parquet").unlink()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(shards, "sha256", fail)
    monkeypatch.setattr(bulk, "is_finished", lambda output, shard: shard.number != 3)
    with pytest.raises(OSError, match="No space"):
        embed_files(embedder, "model", files, output, OPTIONS)
    assert sorted(contents(output)) == [f"part-0000{i}.parquet" for i in (0, 1, 2, 4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"dim": 32}}, "options.dim: 16 -> 32"),
        ({"options": {"task": None}}, 'options.task: "classification" -> null'),
        ({"options": {"shard_rows": 9, "batch_size": 8}}, "options.batch_size: 32 -> 8; options.shard_rows: 10 -> 9"),
        ({"fingerprint": "another"}, 'model.sha256: "model" -> "another"'),
        ({"files": [0, 1, 2, 3]}, "inputs.4: .*d.parquet.* -> null"),
        ({"files": [0, 1, 3, 2, 4]}, "inputs.2.file: .*empty.jsonl.* -> .*c.jsonl.xz"),
        ({"content": "another text\n"}, "inputs.0.bytes: .*; inputs.0.rows: 8 -> 1; inputs.0.sha256"),
    ],
    ids=str,
)
def test_another_run_in_the_same_directory_is_refused_with_the_differences(embedder, files, tmp_path, changes, message):
    output = tmp_path / "out"
    embed_files(embedder, "model", files, output, OPTIONS)
    want = contents(output)
    if "content" in changes:
        with gzip.open(files[0], "wt") as file:
            file.write(changes["content"])
    given = [files[i] for i in changes.get("files", range(5))]
    options = BulkOptions(**(vars(OPTIONS) | changes.get("options", {})))
    with pytest.raises(RunError, match=f"holds other embeddings; they differ in: .*{message}"):
        embed_files(embedder, changes.get("fingerprint", "model"), given, output, options)
    assert contents(output) == want


def test_inputs_are_counted_once(embedder, files, tmp_path, monkeypatch):
    embed_files(embedder, "model", files, tmp_path / "out", OPTIONS)
    monkeypatch.setattr(inputs, "read_texts", lambda *_: pytest.fail("read again"))
    assert embed_files(embedder, "model", files, tmp_path / "out", OPTIONS).complete


def test_another_spelling_of_an_input_or_another_place_is_the_same_run(embedder, files, tmp_path, monkeypatch):
    """The ids keep the first spelling: a run has one."""
    embed_files(embedder, "model", files, tmp_path / "whole", OPTIONS)
    embed_files(embedder, "model", files, tmp_path / "out", OPTIONS, process=1, processes=2)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "sha256", lambda _: pytest.fail("read again"))
        relative = [f"./{Path(file).name}" for file in files]
        assert not embed_files(embedder, "model", relative, Path("out"), OPTIONS, process=0, processes=3).complete
    shutil.copytree(tmp_path, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("out", "whole", "elsewhere"))
    moved = [f"elsewhere/{Path(file).name}" for file in files]
    assert embed_files(embedder, "model", moved, Path("out"), OPTIONS).complete
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_output_that_is_the_input_is_refused(model, tmp_path):
    (tmp_path / "a.txt").write_text("text\n")
    (tmp_path / "a.npy").symlink_to("a.txt")
    result = command(tmp_path / "a.txt", "--model", model, "--output", tmp_path / "a.npy")
    assert result.exit_code == 1 and f"{tmp_path}/a.npy is the input {tmp_path}/a.txt" in result.output
    assert (tmp_path / "a.txt").read_text() == "text\n"


def test_fingerprint(model, tmp_path):
    shutil.copytree(model, tmp_path / "same")
    assert model_fingerprint(tmp_path / "same") == model_fingerprint(model)
    (tmp_path / "same" / "manifest.json").write_text("{}")
    assert model_fingerprint(tmp_path / "same") != model_fingerprint(model)
    torch_like = tmp_path / "torch"
    torch_like.mkdir()
    (torch_like / "config.json").write_text("{}")
    (torch_like / "model.safetensors").write_text("weights")
    before = model_fingerprint(torch_like)
    (torch_like / "README.md").write_text("a note")
    assert model_fingerprint(torch_like) == before
    (torch_like / "model.safetensors").write_text("others")
    assert model_fingerprint(torch_like) != before


# ---- what is wrong


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON"),
        ("a.jsonl", b'["text"]\n', "a.jsonl:1: a record is a JSON object, not list"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"a.jsonl:2: no field 'text'; there are \['body'\]"),
        ("a.jsonl", b'{"text": null}\n', "a.jsonl:1: text is no string but NoneType"),
        ("a.jsonl", b'{"text": {"en": "x"}}\n', "a.jsonl:1: text is no string but dict"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: text is not valid Unicode: a lone surrogate at position 0"),
        ("a.jsonl", b'{"text": "\xe9"}\n', "a.jsonl:1: not UTF-8"),
        ("a.txt", b"fine\n\xe9t\xe9\n", "a.txt:2: not UTF-8"),
        ("a.jsonl.xz", b"no xz", "a.jsonl.xz cannot be read"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read"),
        ("a.txt.gz", gzip.compress(b"text\n" * 99, mtime=0)[:-12], "a.txt.gz cannot be read"),
        ("a.parquet", b"no Parquet", "a.parquet cannot be read"),
        ("a.json", b"text\n", "a.json is of no known type; valid are .txt"),
        ("a.parquet.gz", b"", "a.parquet.gz is of no known type"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_input_is_named_before_anything_is_embedded(embedder, tmp_path, name, content, message):
    (tmp_path / "good.txt").write_text("good\n")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        embed_files(embedder, "model", [str(tmp_path / "good.txt"), str(tmp_path / name)], tmp_path / "out", OPTIONS)
    assert not list(tmp_path.glob("out/*.*"))


@pytest.mark.parametrize(
    ("columns", "id_field", "message"),
    [
        ({"body": ["x"]}, None, r"a.parquet has no column 'text'; it has \['body'\]"),
        ({"text": [1]}, None, "a.parquet:1: text is no string but int"),
        ({"text": ["x", None]}, None, "a.parquet:2: text is no string but NoneType"),
        ({"text": ["x"]}, "id", "a.parquet has no column 'id'"),
        ({"text": ["x"], "id": [1.5]}, "id", "a.parquet:1: id is 1.5, neither a string nor an integer"),
        ({"text": ["x"], "id": pa.array([2**63], pa.uint64())}, "id", "a.parquet:1: id is 9223372036854775808, neither"),
        ({"text": ["x"], "id": ["one"]}, "id", r"ids are strings \(.*a.parquet\) and integers \(.*b.jsonl\)"),
    ],
)
def test_bad_columns(embedder, tmp_path, columns, id_field, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "x", "id": 1}\n')
    options = BulkOptions(id_field=id_field)
    with pytest.raises(ValueError, match=message):
        embed_files(embedder, "model", [str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl")], tmp_path / "out", options)
    assert not (tmp_path / "out" / "_run" / "run.json").exists()  # the directory is free for what is right


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": []}, "no files"),
        ({"files": ["a.txt", "a.txt"]}, "files are given twice: a.txt"),
        ({"files": ["a.txt", "./a.txt"]}, "files are given twice: a.txt = ./a.txt"),
        ({"files": ["a.txt", "link.txt"]}, "files are given twice: a.txt = link.txt"),
        ({"files": ["nowhere.txt"]}, "there is no file nowhere.txt"),
        ({"files": ["http://bucket/a.txt"]}, "http://bucket/a.txt is at no known store"),
        ({"id_field": "id"}, "a.txt is plain text, which has no field 'id'"),
        ({"process": 2, "processes": 2}, "must be in 0..1, not 2"),
        ({"process": 0, "processes": 0}, "at least 1 process, not 0"),
        ({"task": "translation"}, "unknown task 'translation'"),
        ({"dim": 65}, "truncate_dim must be an integer in 1..64, not 65"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"shard_rows": 0}, "shard_rows must be at least 1, not 0"),
        ({"precision": "int8"}, "int8 takes its ranges from all embeddings"),
    ],
    ids=str,
)
def test_a_bad_argument_leaves_no_directory(embedder, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text\n")
    Path("link.txt").symlink_to("a.txt")
    arguments = {"files": ["a.txt"], "process": 0, "processes": 1} | changes
    files, of_job = arguments.pop("files"), {name: arguments.pop(name) for name in ("process", "processes")}
    with pytest.raises((ValueError, OSError), match=message):
        embed_files(embedder, "model", files, Path("out"), BulkOptions(**arguments), **of_job)
    assert not Path("out").exists()


def test_a_directory_of_something_else_is_left_alone(embedder, files, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "note.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="not empty and holds no embeddings"):
        embed_files(embedder, "model", files, tmp_path / "notes", OPTIONS)
    with pytest.raises(NotADirectoryError, match="is a file"):
        embed_files(embedder, "model", files, tmp_path / "notes" / "note.txt", OPTIONS)
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["note.txt"]


def test_an_input_that_has_become_shorter_since_it_was_counted(embedder, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text\n" * 15)

    def counted(*arguments, **named):
        known = inputs.scan_inputs(*arguments, **named)
        (tmp_path / "a.txt").write_text("text\n" * 12)
        return known

    monkeypatch.setattr(bulk, "scan_inputs", counted)
    with pytest.raises(DataError, match="become shorter: there are 2 of the 5 rows of part-00001"):
        embed_files(embedder, "model", [str(tmp_path / "a.txt")], tmp_path / "out", OPTIONS)
    assert sorted(contents(tmp_path / "out")) == ["part-00000.parquet"]


def test_a_host_of_a_larger_slice_is_told_how_to_work_alone(model, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="one of 4 of a TPU slice; .* TPU_PROCESS_BOUNDS=1,1,1"):
        load_on_this_host(model)


# ---- the command


def command(*arguments: object, env: dict[str, str] | None = None):
    return CliRunner(env=env).invoke(main, ["embed", *map(str, arguments)])


def test_command(embedder, model, files, tmp_path):
    """Two processes by their environment, then again with nothing to do.

    An output is taken for a directory if it ends in a slash or exists as one.
    """
    common = [*files, "--model", model, "--task", "classification", "--dim", 16, "--shard-rows", 10]
    for process in ("0", "1"):
        env = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": process}
        result = command(*common, "--output", f"{tmp_path}/out/", env=env)
        assert result.exit_code == 0, result.output
        assert f"47 rows in 5 shards; {'complete' if process == '1' else 'process 0 of 2 has done its part'}" in result.output
    embed_files(embedder, model_fingerprint(model), files, tmp_path / "library", OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "library")
    again = command(*common, "--output", tmp_path / "out")
    assert again.exit_code == 0 and again.output.endswith("47 rows in 5 shards; complete\n")
    assert contents(tmp_path / "out") == contents(tmp_path / "library")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.txt", "b.txt", "--output", "out.npy"], "several files are embedded with --output DIR/"),
        (["a.txt", "--output", "out.npy", "--field", "body", "--shard-rows", 5], "--field, --shard-rows: only with --output"),
        (["a.txt", "--output", "out/", "--num-processes", 2], "--num-processes needs a --process-id"),
        (["a.txt", "--output", "out/", "--process-id", 1], "must be in 0..0, not 1"),
        (["a.txt", "--output", "http://bucket/out/"], "http://bucket/out/ is at no known store"),
        (["nowhere.txt", "--output", "out/"], "there is no file nowhere.txt"),
        (["-", "--output", "out/"], "there is no file -"),
        (["a.txt", "--output", "out/", "--precision", "uint8"], "uint8 takes its ranges"),
    ],
    ids=str,
)
def test_a_mistake_of_the_command_is_one_line(model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text\n")
    result = command(*arguments, "--model", model)
    assert result.exit_code == 1 and message in result.output and len(result.output.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


# ---- kill -9


def _die(owner: object, name: str, number: int) -> None:
    """The n-th call of a function is the end of this process."""
    function, calls = getattr(owner, name), itertools.count(1)

    def replaced(*arguments, **named):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    setattr(owner, name, replaced)


FAULTS = {
    "in the middle of the second shard": (Embedder, "encode", 1 + 3 + 2),  # one call is for the options
    "behind a shard, before its name": (shards, "sha256", 3),
    "behind the name, before the record": (shards, "write_json", 2),
    "before the manifest": (bulk, "write_json", 1),
}


def _killed_by(fault: str, model: Path, files: list[str], output: Path, cache: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    bulk.CALL_ROWS = 4
    _die(*FAULTS[fault])
    embed_files(load_on_this_host(model), model_fingerprint(model), files, output, OPTIONS)


def test_killed_at_any_point_it_goes_on_and_every_row_is_there_once(embedder, model, files, tmp_path):
    fingerprint = model_fingerprint(model)
    embed_files(embedder, fingerprint, files, tmp_path / "clean", OPTIONS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jina_jax.bulk"])  # imports take longer than the runs
    output, finished = tmp_path / "killed", []
    for fault in FAULTS:
        process = context.Process(target=_killed_by, args=(fault, model, files, output, tmp_path / "cache"))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, fault
        assert not (output / "_manifest.json").exists()
        finished.append(len(list(output.glob("_run/part-*.json"))))
    assert finished == [1, 2, 3, 5]
    assert embed_files(embedder, fingerprint, files, output, OPTIONS).complete
    assert contents(output) == contents(tmp_path / "clean")


def _start(arguments: list[object], directory: Path, **environment: str) -> subprocess.Popen:
    """The command in a process of its own."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(directory / "cache"), "JAX_PLATFORMS": "cpu"} | environment
    with (directory / "log.txt").open("a") as log:
        return subprocess.Popen([sys.executable, "-m", "jina_jax.cli", "embed", *arguments], env=environment, stderr=log)


@pytest.mark.slow
def test_a_process_uses_all_devices_of_its_host(embedder, model, files, tmp_path):
    def run(name: str, count: int) -> dict[str, bytes]:
        arguments = [*files, "--model", model, "--task", "classification", "--dim", "16", "--shard-rows", "10"]
        arguments += ["--output", f"{tmp_path / name}/", "--num-processes", str(count), "--process-id"]
        job = [_start([*arguments, str(i)], tmp_path, JAX_NUM_CPU_DEVICES="2") for i in range(count)]
        assert [process.wait() for process in job] == [0] * count, (tmp_path / "log.txt").read_text()
        return contents(tmp_path / name)

    assert run("one", 1) == run("two", 2)
    embeddings = pq.read_table(tmp_path / "one")["embedding"].to_pylist()
    np.testing.assert_allclose(embeddings, embedder.encode(TEXTS, "classification", truncate_dim=16), atol=1e-6)


@pytest.mark.slow
def test_the_corpus_by_two_processes_killed_ten_times(model, tmp_path):
    corpus, chance = ROOT / "data" / "debian_packages.jsonl.xz", random.Random(20_261_125)

    def start(output: Path, process: int = 0, processes: int = 1) -> subprocess.Popen:
        options = ["--field", "text.en.body", "--id-field", "id", "--task", "classification", "--shard-rows", "250"]
        job = ["--num-processes", str(processes), "--process-id", str(process)]
        return _start([corpus, "--model", model, "--output", f"{output}/", *options, *job], tmp_path)

    def done(output: Path) -> int:
        return len(list(output.glob("_run/part-*.json")))

    assert start(tmp_path / "clean").wait() == 0
    output, total = tmp_path / "killed", done(tmp_path / "clean")
    for _ in range(10):
        before, wanted = done(output), chance.randrange(4)
        job = [start(output, process, 2) for process in range(2)]
        while done(output) < before + wanted:
            time.sleep(0.02)
        time.sleep(chance.random())
        for process in job:
            assert process.poll() is None, "it was to be killed, and has ended"
            process.kill()
            process.wait()
        assert done(output) < total and not (output / "_manifest.json").exists()
    assert [process.wait() for process in [start(output, process, 2) for process in range(2)]] == [0, 0]
    assert contents(output) == contents(tmp_path / "clean")
    with lzma.open(corpus, "rt", encoding="utf-8") as lines:
        want = [json.loads(line)["id"] for line in lines]
    assert pq.read_table(output)["id"].to_pylist() == want and len(want) == 15_278


@pytest.mark.parametrize("precision", ["float32", "ubinary"])
def test_a_text_whose_embedding_is_not_finite_is_named_and_its_shard_not_written(embedder, tmp_path, precision):
    texts = [f"an image editor {number}" for number in range(16)]
    texts[13] = "画像"  # of the second shard, the last of a call whose texts share a row
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts), "utf-8")
    own, *others = (set(embedder.tokenizer(text)["input_ids"]) for text in (texts[13], *texts[:13]))
    arrays = {path: variable.get_value() for path, variable in variables(embedder.encoder).items()}
    arrays["tokens.table"] = arrays["tokens.table"].at[np.array(sorted(own.difference(*others)))].set(np.inf)
    broken = Embedder(from_arrays(embedder.config, arrays, dtype=np.float32), embedder.config, embedder.tokenizer)
    with pytest.raises(NotFiniteError, match=r"NaN or infinity for 4 of the texts, by id \['.*texts\.txt:14'\]"):
        embed_files(broken, "x", [str(file)], tmp_path / "out", replace(OPTIONS, precision=precision))
    assert [path.name for path in (tmp_path / "out").glob("*.parquet")] == ["part-00000.parquet"]
    assert not (tmp_path / "out" / "_manifest.json").exists()

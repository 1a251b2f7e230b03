"""One reader for every format: the same records, places and errors.

They depend neither on the file's format nor on its compression.
"""

import csv
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jina_jax.errors import DataError
from jina_jax.text.readers import read_records, read_texts

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

TEXTS = ["plain", '\u00e9t\u00e9, quoted "so"', "\u65e5\u672c\u8a9e\ttab", "", "last"]
BOM = "\ufeff".encode()
PACKED = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def encoded(suffix: str, texts: list[str], path: Path) -> bytes:
    """The texts as a file of a format, each with an id."""
    match suffix:
        case ".txt":
            return "".join(text + "\n" for text in texts).encode()
        case ".jsonl":
            return "".join(json.dumps({"id": f"n{i}", "text": text}) + "\n" for i, text in enumerate(texts)).encode()
        case ".parquet":
            pq.write_table(pa.table({"id": [f"n{i}" for i in range(len(texts))], "text": texts}), path, row_group_size=2)
            return path.read_bytes()
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
        writer.writerows([("id", "text"), *((f"n{i}", text) for i, text in enumerate(texts))])
    return path.read_bytes()


def written(tmp_path: Path, name: str, texts: list[str] = TEXTS, before: bytes = b"") -> Path:
    path = tmp_path / name
    suffix, packing = (path.suffix, "") if path.suffix not in PACKED else (Path(path.stem).suffix, path.suffix)
    path.write_bytes(PACKED[packing](before + encoded(suffix, texts, tmp_path / f"raw{suffix}")))
    return path


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize("before", [b"", BOM], ids=["plain", "bom"])
def test_every_format_holds_the_same_texts_with_and_without_a_byte_order_mark(suffix, packing, before, tmp_path):
    file = written(tmp_path, f"a.b{suffix}{packing}", before=before)
    assert [record.text for record in read_texts(file)] == TEXTS
    if suffix != ".txt":
        assert [record.id for record in read_texts(file, "text", "id")] == [f"n{i}" for i in range(len(TEXTS))]


def test_parquet_holds_them_too(tmp_path):
    file = written(tmp_path, "a.parquet")
    assert [tuple(record) for record in read_texts(file, "text", "id")] == [(f"n{i}", text) for i, text in enumerate(TEXTS)]
    assert [record.place for record in read_records(file)] == [f"{file}:{i}" for i in range(1, 6)]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv", ".parquet"])
@given(cuts=st.lists(st.integers(0, 9), max_size=6, unique=True), open_end=st.booleans())
def test_ranges_are_slices_of_all_records(suffix, cuts, open_end, tmp_path_factory):
    texts = [f"text {i}" for i in range(9)]
    tmp_path = tmp_path_factory.mktemp("ranges")
    file, cuts = written(tmp_path, f"r{suffix}", texts), sorted(cuts)
    ranges = list(zip(cuts[::2], cuts[1::2], strict=False))
    if open_end and len(cuts) % 2:
        ranges.append((cuts[-1], None))
    everything = list(read_records(file))
    assert list(read_records(file, ranges=ranges)) == [record for low, high in ranges for record in everything[low:high]]


def test_a_record_of_csv_over_several_lines_is_named_by_its_first(tmp_path):
    (tmp_path / "a.csv").write_text('text,n\n"two\nlines",1\nb,2\n')
    assert [tuple(record) for record in read_records(tmp_path / "a.csv")] == [
        (f"{tmp_path}/a.csv:2", {"text": "two\nlines", "n": "1"}),
        (f"{tmp_path}/a.csv:4", {"text": "b", "n": "2"}),
    ]


def test_a_field_of_csv_may_be_longer_than_pythons_limit(tmp_path):
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert [len(record.text) for record in read_texts(tmp_path / "a.csv")] == [200_000]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"fine\n\xe9\n", "a.txt:2: not UTF-8 text"),
        ("a.csv", b"text\nfine\n\xe9\n", "a.csv:3: not UTF-8 text"),
        ("a.csv", b"text,id\nfine\n", "a.csv:2: 1 fields; the header has 2"),
        ("a.csv", b'text\n"a" b\n', "a.csv:2: not CSV"),
        ("a.csv", b"title\nfine\n", "a.csv:2: no field 'text'; there are"),
        ("a.jsonl", b'{"text": 1}\n', "a.jsonl:1: text is no string but int"),
        ("a.jsonl", b"[]\n", "a.jsonl:1: a record is a JSON object, not list"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz cannot be read"),
        ("a.csv.xz", lzma.compress(b"text\n" + b"a\n" * 10_000)[:-9], "a.csv.xz cannot be read"),
    ],
)
def test_what_is_malformed_is_named(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        list(read_texts(tmp_path / name))


def test_csv_is_read_as_a_stream(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + ("some words in a long line " * 200 + "\n") * 2000)
    assert (tmp_path / "a.csv").stat().st_size > 10e6
    tracemalloc.start()
    assert sum(1 for _ in read_texts(tmp_path / "a.csv")) == 2000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6

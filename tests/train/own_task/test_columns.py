"""Records from the named columns of a table, and what is refused."""

import gzip
import json
import lzma
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jina_jax.errors import DataError
from train.data.records import LabelledText, Pair, Triplet
from train.own_task.columns import Columns, check_candidates, check_classes, check_labels, read_table

LABELLED = Columns(text="body", label="queue")
PAIRS = Columns(anchor="q", positive="a")
ROWS = [{"body": "my card, lost", "queue": "cards"}, {"body": "eine „Frage“", "queue": "other"}]
RECORDS = [LabelledText(text=row["body"], label=row["queue"]) for row in ROWS]


def write(file: Path, rows: list[dict]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    separator = "\t" if ".tsv" in file.name else ","
    table = "".join(separator.join(f'"{cell}"' for cell in cells) + "\n" for cells in [rows[0], *(r.values() for r in rows)])
    contents = lines if ".jsonl" in file.name else table.encode()
    file.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(file.suffix, bytes)(contents))
    return file


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.csv.gz", "t.jsonl.xz"])
def test_columns_are_read_from_every_format(tmp_path, name):
    assert read_table(write(tmp_path / name, ROWS), LABELLED) == RECORDS


def test_columns_of_parquet_are_read_alone(tmp_path):
    table = pyarrow.table({"body": [row["body"] for row in ROWS], "queue": ["cards", "other"], "a.b": [None, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet", LABELLED) == RECORDS
    with pytest.raises(DataError, match=r"no column 'text' .*it has 'body', 'queue', 'a.b'"):
        read_table(tmp_path / "t.parquet", Columns(text="text", label="queue"))


def test_labels_may_be_integers_and_have_blanks_around_them(tmp_path):
    labels = [3, 3.0, True, " 3 ", "x y"]
    file = write(tmp_path / "t.jsonl", [{"body": "b", "queue": label} for label in labels])
    assert [record.label for record in read_table(file, LABELLED)] == ["3", "3", "True", "3", "x y"]
    pyarrow.parquet.write_table(pyarrow.table({"body": ["b", "c"], "queue": [1, 2]}), tmp_path / "t.parquet")
    assert [record.label for record in read_table(tmp_path / "t.parquet", LABELLED)] == ["1", "2"]


def test_pairs_have_negatives_by_name_or_in_lists(tmp_path):
    rows = [{"q": "how", "a": "so", "n": ["not so", "nor so"]}]
    assert read_table(write(tmp_path / "t.jsonl", rows), PAIRS) == [Pair(anchor="how", positive="so")]
    triplets = Columns(anchor="q", positive="a", negative="n")
    assert read_table(tmp_path / "t.jsonl", triplets) == [Triplet(anchor="how", positive="so", negatives=("not so", "nor so"))]
    file = write(tmp_path / "t.csv", [{"q": "how", "a": "so", "n": "no"}])
    assert read_table(file, triplets) == [Triplet(anchor="how", positive="so", negatives=("no",))]


@pytest.mark.parametrize(
    "given",
    [{}, {"text": "t"}, {"label": "l"}, {"anchor": "a"}, {"text": "t", "positive": "p"}, {"anchor": "a", "negative": "n"}],
)
def test_columns_are_those_of_one_kind(given):
    with pytest.raises(ValueError, match="--text and --label.* or of pairs"):
        Columns(**given)


def test_a_column_has_one_part():
    with pytest.raises(ValueError, match="named twice"):
        Columns(text="t", label="t")


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("t.csv", b"", "t.csv has no rows"),
        ("t.csv", b"body,queue\n", "t.csv has no rows"),
        ("t.jsonl", b"", "t.jsonl has no rows"),
        (
            "t.csv",
            b"Body,queues\na,b\n",
            r"t.csv has no column 'body' \(--text\); did you mean 'Body'\? it has 'Body', 'queues'",
        ),
        ("t.csv", b"body,queues\na,b\n", "did you mean 'queues'"),
        ("t.csv", b"x,y\na,b\n", "no column 'body' .*; it has 'x', 'y'"),
        ("t.csv", b"body;queue\na;b\n", "its only column is 'body;queue': is it separated by ';'"),
        ("t.jsonl", b'{"body": "a", "queue": "b"}\n{"body": "a", "que": 1}\n', r"t.jsonl:2 has no column 'queue' \(--label\)"),
        ("t.csv", b"body,queue\na,b\n ,b\n,c\nd,\n", "of 4 rows 2 with an empty text, at 3, 4; 1 with an empty label, at 5;"),
        ("t.jsonl", b'{"body": "a", "queue": null}\n', "1 with an empty label, at 1"),
        ("t.jsonl", b'{"body": "a", "queue": NaN}\n', "1 with an empty label, at 1"),
        ("t.csv", "body,queue\nGrüße,b\n".encode("latin-1"), "t.csv:2: not UTF-8 text .*iconv -f ENCODING -t UTF-8"),
        ("t.csv", "body,queue\nGrüße,b\n".encode("utf-16"), "t.csv:1: not UTF-8 text"),
        ("t.jsonl", b'{"body": 1, "queue": "b"}\n', "t.jsonl:1: the text is no text but int: 1"),
        ("t.jsonl", b'{"body": "\\ud800", "queue": "b"}\n', "t.jsonl:1: the text is not valid Unicode"),
        ("t.jsonl", b'{"body": "a", "queue": 0.5}\n', "t.jsonl:1: the label is 0.5; a label is a text or an integer"),
        ("t.jsonl", b'{"body": "a", "queue": ["b"]}\n', "the label is .*'b'"),
        ("t.csv.gz", b"garbage", "cannot be read"),
        ("t.txt", b"a\n", "plain text, which has no columns; valid are .csv"),
        ("t.xlsx", b"PK", "of no known type"),
    ],
)
def test_bad_tables_are_one_error_that_names_the_place(tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name, LABELLED)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"there is no file {tmp_path / 't.csv'}")):
        read_table(tmp_path / "t.csv", LABELLED)


@pytest.mark.parametrize(
    ("negatives", "message"), [(["so"], "negative 1 is the positive itself"), ([], "empty negative"), ([1], "no text")]
)
def test_bad_negatives_are_refused(tmp_path, negatives, message):
    file = write(tmp_path / "t.jsonl", [{"q": "how", "a": "so", "n": negatives}])
    with pytest.raises(DataError, match=message):
        read_table(file, Columns(anchor="q", positive="a", negative="n"))


def labelled(*pairs: tuple[str, str]) -> list[LabelledText]:
    return [LabelledText(text=text, label=label) for text, label in pairs]


def test_classes_have_two_different_texts_each():
    check_classes(Path("t"), labelled(("a", "x"), ("b", "x"), ("a", "y"), ("c", "y")))
    with pytest.raises(DataError, match="one class, 'x'"):
        check_classes(Path("t"), labelled(("a", "x"), ("b", "x")))
    with pytest.raises(DataError, match=r"t: 2 of 3 classes have one text \(y, z\)"):
        check_classes(Path("t"), labelled(("a", "x"), ("b", "x"), ("c", "y"), ("c", "y"), ("d", "z")))


def test_what_is_measured_on_fits_what_is_trained_on():
    with pytest.raises(DataError, match="test has 1 labels that are not trained on: z; there are 2"):
        check_labels(Path("test"), labelled(("a", "x"), ("b", "z")), labelled(("c", "x"), ("d", "y")))
    with pytest.raises(DataError, match="at least 2"):
        check_candidates(Path("test"), [Pair(anchor="a", positive="p"), Pair(anchor="b", positive="p")])

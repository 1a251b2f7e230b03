"""Records, the corpus and their datasets: what goes in comes out, and what is wrong is named."""

import json
import lzma
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("tensorflow_datasets")
from click.testing import CliRunner

from jina_jax.errors import DataError
from train.data.corpus import BUNDLED, read_corpus
from train.data.corpus_records import CORPUS_RECORDS
from train.data.records import KINDS, LabelledText, Pair, PlainText, ScoredPair, Triplet, read_records, write_records
from train.data.tfds_datasets import open_dataset, prepare_corpus, prepare_records
from train.prepare import main

ROOT = Path(__file__).resolve().parents[3]
HARD = [
    "Zoë, naïve café",
    "日本語の文書",
    "안녕하세요",
    "e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "a\0b\0",
    "\0",
    " ",
    "x\u2028y\x85z",
    '"\\\n\t',
]
LONG = "wörter " * 50_000
RECORDS = {
    "text": [PlainText(text=text, language="de") for text in (*HARD, LONG)],
    "pair": [Pair(anchor=text, positive=text[::-1], group=f"g{i}") for i, text in enumerate(HARD)],
    "triplet": [
        Triplet(anchor="a", positive=f"{text}.", negatives=(text,) * (i + 1), negative_groups=groups)
        for i, (text, groups) in enumerate(zip(HARD, [("",), ("", HARD[1]), *[()] * 7], strict=True))
    ],
    "scored_pair": [ScoredPair(sentence1="a", sentence2=text, score=i / 3 - 1) for i, text in enumerate(HARD)],
    "labelled_text": [LabelledText(text=text, label=text, language="x") for text in HARD],
}


def dumped(records) -> Counter:
    """How many there are of each record, in any order."""
    return Counter(json.dumps(record.model_dump()) for record in records)


def written(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


def as_file(path: Path, records) -> Path:
    if path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([record.model_dump() for record in records]), path)
    else:
        write_records(path.with_name("plain.jsonl"), iter(records))
        data = path.with_name("plain.jsonl").read_bytes()
        path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return path


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory) -> Path:
    """30 packages of each split of the bundled corpus."""
    path = tmp_path_factory.mktemp("corpus") / "small.jsonl"
    taken: Counter = Counter()
    with lzma.open(BUNDLED, "rt", encoding="utf-8") as lines, path.open("w", encoding="utf-8") as small:
        for line in lines:
            split = json.loads(line)["split"]
            taken[split] += 1
            if taken[split] <= 30:
                small.write(line)
    return path


def prepare(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_file_under_two_names_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_file(Path("a.jsonl"), RECORDS["pair"])
    result = prepare("records", "a.jsonl", tmp_path / "a.jsonl", "--kind", "pair", "--out", "out")
    assert result.exit_code == 1 and f"files are given twice: a.jsonl = {tmp_path}/a.jsonl" in result.output
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["r.jsonl", "my.r.jsonl.xz", "v1.0.parquet"])
def test_files_hold_records_in_order(kind, name, tmp_path):
    file = as_file(tmp_path / name, RECORDS[kind])
    assert list(read_records(file, kind)) == RECORDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_holds_the_records_of_its_files(kind, tmp_path):
    first, second = RECORDS[kind][:4], RECORDS[kind][4:]
    files = [as_file(tmp_path / "1.jsonl", first), as_file(tmp_path / "2.parquet", second)]
    directory = prepare_records({"train": files, "test": files[:1]}, kind, tmp_path / "out")
    train = open_dataset(directory, kind, "train")
    assert dumped(train) == dumped(RECORDS[kind])
    assert [train[i] for i in range(len(train))] == list(train)
    assert dumped(open_dataset(str(directory), kind, "test")) == dumped(first)
    assert all(type(record) is KINDS[kind] for record in train)
    for outside in (-1, len(train)):
        with pytest.raises(IndexError):
            train[outside]


def test_more_records_than_are_read_together(tmp_path):
    records = [PlainText(text=f"text {i}") for i in range(2500)]
    directory = prepare_records({"train": [as_file(tmp_path / "r.jsonl", records)]}, "text", tmp_path / "out")
    source = open_dataset(directory, "text", "train")
    read = list(source)
    assert dumped(read) == dumped(records) and [source[i] for i in (0, 1023, 1024, 2499)] == [
        read[i] for i in (0, 1023, 1024, 2499)
    ]


def test_labelled_texts_are_texts_and_triplets_are_pairs(tmp_path):
    directory = prepare_records({"train": [as_file(tmp_path / "r.jsonl", RECORDS["triplet"])]}, "triplet", tmp_path / "out")
    assert dumped(open_dataset(directory, "pair", "train")) == dumped(
        Pair(anchor=record.anchor, positive=record.positive) for record in RECORDS["triplet"]
    )


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("pair", '{"anchor": "a"}', "r.jsonl:2: not a pair record (positive: Field required); it needs ['anchor', 'positive']"),
        ("pair", '{"anchor": "a", "positive": null}', "r.jsonl:2: not a pair record (positive: Field required)"),
        ("pair", '{"anchor": "", "positive": "b"}', "r.jsonl:2: not a pair record (anchor: String should have"),
        ("pair", '{"anchor": 7, "positive": "b"}', "r.jsonl:2: not a pair record (anchor: Input should be a valid string)"),
        ("pair", '{"anchor": "a", "positive": "b"', "r.jsonl:2: not JSON: "),
        ("pair", "", "r.jsonl:2: not JSON: "),
        ("pair", "1" * 5000, "r.jsonl:2: not JSON: "),
        ("pair", "[" * 100_000, "r.jsonl:2: not JSON: "),
        ("pair", '["a", "b"]', "r.jsonl:2: a record is a JSON object, not list"),
        ("pair", '{"anchor": "a\\ud800", "positive": "b"}', "r.jsonl:2: not a pair record (anchor: "),
        ("pair", '{"anchor": "a", "positive": "b", "language": 1}', "r.jsonl:2: not a pair record (language: "),
        ("triplet", '{"anchor": "a", "positive": "b", "negatives": []}', "r.jsonl:2: not a triplet record (negatives: "),
        ("triplet", '{"anchor": "a", "positive": "b", "negatives": "bc"}', "r.jsonl:2: not a triplet record (negatives: "),
        ("triplet", '{"anchor": "a", "positive": "b", "negatives": ["c", 1]}', "r.jsonl:2: not a triplet record (negatives"),
        ("scored_pair", '{"sentence1": "a", "sentence2": "b", "score": "high"}', "r.jsonl:2: not a scored_pair record (score"),
        ("scored_pair", '{"sentence1": "a", "sentence2": "b", "score": NaN}', "r.jsonl:2: not a scored_pair record (score: "),
        ("labelled_text", '{"text": "a", "label": 3}', "r.jsonl:2: not a labelled_text record (label: "),
    ],
)  # fmt: skip
def test_a_malformed_line_is_named_and_nothing_is_prepared(kind, line, message, tmp_path):
    good = json.dumps(RECORDS[kind][0].model_dump())
    file = written(tmp_path / "r.jsonl", good, line, good)
    with pytest.raises(DataError) as error:
        list(read_records(file, kind))
    assert f"{tmp_path}/{message}" in str(error.value)
    result = prepare("records", file, "--kind", kind, "--out", tmp_path / "out")
    assert result.exit_code == 1 and result.output.startswith(f"Error: {tmp_path}/r.jsonl:2: ")
    assert not (tmp_path / "out").exists()
    written(file, good)
    assert prepare("records", file, "--kind", kind, "--out", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("triplet", {"negatives": ["c", "b"]}, "negative 2 is the positive itself"),
        ("triplet", {"negatives": ["a"]}, "negative 1 is the anchor itself"),
        ("pair", {"negatives": ["b"]}, "negative 1 is the positive itself"),
        ("triplet", {"negatives": ["c"], "negative_groups": ["g", "h"]}, "negative_groups: 2 for 1 negatives"),
        ("triplet", {"negatives": ["c", "d"], "negative_groups": ["g"]}, "negative_groups: 1 for 2 negatives"),
        (
            "triplet",
            {"negatives": ["c", "d"], "negative_groups": ["", "x"], "group": "x"},
            "negative 2 is of the record's own group",
        ),
        ("triplet", {"negatives": ["c"], "negative_groups": [None]}, "negative_groups.0: Input should be a valid string"),
    ],
)
@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet"])
def test_negatives_that_contradict_their_record_are_refused(kind, fields, message, name, tmp_path):
    right = {"anchor": "a", "positive": "b", "group": "", "negatives": ["c"], "negative_groups": [""]}
    rows = [right, {"anchor": "a", "positive": "b"} | fields]
    if name == "r.parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    else:
        written(tmp_path / name, *map(json.dumps, rows))
    result = prepare("records", tmp_path / name, "--kind", kind, "--out", tmp_path / "out")
    assert result.exit_code == 1 and f"{name}:2: not a {kind} record (" in result.output and message in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("r.json", b"{}\n", ValueError, r"r\.json is of no known type; valid are \.txt, \.jsonl, \.csv and \.tsv, also as"),
        ("r.csv", b"a,b\n1\n", DataError, r"r\.csv:2: 1 fields; the header has 2"),
        ("r.csv", b"a,a\n1,2\n", DataError, r"r\.csv has columns of the same name: \['a'\]"),
        ("r.tsv", b'text\n"open\n', DataError, r"r\.tsv:2: not CSV: unexpected end of data"),
        ("r.xz", b"", ValueError, "no known type"),
        ("r.jsonl", b'{"text": "\xff"}\n', DataError, r"r\.jsonl:1: not UTF-8 text"),
        ("r.jsonl.xz", b"not xz", DataError, r"r\.jsonl\.xz cannot be read"),
        ("r.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 10**4)[:-9], DataError, r"r\.jsonl\.xz cannot be read"),
        ("r.parquet", b"PAR1 not parquet", DataError, r"r\.parquet cannot be read"),
    ],
)
def test_files_that_cannot_be_read_are_named(name, data, error, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=message):
        list(read_records(tmp_path / name, "text"))


def test_a_row_of_parquet_is_named(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "r.parquet")
    with pytest.raises(DataError, match=r"r\.parquet:2: not a text record \(text: Field required\)"):
        list(read_records(tmp_path / "r.parquet", "text"))


def test_unknown_kinds_names_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown record kind 'pairs'; valid are .*'pair'"):
        list(read_records(tmp_path / "r.jsonl", "pairs"))
    with pytest.raises(FileNotFoundError, match=r"there is no file .*r\.jsonl"):
        list(read_records(tmp_path / "r.jsonl", "pair"))
    with pytest.raises(ValueError, match="unknown records 'pair'; valid are"):
        prepare_corpus("pair", tmp_path)


def test_an_empty_file_has_no_records(tmp_path):
    result = prepare("records", written(tmp_path / "r.jsonl"), "--kind", "text", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "no records" in result.output and "r.jsonl" in result.output
    assert not (tmp_path / "out").exists()


def test_overlapping_pairs_are_dropped_on_request(tmp_path):
    same, other = Pair(anchor="one two three four", positive="so one two three four"), Pair(anchor="a", positive="b")
    file = as_file(tmp_path / "r.jsonl", [same, other])
    result = prepare("records", file, "--kind", "pair", "--out", tmp_path / "out", "--split", "dev", "--drop-overlapping")
    assert result.output == f"{tmp_path}/out/record_files/1.0.0: pair records, 1 in dev\n"
    assert list(open_dataset(tmp_path / "out/record_files/1.0.0", "pair", "dev")) == [other]
    result = prepare("records", file, "--kind", "text", "--out", tmp_path / "new", "--drop-overlapping")
    assert result.exit_code == 1 and "not from text records" in result.output


def test_a_directory_in_use_is_left_alone(tmp_path):
    written(tmp_path / "out.txt", "mine")
    for arguments in (("records", tmp_path / "out.txt", "--kind", "text"), ("corpus", "texts")):
        result = prepare(*arguments, "--out", tmp_path)
        assert result.exit_code == 1 and result.output.endswith("exists and is not empty; choose another name or remove it\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]


def test_the_corpus_as_records(small_corpus, tmp_path):
    result = prepare("corpus", "all", "--file", small_corpus, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    packages = read_corpus(small_corpus, "test")
    bodies = {text.body: package for package in packages for text in package.text.values()}
    for line, (name, (kind, make)) in zip(result.output.splitlines(), CORPUS_RECORDS.items(), strict=True):
        directory = Path(line.partition(":")[0])
        test = open_dataset(directory, kind, "test")
        assert f"{kind} records" in line and f"{len(test)} in test" in line
        assert dumped(test) == dumped(make(packages)) and len(test) > 20, name
        for record in test:
            if isinstance(record, ScoredPair):
                tags = [set(bodies[text.partition("\n")[2]].tags) for text in (record.sentence1, record.sentence2)]
                assert record.score == pytest.approx(len(tags[0] & tags[1]) / len(tags[0] | tags[1]))
            if isinstance(record, Pair):
                assert bodies.get(record.positive) is None or bodies[record.positive].source == record.group


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": {"fr": {"title": "a", "body": "b"}}}, "KeyError"),
        ({"text": {"en": {"title": "a"}}}, "KeyError"),
        ({"text": {"en": {"title": 1, "body": "b"}}}, "TypeError"),
        ({"text": {"en": {"title": "\ud800", "body": "b"}}}, "UnicodeEncodeError"),
        ({"text": "a"}, "AttributeError"),
        ({"tags": None}, "TypeError"),
        ({"section": 3}, "TypeError"),
    ],
)
def test_a_malformed_package_is_named(change, message, small_corpus, tmp_path):
    package = json.loads(small_corpus.read_text("utf-8").splitlines()[0])
    file = written(tmp_path / "c.jsonl", json.dumps(package), json.dumps(package | change))
    with pytest.raises(DataError, match=rf"c\.jsonl:2: not a package: {message}.*; see data/README\.md"):
        read_corpus(file, "train")
    result = prepare("corpus", "texts", "--file", file, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "c.jsonl:2: not a package" in result.output and not (tmp_path / "out").exists()


def test_splits_of_the_corpus(small_corpus, tmp_path):
    assert len(read_corpus(small_corpus, "validation")) == 30
    with pytest.raises(ValueError, match="unknown split 'dev'; valid are"):
        read_corpus(small_corpus, "dev")
    with pytest.raises(ValueError, match=r"c\.jsonl has no packages in the split 'test'"):
        read_corpus(written(tmp_path / "c.jsonl"), "test")
    with pytest.raises(FileNotFoundError):
        read_corpus(tmp_path / "none.jsonl", "test")


def test_what_a_killed_run_left_is_prepared_again(tmp_path):
    file = as_file(tmp_path / "r.jsonl", RECORDS["pair"])
    kill = """if True:
        import os, sys, train.data.tfds_datasets as datasets
        from pathlib import Path
        def killed(*_):
            yield 0, datasets._fields(next(records(sys.argv[1], "pair")))
            os.kill(os.getpid(), 9)
        records, datasets.RecordFiles._generate_examples = datasets.read_records, killed
        datasets.prepare_records({"train": [Path(sys.argv[1])]}, "pair", Path(sys.argv[2]))
    """
    done = subprocess.run([sys.executable, "-c", kill, file, tmp_path / "out"], cwd=ROOT, check=False)
    assert done.returncode == -9 and list((tmp_path / "out").rglob("*incomplete*"))
    assert prepare("records", file, "--kind", "pair", "--out", tmp_path / "out").exit_code == 1
    directory = prepare_records({"train": [file]}, "pair", tmp_path / "out")
    assert dumped(open_dataset(directory, "pair", "train")) == dumped(RECORDS["pair"])

"""Tasks of MTEB from files: what is read, and what is refused."""

import json
import lzma
import os
from pathlib import Path

import pytest

pytest.importorskip("mteb")
pytest.importorskip("click")

from benchmarks.mteb_layout import lay_out
from jina_jax.errors import DataError
from train.mteb.layout import read_data
from train.mteb.names import Selection, select
from train.mteb.run import load_data
from train.mteb.statistics import check_statistics

STS, BITEXT, CLASSES, SEARCH = "STSBenchmarkMultilingualSTS", "Tatoeba", "Banking77Classification", "XQuADRetrieval"
PAIRS = [{"sentence1": "a", "sentence2": "b", "score": 1.0}, {"sentence1": "cc", "sentence2": "d", "score": 0.5}]
DOCUMENTS = [{"id": "x", "text": "one"}, {"id": "y", "title": "Second", "text": "two"}]
QUERIES = [{"id": "1", "text": "which?", "doc": "y"}]


@pytest.fixture
def write(tmp_path):
    """Writes DIR/NAME, JSON lines, and returns the directory."""

    def write(name: str, records: list) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        if file.suffix == ".xz":
            file.write_bytes(lzma.compress(lines.encode()))
        else:
            file.write_text(lines)
        return tmp_path

    return write


def read(data: Path, name: str):
    (task,) = select(name).tasks
    read_data(data, task)
    return task


def test_pairs_are_read_for_each_language_and_split(write):
    write(f"{STS}/de.test.jsonl", PAIRS)
    write(f"{STS}/de.dev.jsonl", PAIRS[:1])
    write(f"{STS}/en.test.jsonl.xz", PAIRS)
    task = read(write(f"{STS}/en.dev.jsonl", PAIRS), STS)
    assert (sorted(task.hf_subsets), sorted(task.eval_splits)) == (["de", "en"], ["dev", "test"])
    assert list(task.dataset["en"]["test"]["score"]) == [1.0, 0.5] and len(task.dataset["de"]["dev"]) == 1


def test_a_task_is_narrowed_to_the_languages_and_splits_that_are_there(write):
    task = read(write(f"{STS}/de.test.jsonl", PAIRS), STS)
    assert (task.hf_subsets, list(task.eval_splits)) == (["de"], ["test"])
    (fresh,) = select(STS).tasks
    assert len(fresh.hf_subsets) == 10  # the next run has all again


def test_a_task_without_languages_has_its_split_alone_in_the_name(write):
    write(f"{CLASSES}/train.jsonl", [{"text": "t", "label": "x", "unread": 1}])
    task = read(write(f"{CLASSES}/test.jsonl", [{"text": "u", "label": "x"}]), CLASSES)
    assert set(task.dataset) == {"train", "test"} and task.dataset["train"].column_names == ["text", "label"]


def test_documents_and_queries_are_joined_by_their_ids(write):
    write(f"{SEARCH}/de.docs.jsonl.xz", DOCUMENTS)
    queries = [*QUERIES, {"id": "2", "text": "both?", "docs": ["x", "y"]}, {"id": "3", "text": "how?", "docs": {"x": 2}}]
    content = read(write(f"{SEARCH}/de.queries.jsonl", queries), SEARCH).dataset["de"]["validation"]
    assert content["relevant_docs"] == {"1": {"y": 1}, "2": {"x": 1, "y": 1}, "3": {"x": 2}}
    assert list(content["corpus"]["title"]) == ["", "Second"] and content["top_ranked"] is None


def test_candidates_are_what_a_reranking_task_orders(write):
    write("AskUbuntuDupQuestions/docs.jsonl", DOCUMENTS)
    data = write("AskUbuntuDupQuestions/queries.jsonl", [QUERIES[0] | {"candidates": ["y", "x"]}])
    assert read(data, "AskUbuntuDupQuestions").dataset["default"]["test"]["top_ranked"] == {"1": ["y", "x"]}


def test_languages_side_by_side_are_pairs(write):
    data = write("NTREXBitextMining/test.jsonl", [{"deu_Latn": "a", "eng_Latn": "b", "fra_Latn": "c"}])
    task = read(data, "NTREXBitextMining")
    assert "deu_Latn-eng_Latn" in task.hf_subsets and len(task.hf_subsets) == 6


@pytest.mark.parametrize(
    ("task", "files", "message"),
    [
        (STS, {}, f"has no folder {STS}; it has"),
        (STS, {"xx.test.jsonl": PAIRS}, "has no data of .*, such as en.dev.jsonl"),
        (STS, {"de.test.jsonl": PAIRS, "en.test.jsonl": PAIRS, "en.dev.jsonl": PAIRS}, "has de in other splits, and no de.dev"),
        (STS, {"de.test.jsonl": PAIRS, "de.test.jsonl.xz": PAIRS}, "the same data twice"),
        (STS, {"de.test.jsonl": [{"sentence1": "a", "score": 1}]}, r"de.test.jsonl:1: no field 'sentence2'"),
        (STS, {"de.test.jsonl": []}, "has no records"),
        (CLASSES, {"test.jsonl": [{"text": "a", "label": "b"}]}, r"such as test.jsonl \(with train\)"),
        (SEARCH, {"de.docs.jsonl": DOCUMENTS}, "such as ar.docs.jsonl and ar.queries.jsonl"),
        (SEARCH, {"de.docs.jsonl": DOCUMENTS * 2, "de.queries.jsonl": QUERIES}, "documents of the same id"),
        (SEARCH, {"de.docs.jsonl": DOCUMENTS, "de.queries.jsonl": QUERIES * 2}, "a second query of id '1'"),
        (SEARCH, {"de.docs.jsonl": DOCUMENTS, "de.queries.jsonl": [{"id": "1", "text": "a", "doc": "z"}]}, "no document 'z'"),
        (
            SEARCH,
            {"de.docs.jsonl": DOCUMENTS, "de.queries.jsonl": [{"id": "1", "text": "a"}]},
            "a query has doc, an id, or docs",
        ),
        (SEARCH, {"de.docs.jsonl": [{"id": 5, "text": "a"}], "de.queries.jsonl": QUERIES}, "id is no string but int"),
    ],
)
def test_what_is_missing_or_malformed_is_named(write, tmp_path, task, files, message):
    for name, records in files.items():
        write(f"{task}/{name}", records)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(tmp_path, task)


@pytest.fixture
def statistics(monkeypatch):
    """Sets what mteb ships of a task's data."""

    def ship(statistics: dict) -> None:
        monkeypatch.setattr("mteb.abstasks.task_metadata.TaskMetadata.descriptive_stats", property(lambda _: statistics))

    return ship


def of_pairs(**changed) -> dict:
    texts = {"total_text_length": 3, "min_text_length": 1, "average_text_length": 1.5, "max_text_length": 2, "unique_texts": 2}
    known = {"num_samples": 2, "unique_pairs": -1, "text1_statistics": texts, "label_statistics": {"avg_score": 0.75}}
    return {"test": {"hf_subset_descriptive_stats": {"de": known | changed}}}


def test_data_that_equal_mtebs_statistics_are_taken(write, statistics):
    statistics(of_pairs())
    assert check_statistics(read(write(f"{STS}/de.test.jsonl", PAIRS), STS)) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_samples": 3}, r"\(de, test\) are not mteb's: num_samples is 2, not 3"),
        ({"text1_statistics": {"max_text_length": 1}}, "text1_statistics max_text_length is 2, not 1"),
        ({"label_statistics": {"avg_score": 0.7501}}, "label_statistics avg_score is 0.75, not 0.7501"),
    ],
)
def test_data_that_differ_from_mtebs_statistics_are_refused(write, statistics, changed, message):
    statistics(of_pairs(**changed))
    with pytest.raises(DataError, match=message):
        check_statistics(read(write(f"{STS}/de.test.jsonl", PAIRS), STS))


def test_labels_are_compared_by_how_many_there_are(write, statistics):
    rows = [{"text": each, "label": label} for each, label in (("a", "x"), ("b", "x"), ("c", "y"))]
    write(f"{CLASSES}/train.jsonl", rows)
    data = write(f"{CLASSES}/test.jsonl", rows)

    def labels(*counts: int) -> dict:
        return {"label_statistics": {"labels": {str(number): {"count": count} for number, count in enumerate(counts)}}}

    statistics({"test": labels(1, 2), "train": labels(2, 1)})
    assert check_statistics(read(data, CLASSES)) == []
    statistics({"test": labels(1, 2), "train": labels(3)})
    with pytest.raises(DataError, match=r"\(default, train\) are not mteb's: label_statistics labels, counts is"):
        check_statistics(read(data, CLASSES))


def test_what_mteb_has_no_statistics_of_is_told(write, statistics):
    statistics({})
    assert check_statistics(read(write(f"{STS}/de.test.jsonl", PAIRS), STS)) == ["de.test"]


def test_of_a_benchmark_the_tasks_that_are_there_are_run(write, statistics):
    statistics({})
    data = write("STS16/test.jsonl", PAIRS)
    (loaded,) = load_data([select("MTEB(eng, v1)")], data)
    assert [task.metadata.name for task in loaded.tasks] == ["STS16"] and loaded.tasks[0].data_loaded
    with pytest.raises(FileNotFoundError, match=r"no folder of a task of MTEB\(deu, v1\)"):
        load_data([select("MTEB(deu, v1)")], data)


def test_an_aggregate_is_read_part_by_part(write, statistics):
    statistics({})
    (task,) = select("CQADupstackRetrieval").tasks
    for part in task.metadata.tasks:
        write(f"{part.metadata.name}/docs.jsonl", DOCUMENTS)
        data = write(f"{part.metadata.name}/queries.jsonl", QUERIES)
    (loaded,) = load_data([Selection("CQADupstackRetrieval", [task], False)], data)
    assert all(part.data_loaded for part in loaded.tasks[0].metadata.tasks)
    for part in task.metadata.tasks:
        part.unload_data()


@pytest.mark.parametrize("name", ["Tatoeba", "XQuADRetrieval", "LEMBQMSumRetrieval", CLASSES])
def test_the_layout_of_raw_files_equals_mtebs_data(tmp_path, name):
    if not os.environ.get("JINA_JAX_MTEB_DATA"):
        pytest.skip("JINA_JAX_MTEB_DATA names no directory with the tasks' data")
    source = {"Tatoeba": "tatoeba", "XQuADRetrieval": "xquad", "LEMBQMSumRetrieval": "qmsum", CLASSES: "banking77"}[name]
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / source).symlink_to(Path(os.environ["JINA_JAX_MTEB_DATA"]) / source)
    assert lay_out(raw, tmp_path / "data") == [name]
    assert check_statistics(read(tmp_path / "data", name)) == []


def test_raw_files_of_no_source_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="none of the folders"):
        lay_out(tmp_path, tmp_path / "data")

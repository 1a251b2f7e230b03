"""Reads the data of MTEB's tasks from files, DIR/TASK/..., without a network.

| tasks | files | fields of a record |
|---|---|---|
| retrieval, reranking | [SUBSET.][SPLIT.]docs.jsonl | id, text, title? |
| | [SUBSET.][SPLIT.]queries.jsonl | id, text, doc or docs, instruction?, candidates? |
| every other type | [SUBSET.]SPLIT.jsonl | the task's columns: sentence1, sentence2, score, ... |

SUBSET is left out where a task has one, SPLIT of retrieval where a task has one. `doc` is the id of
the document that answers, `docs` a list of ids, or an object of ids and grades; `candidates` are
the documents to rerank. Each file may end in .jsonl.xz or .jsonl.gz.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jina_jax.errors import DataError
from jina_jax.text.readers import read_records

from .names import Task, mteb

SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.gz")


def has_data(data: Path, task: Task) -> bool:
    """True if the directory has a folder for a task."""
    return (data / task.metadata.name).is_dir()


def read_data(data: Path, task: Task) -> None:
    """Gives a task its data, and narrows it to the subsets and splits that there are files of.

    Raises:
        FileNotFoundError: there is no folder for the task, or no file in it that the task knows.
        DataError: a record lacks a field, or a query asks for a document that does not exist.
    """
    folder = data / task.metadata.name
    if not folder.is_dir():
        present = sorted(path.name for path in data.iterdir() if path.is_dir())
        raise FileNotFoundError(f"{data} has no folder {task.metadata.name}; it has {present}")
    retrieval = isinstance(task, mteb().abstasks.AbsTaskRetrieval)
    if getattr(task, "parallel_subsets", False):
        _read_parallel(folder, task)
    elif retrieval:
        _read_retrieval(folder, task)
    else:
        _read_rows(folder, task)
    task.data_loaded = True


def _read_retrieval(folder: Path, task: Task) -> None:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for subset, split in _cells(task):
        stems = _stems(task, subset, split, split_is_optional=True)
        documents, queries = (_find(folder, [_joined(stem, kind) for stem in stems]) for kind in ("docs", "queries"))
        if documents and queries:
            found[subset, split] = _retrieval_split(documents, queries)
    _narrow(task, folder, found)
    task.dataset = {subset: {} for subset, _ in found}
    for (subset, split), content in found.items():
        task.dataset[subset][split] = content


def _retrieval_split(documents: Path, queries: Path) -> dict[str, Any]:
    from datasets import Dataset

    corpus = [
        {"id": _string(fields, "id", place), "title": fields.get("title") or "", "text": _string(fields, "text", place)}
        for place, fields in read_records(documents)
    ]
    ids = {row["id"] for row in corpus}
    if len(ids) != len(corpus):
        raise DataError(f"{documents} has documents of the same id")
    asked: list[dict[str, Any]] = []
    relevant: dict[str, dict[str, int]] = {}
    candidates: dict[str, list[str]] = {}
    for place, fields in read_records(queries):
        key = _string(fields, "id", place)
        if key in relevant:
            raise DataError(f"{place}: a second query of id {key!r}")
        relevant[key] = _grades(fields, place)
        row = {"id": key, "text": _string(fields, "text", place)}
        asked.append(row | ({"instruction": fields["instruction"]} if "instruction" in fields else {}))
        if "candidates" in fields:
            candidates[key] = [str(each) for each in fields["candidates"]]
        if missing := [each for each in (*relevant[key], *candidates.get(key, ())) if each not in ids]:
            raise DataError(f"{place}: there is no document {missing[0]!r} in {documents.name}")
    return {
        "corpus": Dataset.from_list(corpus),
        "queries": Dataset.from_list(asked),
        "relevant_docs": relevant,
        "top_ranked": candidates or None,
    }


def _grades(fields: Mapping[str, Any], place: str) -> dict[str, int]:
    """Grade of each document that answers a query."""
    docs = fields.get("docs", fields.get("doc"))
    if isinstance(docs, str | int):
        docs = [docs]
    if isinstance(docs, list):
        return {str(each): 1 for each in docs}
    if isinstance(docs, dict):
        return {str(each): int(grade) for each, grade in docs.items()}
    raise DataError(f"{place}: a query has doc, an id, or docs, a list of ids or an object of ids and grades; not {docs!r}")


def _read_rows(folder: Path, task: Task) -> None:
    from datasets import Dataset, DatasetDict

    extra = {task.train_split} if hasattr(task, "train_split") else set()
    records = {
        (subset, split): _records(file, _columns(task))
        for subset, split in _cells(task, extra)
        if (file := _find(folder, _stems(task, subset, split)))
    }
    if task.metadata.type == "Classification":
        _number_labels(list(records.values()), task.label_column_name)
    rows = {cell: Dataset.from_list(content) for cell, content in records.items()}
    if extra:
        rows = {cell: content for cell, content in rows.items() if all((cell[0], split) in rows for split in extra)}
    evaluated = {cell: content for cell, content in rows.items() if cell[1] in task.eval_splits}
    _narrow(task, folder, evaluated)
    subsets = {subset: DatasetDict() for subset, _ in rows}
    for (subset, split), content in rows.items():
        subsets[subset][split] = content
    task.dataset = subsets if task.metadata.is_multilingual else subsets["default"]


def _read_parallel(folder: Path, task: Task) -> None:
    """Reads SPLIT.jsonl, whose records have a text in each language; subsets are pairs of them."""
    from datasets import Dataset, DatasetDict

    content = {}
    for split in task.eval_splits:
        if file := _find(folder, [split]):
            content[split] = Dataset.from_list(_records(file, ()))
    languages = {split: set(rows.column_names) for split, rows in content.items()}
    pairs = [(subset, split) for subset in task.hf_subsets for split in content if set(subset.split("-")) <= languages[split]]
    _narrow(task, folder, dict.fromkeys(pairs))
    task.dataset = DatasetDict(content)


def _records(file: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    records = []
    for place, fields in read_records(file):
        if missing := [name for name in columns if name not in fields]:
            raise DataError(f"{place}: no field {missing[0]!r}; there are {list(fields)}")
        records.append({name: fields[name] for name in columns or fields})
    if not records:
        raise DataError(f"{file} has no records")
    return records


def _number_labels(contents: Sequence[list[dict[str, Any]]], column: str) -> None:
    """Replaces labels that are names by their numbers in the order of the names."""
    names = sorted({row[column] for content in contents for row in content if isinstance(row[column], str)})
    numbers = {name: number for number, name in enumerate(names)}
    for row in (row for content in contents for row in content if isinstance(row[column], str)):
        row[column] = numbers[row[column]]


def _columns(task: Task) -> tuple[str, ...]:
    """Names of the columns that a task reads, by its class."""
    if task.metadata.type == "BitextMining":
        return ("sentence1", "sentence2")
    if task.metadata.type == "STS":
        return (*task.column_names, "score")
    names = [
        "input_column_name",
        "input1_column_name",
        "input2_column_name",
        "text_column_name",
        "human_summaries_column_name",
        "machine_summaries_column_name",
        "relevancy_column_name",
        "label_column_name",
    ]
    return tuple(getattr(task, name) for name in names if getattr(task, name, None) is not None)


def _cells(task: Task, extra_splits: set[str] = frozenset()) -> Iterator[tuple[str, str]]:  # type: ignore[assignment]
    """Yields each subset and split that a task evaluates, or reads beside."""
    splits = dict.fromkeys([*task.eval_splits, *sorted(extra_splits)])
    return ((subset, split) for subset in task.hf_subsets for split in splits)


def _stems(task: Task, subset: str, split: str, *, split_is_optional: bool = False) -> list[str]:
    """Names that a file of a cell may have, without what follows."""
    only_subset, only_split = len(task.metadata.hf_subsets) == 1, len(task.metadata.eval_splits) == 1
    stems = [f"{subset}.{split}"]
    if only_subset:
        stems.append(split)
    if split_is_optional and only_split:
        stems += [subset, ""] if only_subset else [subset]
    return stems


def _joined(stem: str, kind: str) -> str:
    return f"{stem}.{kind}" if stem else kind


def _find(folder: Path, stems: list[str]) -> Path | None:
    """The file of one of the names; raises ValueError if there are several."""
    found = [path for stem in stems for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} has the same data twice: {found[0].name} and {found[1].name}")
    return found[0] if found else None


def _narrow(task: Task, folder: Path, cells: Mapping[tuple[str, str], Any]) -> None:
    """Leaves a task the subsets and the splits that there is data of."""
    if not cells:
        example = next(_cells(task))
        raise FileNotFoundError(f"{folder} has no data of {task.metadata.name}, such as {_expected(task, *example)}")
    subsets = [subset for subset in task.hf_subsets if any(subset == each for each, _ in cells)]
    splits = [split for split in task.eval_splits if any(split == each for _, each in cells)]
    if missing := [(subset, split) for subset in subsets for split in splits if (subset, split) not in cells]:
        subset, split = missing[0]
        raise FileNotFoundError(f"{folder} has {subset} in other splits, and no {_expected(task, subset, split)}")
    task.hf_subsets = subsets
    task.filter_eval_splits(splits)


def _expected(task: Task, subset: str, split: str) -> str:
    if isinstance(task, mteb().abstasks.AbsTaskRetrieval):
        stem = _stems(task, subset, split, split_is_optional=True)[-1]
        return f"{_joined(stem, 'docs')}.jsonl and {_joined(stem, 'queries')}.jsonl"
    train = f" (with {task.train_split})" if hasattr(task, "train_split") else ""
    return f"{_stems(task, subset, split)[-1]}.jsonl{train}"


def _string(fields: Mapping[str, Any], name: str, place: str) -> str:
    if not isinstance(value := fields.get(name), str):
        raise DataError(f"{place}: {name} is no string but {type(value).__name__}")
    return value

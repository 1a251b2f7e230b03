"""Inputs of a bulk run: counted and hashed once, and known by their contents.

Under another path a file is the same input, and keeps the name that it had when the run began.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ..embed.progress import progress_bar
from ..errors import DataError
from ..files import file_stamp, read_json_or_empty, resolved, sha256, write_json
from ..storage import StoragePath, as_path
from ..text.readers import TextRecord, read_texts
from .parquet_shards import RUN, Shard


def scan_inputs(
    files: Sequence[str],
    output: StoragePath,
    field: str,
    id_field: str | None,
    *,
    process: int,
    processes: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """Returns size, row count and hash of each file, and the types of its ids.

    Each process begins at a different file and keeps the results in the output, so processes that
    start together share the counting.
    """
    found: dict[int, dict[str, Any]] = {}
    begin = len(files) * process // processes
    with progress_bar(len(files), "Reading", "file", show=progress) as bar:
        for i in (*range(begin, len(files)), *range(begin)):
            found[i] = _scan_input(files[i], output / RUN / f"input-{i:05d}.json", field, id_field)
            bar.update()
    return [found[i] for i in range(len(files))]


def _scan_input(file: str, record: StoragePath, field: str, id_field: str | None) -> dict[str, Any]:
    """Size, row count, hash and types of the ids of an input.

    Reuses the cached record if the file is unchanged, else reads and checks every row.
    """
    path = as_path(file)
    now = file_stamp(path) | {"resolved": resolved(path), "field": field, "id": id_field}
    known = read_json_or_empty(record)
    if now.items() <= known.items() and known.keys() >= {"rows", "sha256", "id_types"}:
        return known | {"file": file}
    digest, rows, types = sha256(path), 0, set()
    for row in read_texts(file, field, id_field):
        rows += 1
        types.add("string" if isinstance(row.id, str) else "int64")
    known = now | {"file": file, "rows": rows, "sha256": digest, "id_types": sorted(types)}
    write_json(record, known)
    return known


def id_type(inputs: list[dict[str, Any]]) -> str:
    """Returns the Arrow type of all ids; raises DataError if some are strings and some integers."""
    first = {kind: known["file"] for known in reversed(inputs) for kind in known["id_types"]}
    if len(first) > 1:
        raise DataError(f"ids are strings ({first['string']}) and integers ({first['int64']}); they must be of one type")
    return next(iter(first), "string")


def first_names(output: StoragePath, inputs: list[dict[str, Any]]) -> list[str]:
    """Returns names of the inputs as they were when the run began, which its rows' ids have."""
    began = read_json_or_empty(output / RUN / "run.json").get("inputs", [])
    same = ("bytes", "rows", "sha256")
    return [
        began[i]["file"] if i < len(began) and all(began[i].get(key) == known[key] for key in same) else known["file"]
        for i, known in enumerate(inputs)
    ]


def read_rows(
    inputs: list[dict[str, Any]], names: list[str], shards: list[Shard], field: str, id_field: str | None
) -> Iterator[TextRecord]:
    """Yields the rows of the shards, in one pass over the files that hold any of them.

    Rows without an id have the name that their file has in `names`.
    """
    base = 0
    for known, name in zip(inputs, names, strict=True):
        end = base + known["rows"]
        ranges = [(max(s.first, base) - base, min(s.end, end) - base) for s in shards if s.first < end and s.end > base]
        if ranges:
            rows = read_texts(known["file"], field, id_field, ranges)
            yield from rows if id_field or name == known["file"] else _renamed(rows, known["file"], name)
        base = end


def _renamed(rows: Iterator[TextRecord], file: str, name: str) -> Iterator[TextRecord]:
    for row in rows:
        yield row._replace(id=name + str(row.id).removeprefix(file))

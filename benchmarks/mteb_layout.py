"""Lays raw files of tasks out as `python -m train.evaluate --mteb-data` reads them.

    python -m benchmarks.mteb_layout RAW OUT

RAW has a folder for each source: tatoeba/XXX-eng.jsonl, stsb_multi/LANGUAGE.SPLIT.jsonl,
sts16/STS16.jsonl, banking77/{train,test}.jsonl, xquad/LANGUAGE.{docs,queries}.jsonl and
qmsum/{docs.jsonl.xz,queries.jsonl}. All but STS16 equals what MTEB evaluates, by its own
statistics, which the evaluation checks.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from jina_jax.command import Command
from jina_jax.files import atomic_write
from jina_jax.text.readers import read_records

Fields = dict[str, Any]


def lay_out(raw: Path, out: Path) -> list[str]:
    """Writes a folder for each task whose raw files are there, and returns their names.

    Raises:
        FileNotFoundError: `raw` has none of the sources.
    """
    written = [task for source, (task, write) in SOURCES.items() if _lay_out(raw / source, out / task, write)]
    if not written:
        raise FileNotFoundError(f"{raw} has none of the folders {[*SOURCES]}")
    return written


def _lay_out(source: Path, target: Path, write: Callable[[Path, Path], None]) -> bool:
    if not source.is_dir():
        return False
    target.mkdir(parents=True, exist_ok=True)
    write(source, target)
    return True


def _tatoeba(source: Path, target: Path) -> None:
    """MTEB's copy keeps the line end of each sentence."""
    for file in source.glob("*.jsonl"):
        rows = ({name: f"{text}\n" for name, text in fields.items()} for fields in _fields(file))
        _write(target / f"{file.stem}.test.jsonl", rows)


def _stsb(source: Path, target: Path) -> None:
    for file in source.glob("*.jsonl"):
        _write(target / file.name, _fields(file))


def _sts16(source: Path, target: Path) -> None:
    """Three characters of its second sentences are missing, which the evaluation's check finds."""
    _write(target / "test.jsonl", _only(source / "STS16.jsonl", "sentence1", "sentence2", "score"))


def _banking77(source: Path, target: Path) -> None:
    for split in ("train", "test"):
        _write(target / f"{split}.jsonl", _fields(source / f"{split}.jsonl"))


def _xquad(source: Path, target: Path) -> None:
    """White space around texts is not in MTEB's copy, and questions of equal text are one."""
    for file in source.glob("*.docs.jsonl"):
        _write(target / file.name, ({"id": fields["id"], "text": fields["text"].strip()} for fields in _fields(file)))
    for file in source.glob("*.queries.jsonl"):
        questions: dict[str, Fields] = {}
        for fields in _fields(file):
            text = fields["text"].strip()
            questions.setdefault(text, {"id": fields["id"], "text": text, "doc": fields["doc"]})
        _write(target / file.name, questions.values())


def _qmsum(source: Path, target: Path) -> None:
    """A meeting is a document, and its summaries are the queries."""
    _write(target / "docs.jsonl", _only(source / "docs.jsonl.xz", "id", "text"))
    _write(target / "queries.jsonl", _only(source / "queries.jsonl", "id", "text", "doc"))


SOURCES = {
    "tatoeba": ("Tatoeba", _tatoeba),
    "xquad": ("XQuADRetrieval", _xquad),
    "banking77": ("Banking77Classification", _banking77),
    "stsb_multi": ("STSBenchmarkMultilingualSTS", _stsb),
    "sts16": ("STS16", _sts16),
    "qmsum": ("LEMBQMSumRetrieval", _qmsum),
}


def _fields(file: Path) -> Iterator[Fields]:
    return (fields for _, fields in read_records(file))


def _only(file: Path, *names: str) -> Iterator[Fields]:
    return ({name: fields[name] for name in names} for fields in _fields(file))


def _write(file: Path, rows: Iterable[Fields]) -> None:
    with atomic_write(file) as partial, partial.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@click.command(cls=Command)
@click.argument("raw", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
def main(raw: Path, out: Path) -> None:
    """Lay RAW out as the tasks of MTEB in OUT."""
    for task in lay_out(raw, out):
        click.echo(out / task)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.mteb_layout")

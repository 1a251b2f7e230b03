"""The bundled corpus: software packages described by people in several languages (see `data/README.md` for its fields)."""

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jina_jax.errors import DataError

BUNDLED = Path(__file__).parents[2] / "data" / "debian_packages.jsonl.xz"
SPLITS = ("train", "validation", "test")


class Description(NamedTuple):
    """One package in one language."""

    title: str
    body: str


class Package(NamedTuple):
    """A package; `source` is the source package it was built from, and packages of one source are near-duplicates."""

    id: str
    source: str
    section: str
    tags: tuple[str, ...]
    split: str
    text: dict[str, Description]


def read_corpus(file: str | Path, split: str) -> list[Package]:
    """Packages of one split, in the order of the file.

    Args:
        file: JSON lines, plain or .xz, with the fields of the bundled corpus.
        split: one of SPLITS.

    Raises:
        ValueError: another split, a split without packages, or a malformed line (RecordError with file and line).
        FileNotFoundError: no such file.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; valid are {list(SPLITS)}")
    packages = [package for package in _packages(Path(file)) if package.split == split]
    if not packages:
        raise ValueError(f"{file} has no packages in the split {split!r}")
    return packages


def _packages(file: Path) -> Iterator[Package]:
    opened = lzma.open(file, "rt", encoding="utf-8") if file.suffix == ".xz" else file.open(encoding="utf-8")
    with opened as lines:
        try:
            for number, line in enumerate(lines, 1):
                yield _package(line, f"{file}:{number}")
        except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error


def _package(line: str, place: str) -> Package:
    try:
        fields = json.loads(line)
        text = {language: Description(text["title"], text["body"]) for language, text in fields["text"].items()}
        package = Package(fields["id"], fields["source"], fields["section"], tuple(fields["tags"]), fields["split"], text)
        "".join([*package[:3], *package.tags, *(part for description in text.values() for part in description)]).encode()
        if "en" not in text:
            raise KeyError("en")
        return package
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error}") from error
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise DataError(f"{place}: not a package: {error!r}; see data/README.md for the fields") from error


SEED = 0


def title_and_body(package: Package, language: str = "en") -> str:
    title, body = package.text[language]
    return f"{title}\n{body}"

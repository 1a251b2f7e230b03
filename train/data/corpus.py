"""The bundled corpus: software packages described by people in several languages.

See `data/README.md` for its fields.
"""

from pathlib import Path
from typing import Any, NamedTuple

from jina_jax.errors import DataError
from jina_jax.text.readers import read_records

BUNDLED = Path(__file__).parents[2] / "data" / "debian_packages.jsonl.xz"
SPLITS = ("train", "validation", "test")

SEED = 0
"""Seed of the samples that evaluation draws."""


class Description(NamedTuple):
    """Description of one package in one language."""

    title: str
    body: str


class Package(NamedTuple):
    """A package; `source` is the source package that it was built from.

    Packages of one source are near-duplicates.
    """

    id: str
    source: str
    section: str
    tags: tuple[str, ...]
    split: str
    text: dict[str, Description]


def read_corpus(file: str | Path, split: str) -> list[Package]:
    """Returns the packages of one split, in the order of the file.

    Args:
        file: JSON lines, plain or .xz, with the fields of the bundled corpus.
        split: one of SPLITS.

    Raises:
        ValueError: unknown split, a split without packages, or a malformed line (DataError with
            file and line).
        FileNotFoundError: no such file.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; valid are {list(SPLITS)}")
    packages = [package for record in read_records(file) if (package := _package(record.fields, record.place)).split == split]
    if not packages:
        raise ValueError(f"{file} has no packages in the split {split!r}")
    return packages


def _package(fields: dict[str, Any], place: str) -> Package:
    try:
        text = {language: Description(text["title"], text["body"]) for language, text in fields["text"].items()}
        package = Package(fields["id"], fields["source"], fields["section"], tuple(fields["tags"]), fields["split"], text)
        "".join([*package[:3], *package.tags, *(part for description in text.values() for part in description)]).encode()
        if "en" not in text:
            raise KeyError("en")
        return package
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise DataError(f"{place}: not a package: {error!r}; see data/README.md for the fields") from error


def tag_overlap(first: Package, second: Package) -> float:
    """Jaccard overlap of the tags of two packages, at least one of which has tags."""
    return len(set(first.tags) & set(second.tags)) / len(set(first.tags) | set(second.tags))


def title_and_body(package: Package, language: str = "en") -> str:
    """Returns the text of a package in one language: its title, a line break, and its body."""
    title, body = package.text[language]
    return f"{title}\n{body}"

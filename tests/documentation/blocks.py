"""Code blocks of the documentation: what they are in, and whether they are run.

A block without a language is shell, and one of `text` is no code. A comment before a block,
`<!-- not run: needs X -->`, says that it is not run and why.
"""

import re
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("bash", "python", "yaml", "ini", "dockerfile")
NO_CODE = "text"
_MARK = re.compile(r"<!-- not run: needs (?P<needs>[^>]+) -->")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    """Line of its first line of code, from 1."""
    language: str
    code: str
    needs: str | None
    """What it would need to be run; None = it is run."""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """The README and all pages of docs/, in the order in which a reader meets them."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read_blocks(page: Path) -> list[Block]:
    """Reads the code blocks of a page.

    Raises:
        ValueError: a block has another language or no fence, or a mark stands before no block.
    """
    blocks: list[Block] = []
    needs = None
    for token in MarkdownIt().parse(page.read_text("utf-8")):
        place = f"{page}:{token.map[0] + 1}" if token.map else str(page)
        if token.type == "code_block":
            raise ValueError(f"{place} is an indented block; fence it, so that its language is known")
        if needs is not None and token.type != "fence":
            raise ValueError(f"{place}: a mark stands before a block alone")
        if token.type == "html_block" and "not run" in token.content:
            if (mark := _MARK.fullmatch(token.content.strip())) is None:
                raise ValueError(f"{place}: a mark is <!-- not run: needs X -->, not {token.content.strip()!r}")
            needs = mark["needs"]
        if token.type == "fence" and token.info.strip() != NO_CODE:
            language = token.info.strip() or "bash"
            if language not in LANGUAGES:
                raise ValueError(f"{place} is of the language {language!r}; valid are {LANGUAGES} and {NO_CODE!r}")
            blocks.append(Block(page, token.map[0] + 2, language, token.content, needs))  # type: ignore[index]
            needs = None
    return blocks

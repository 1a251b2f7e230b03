"""Links of the documentation: where they lead, and what can be linked to."""

import re
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token


def read_links(page: Path) -> list[str]:
    """Targets of the links and images of a page, as written."""
    tokens = [child for token in MarkdownIt().enable("table").parse(page.read_text("utf-8")) for child in token.children or []]
    targets = [token.attrGet("href") or token.attrGet("src") for token in tokens if token.type in ("link_open", "image")]
    return [str(target) for target in targets]


def broken_links(page: Path) -> list[str]:
    """Links of a page to files that there are not, or to headings that those have not."""
    return [link for link in read_links(page) if not re.match(r"\w+:", link) and not _leads_somewhere(page, link)]


def _leads_somewhere(page: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    return target.exists() and (not anchor or target.suffix != ".md" or anchor in set(_anchors(target)))


def _anchors(page: Path) -> Iterator[str]:
    """Names of a page's headings, as GitHub and the site make them."""
    tokens = MarkdownIt().parse(page.read_text("utf-8"))
    for opening, heading in zip(tokens, tokens[1:], strict=False):
        if opening.type == "heading_open":
            yield re.sub(r"[^\w\- ]", "", _text(heading).lower()).replace(" ", "-")


def _text(heading: Token) -> str:
    return "".join(child.content for child in heading.children or [])

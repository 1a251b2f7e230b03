"""The site and the counts of the documentation hold what they say."""

import re

import pytest
import yaml

import jina_jax
from jina_jax import adapters, losses

from .blocks import ROOT, pages, read_blocks

PUBLIC = {
    *(name for module in (jina_jax, adapters, losses) for name, value in vars(module).items() if callable(value)),
    *("MTEBEncoder", "by_tokens", "by_sentences", "top_k", "quantize", "dequantize", "plan_batches", "lay_out"),
}
"""Names that users import."""


def test_the_reference_has_every_public_name():
    text = "".join(page.read_text("utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    assert set(re.findall(r"^::: \S*\.(\w+)$", text, re.MULTILINE)) >= PUBLIC


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load("nav:" + (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2])["nav"]
    docs = ROOT / "docs"
    assert sorted(leaves(nav)) == sorted(str(page.relative_to(docs)) for page in pages() if page.is_relative_to(docs))


def leaves(node):
    if isinstance(node, str):
        return [node]
    children = node.values() if isinstance(node, dict) else node
    return [leaf for child in children for leaf in leaves(child)]


def test_the_docs_say_how_many_blocks_are_not_run():
    blocks = [block for page in pages() for block in read_blocks(page)]
    not_run = sum(block.needs is not None for block in blocks)
    said = re.search(r"have (\d+) code blocks\.\s.*?runs (\d+) of them.*?\s(\d+)\s+are not run", index(), re.DOTALL)
    assert said is not None
    assert tuple(map(int, said.groups())) == (len(blocks), len(blocks) - not_run, not_run)


def index() -> str:
    return (ROOT / "docs" / "index.md").read_text("utf-8")


@pytest.mark.parametrize("file", ["mkdocs.yml", "README.md", "docs/notebooks.md"])
def test_the_address_of_the_repository_is_one_everywhere(file):
    """The project is not published yet, and OWNER stands for who will."""
    addresses = set(re.findall(r"github(?:\.com)?/(?!embeddings-benchmark)([\w-]+/[\w-]+)", (ROOT / file).read_text("utf-8")))
    assert addresses == {"OWNER/jina-jax"}

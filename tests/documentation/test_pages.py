"""Every code block of the documentation is valid for the programs of today, and every link leads
somewhere; `make test-docs` also runs them."""

import re

import pytest
import yaml

from .blocks import ROOT, Block, pages, read_blocks
from .commands import check_command, shell_commands
from .links import broken_links


def check(block: Block) -> None:
    match block.language:
        case "bash":
            for words in shell_commands(block.code):
                check_command(words)
        case "python":
            compile(block.code, block.place, "exec")
        case "yaml":
            for document in yaml.safe_load_all(block.code):
                for text in strings(document):
                    check(block._replace(language="bash", code=text))
        case "ini":
            for command in re.findall(r"^Exec\w+=(.+)$", block.code, re.MULTILINE):
                check(block._replace(language="bash", code=command.rpartition("/")[2]))
        case "dockerfile":
            for command in re.findall(r"^RUN (.+)$", block.code, re.MULTILINE):
                check(block._replace(language="bash", code=command))


def strings(node):
    """Texts of a YAML document that call one of this project's programs."""
    if isinstance(node, str):
        return [node] if "jina-jax " in node or "python -m" in node else []
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    return [text for child in children for text in strings(child)]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_are_valid(page):
    wrong = []
    for block in read_blocks(page):
        try:
            check(block)
        except (Exception, SystemExit) as error:
            wrong.append(f"{block.place}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page):
    assert not broken_links(page)

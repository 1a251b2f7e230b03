"""Commands of shell blocks, checked against what they call: the options of this project's own
programs, the extras of pip, the targets of make."""

import importlib
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import tree_sitter_bash
from tree_sitter import Language, Node, Parser

from train.config import load_config

from .blocks import ROOT

PROGRAMS = ("convert", "train", "benchmarks")
ELISION = "..."
"""A word that stands for further arguments; what is required may be among them."""

_BASH = Parser(Language(tree_sitter_bash.language()))


def shell_commands(code: str) -> list[list[str]]:
    """Words of every command of a shell program, those of programs in its quoted words too.

    Raises:
        ValueError: it is not valid shell; the message has the line.
    """
    tree = _BASH.parse(code.encode())
    if tree.root_node.has_error:
        raise ValueError(f"not valid shell: {_first_error(tree.root_node)}")
    found = [_words(node) for node in _descendants(tree.root_node) if node.type == "command"]
    return [*found, *(inner for words in found for word in words if _is_program(word) for inner in shell_commands(word))]


def check_command(words: list[str]) -> None:
    """Raises an error where a command names an option, an extra or a target that there is not."""
    for i, word in enumerate(words):
        match [word, *words[i + 1 :]]:
            case ["pip", "install", *arguments]:
                return _check_extras(arguments)
            case ["make", *targets]:
                return _check_targets(targets)
            case ["jina-jax", _, *_] as program:
                return _check_options("jina_jax.cli", program[1:])
            case ["python" | ".venv/bin/python", "-m", module, *arguments] if module.partition(".")[0] in PROGRAMS:
                return _check_options(module, arguments)


def _descendants(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _descendants(child)


def _first_error(root: Node) -> str:
    wrong = next(node for node in _descendants(root) if node.is_error or node.is_missing)
    return f"line {wrong.start_point.row + 1}: {(wrong.text or b'').decode()!r}"


def _words(command: Node) -> list[str]:
    """Words of a command without assignments and redirections; expansions stay as written."""
    written = [(node.text or b"").decode() for node in command.named_children if node.type != "variable_assignment"]
    return [_unquoted(word) for word in written]


def _unquoted(word: str) -> str:
    try:
        return " ".join(shlex.split(word)) if word[:1] in ("'", '"') or "\\" not in word else word
    except ValueError:  # an expansion with a quote in it
        return word


def _is_program(word: str) -> bool:
    return " " in word.strip() and re.search(r"\bpython -m |\bjina-jax \w", word) is not None


def _check_extras(arguments: list[str]) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments:
        if named := re.match(r"(?:\.|/?jina-jax)\[(.+)\]", word):
            for extra in named[1].split(","):
                assert extra in known, f"there is no extra {extra!r}"


def _check_targets(targets: list[str]) -> None:
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in targets:
        assert target in known or "=" in target, f"there is no target {target!r}"


def _check_options(module: str, arguments: list[str]) -> None:
    """Parses the arguments with the program's own parser."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no program {module}"
    program = importlib.import_module(f"{module}.__main__" if spec.submodule_search_locations else module)
    _parse(program.main, module, [word for word in arguments if word != ELISION], elided=ELISION in arguments)


def _parse(command: click.Command, name: str, arguments: list[str], *, elided: bool) -> None:
    try:
        context = command.make_context(name, list(arguments))
    except click.MissingParameter as error:
        if elided or (error.param is not None and error.param.envvar):  # it may be in the environment
            return
        raise
    except click.exceptions.Exit:  # --help
        return
    except click.BadParameter as error:
        # A file that the reader has, or a shell's expansion
        if error.param is not None and (isinstance(error.param.type, click.Path) or "$" in error.message):
            return
        raise
    if isinstance(command, click.Group) and (rest := [*context._protected_args, *context.args]):
        inner_name, inner, rest = command.resolve_command(context, rest)
        assert inner is not None
        return _parse(inner, str(inner_name), rest, elided=elided)
    _check_configuration(context.params)


def _check_configuration(parameters: dict[str, Any]) -> None:
    """Loads the configuration of a training command, with its --set."""
    config = parameters.get("config")
    if isinstance(config, Path) and "overrides" in parameters and "$" not in str(config):
        load_config(ROOT / config, parameters["overrides"])

"""The terminal: commands in order, completion, and the nearest name in an error."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("click")
from click.shell_completion import BashComplete
from click.testing import CliRunner

from jina_jax.cli import main
from jina_jax.errors import did_you_mean

TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
WAYS = ["search", "embed", "serve", "info", "demo-model"]


def completions(*words: str) -> list[tuple[str, str]]:
    *before, begun = words
    complete = BashComplete(main, {}, "jina-jax", "_JINA_JAX_COMPLETE")
    return [(item.type, item.value) for item in complete.get_completions(list(before), begun)]


def test_help_lists_the_ways_in_order_each_with_what_it_does():
    lines = CliRunner().invoke(main, ["--help"]).output.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == WAYS
    assert not [line for line in lines if line.endswith("...") or not line.endswith(".")]


def test_completion_knows_commands_options_choices_and_files():
    assert completions("se") == [("plain", "search"), ("plain", "serve")]
    assert completions("embed", "--chunk-") == [("plain", "--chunk-tokens"), ("plain", "--chunk-sentences")]
    assert completions("embed", "--side", "") == [("plain", "query"), ("plain", "document")]
    for line in ("embed te", "embed --model ru", "search query te", "serve --model ru", "info ru"):
        words = line.split()
        assert completions(*words) == [("file", words[-1])]


@pytest.mark.slow
def test_bash_completes(tmp_path):
    program = tmp_path / "jina-jax"
    program.write_text(f"#!{sys.executable}\nfrom jina_jax.cli import main\n\nmain(prog_name='jina-jax')\n")
    program.chmod(0o755)
    code = """
    eval "$(_JINA_JAX_COMPLETE=bash_source jina-jax)"
    COMP_WORDS=(jina-jax embed x.txt --precision u); COMP_CWORD=4
    _jina_jax_completion jina-jax
    echo "${COMPREPLY[@]}"
    """
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", code], env=environment, capture_output=True, text=True)
    assert (done.stdout.split(), done.returncode) == (["uint8", "ubinary"], 0), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serach", "q"], "Did you mean 'search'"),
        (["embed", "x.txt", "--modle", "m"], "'--model'"),
        (["embed", "x.txt", "--presicion", "int8"], "'--precision'"),
    ],
)
def test_an_unknown_command_or_option_is_answered_with_the_nearest(arguments, message):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and message in result.output


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("retrieval", "'retrieval.query' or 'retrieval.passage'"),
        ("passage", "'retrieval.passage'"),
        ("Classification ", "'classification'"),
        ("text_matching", "'text-matching'"),
    ],
)
def test_the_nearest_names_are_suggested(name, nearest):
    assert did_you_mean(name, TASKS) == f"; did you mean {nearest}?"


@pytest.mark.parametrize("name", ["zzz", "", None, 3, ["separation"]])
def test_where_none_is_near_nothing_is_suggested(name):
    assert did_you_mean(name, TASKS) == ""


def test_tasks_prompts_and_precisions_are_suggested(embedder, unchecked):
    for arguments, nearest in (
        ({"task": "retrieval.querry"}, "retrieval.query"),
        ({"prompt_name": "notes"}, "note"),
        ({"precision": "uint"}, "uint8"),
    ):
        with pytest.raises(ValueError, match=f"did you mean .*'{nearest}'"):
            embedder.encode("x", **arguments)

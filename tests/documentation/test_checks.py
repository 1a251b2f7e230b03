"""What the checks of the documentation's blocks notice."""

import click
import pytest

from jina_jax.errors import ConfigError

from .blocks import read_blocks
from .commands import check_command, shell_commands


def check(code: str) -> None:
    for words in shell_commands(code):
        check_command(words)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("jina-jax embed x.txt --modell M --output y.npy", click.NoSuchOption),
        ("jina-jax embed x.txt --model M", click.MissingParameter),
        ("X=1 jina-jax search q x.txt --model M --top many | head", click.BadParameter),
        ("jina-jax find q x.txt --model M", click.UsageError),
        ("python -m convert to_torch A B --layout onnx", click.BadParameter),
        ("srun -n 2 python -m train configs/pairs_short.py --workdir w --set stages.0.stepz=1", ConfigError),
        ("python -m train.compile configs/pair_short.py --topology v5e:4x4", FileNotFoundError),
        ("python -m benchmarks.nothing", AssertionError),
        ("run --wrap 'jina-jax serve --porrt 1'", click.NoSuchOption),
        ('all "cd x && python -m train.mine p.jsonl --output t.jsonl"', click.NoSuchOption),
        ("pip install -e '.[trian]'", AssertionError),
        ("make test && make tset", AssertionError),
        ("echo 'unfinished", ValueError),
    ],
)
def test_a_wrong_command_is_noticed(code, error):
    with pytest.raises(error):
        check(code)


@pytest.mark.parametrize(
    "code",
    [
        "jina-jax embed ... --output out/   # an elision",
        "python -m train configs/pairs_short.py \\\n    --workdir w --set 'stages.0.dims=(32, 64)'",
        "JAX_PROCESS_ID=0 python -m train ... --workdir w",
        "pip install '.[cli,tpu]' && curl -s localhost | jq .x",
        "gcloud anything --at-all",
    ],
)
def test_a_right_one_is_not(code):
    check(code)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```ruby\nputs 1\n```\n", "ruby"),
        ("text\n\n    code = 1\n", "indented"),
        ("<!-- not run -->\n```\nls\n```\n", "a mark is"),
        ("<!-- not run: needs a GPU -->\n\ntext\n\n```\nls\n```\n", "before a block"),
    ],
)
def test_a_malformed_page_is_refused(page, message, tmp_path):
    (tmp_path / "page.md").write_text(page)
    with pytest.raises(ValueError, match=message):
        read_blocks(tmp_path / "page.md")


def test_blocks_are_read_with_their_lines_and_marks(tmp_path):
    page = "# T\n\n```\nls\n```\n\n<!-- not run: needs a GPU -->\n```python\nx = 1\ny = 2\n```\n\n```text\nno code\n```\n"
    (tmp_path / "page.md").write_text(page)
    found = [(block.line, block.language, block.code, block.needs) for block in read_blocks(tmp_path / "page.md")]
    assert found == [(4, "bash", "ls\n", None), (9, "python", "x = 1\ny = 2\n", "a GPU")]

"""`make test-docs`: the code blocks of the README and of docs/, run as they are written."""

import importlib.util
import subprocess
import sys

import pytest

from jina_jax.checkpoints.demo_model import PACKAGE

from .blocks import ROOT, pages, read_blocks
from .workplace import lay_out, write_models

pytestmark = [
    pytest.mark.docs,
    pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is for Linux on x86-64"),
]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    write_models(directory)
    return directory


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs(page, models, tmp_path):
    run = [block for block in read_blocks(page) if block.needs is None]
    if not run:
        pytest.skip("no block of it is run")
    environment = lay_out(tmp_path, page, models)
    command = [sys.executable, "-m", "tests.documentation.run_page", str(page)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-5000:]

"""What commit 4fe3f70 saved is read, and what it began resumes.

The README.md of tests/fixtures/commit_4fe3f70 says what there is, and which losses are not its own.
"""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
pytest.importorskip("click")
from click.testing import CliRunner

from helpers.training import compiled_once
from jina_jax import Embedder
from train.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
SAVED = Path("tests/fixtures/commit_4fe3f70")
KEYS = ("step", "stage", "loss")


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    """The runs' paths are relative to it."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def restored_logging():
    """The program sets up logging for its process."""
    loggers = [logging.getLogger(name) for name in (None, "absl", "orbax", "jax")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def steps(workdir: Path) -> list[tuple]:
    """Number, stage and loss of each step that was taken."""
    lines = (workdir / "metrics.jsonl").read_text("utf-8").splitlines()
    return [tuple(json.loads(line)[key] for key in KEYS) for line in lines]


def test_a_saved_model_gives_the_same_embeddings():
    saved = json.loads((SAVED / "embeddings.json").read_text("utf-8"))
    texts, embeddings = saved["texts"], saved["embeddings"]
    model = Embedder.load(SAVED / "model")
    tasks = {"base": None, "mixed": [None, *model.config.tasks, None]} | {task: task for task in model.config.tasks}
    assert embeddings.keys() == tasks.keys() and len(tasks) == 5
    for name, task in tasks.items():
        got = model.encode(texts, task=task)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, np.array(embeddings[name], np.float32), rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["adapters", "mlm"])
def test_a_half_way_run_goes_on_with_the_same_losses(name, tmp_path, caplog, restored_logging):
    saved = json.loads((SAVED / "losses.json").read_text("utf-8"))[name]
    workdir = shutil.copytree(SAVED / "runs" / name, tmp_path / "run")
    began = steps(workdir)
    assert len(began) == saved["saved_step"]

    with caplog.at_level(logging.INFO):
        done = CliRunner().invoke(main, [f"{SAVED}/config.py:{name}", "--workdir", str(workdir)])
    assert done.exit_code == 0, done.output
    assert f"resumed {workdir} at step {saved['saved_step']}" in caplog.text

    found, expected = steps(workdir), [tuple(step[key] for key in KEYS) for step in saved["next_steps"]]
    assert found[: len(began)] == began  # these were not taken again
    went_on = found[len(began) :]
    assert [step[:2] for step in went_on] == [step[:2] for step in expected]
    np.testing.assert_allclose([step[2] for step in went_on], [step[2] for step in expected], rtol=1e-5, atol=1e-5)
    assert np.isfinite(Embedder.load(workdir / "model").encode(["water"])).all()

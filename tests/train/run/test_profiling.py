"""`--profile-steps`: which steps are traced; that of a whole run is in `test_loop.py`."""

import contextlib
from pathlib import Path

import jax.numpy as jnp
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
pytest.importorskip("click")
from click.testing import CliRunner

from helpers.training import traced_steps
from train.__main__ import main
from train.run.profiling import StepRange, StepTrace, parse_steps

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("done", "last", "traced"), [(2, 6, [3, 4]), (3, 6, [4]), (0, 3, [3]), (4, 6, [])])
def test_a_run_that_resumes_or_stops_traces_what_there_is_of_the_range(done, last, traced, tmp_path, caplog):
    trace = StepTrace(tmp_path / "profile", StepRange(3, 4), done)
    with contextlib.closing(trace):
        for number in range(done + 1, last + 1):
            with trace.step(number, [jnp.ones(3)]):
                pass
    assert traced_steps(tmp_path) == traced
    assert ("steps 3:4 were done before" in caplog.text) == (not traced)


@pytest.mark.parametrize("text", ["", "5", "0:3", "4:3", "a:b", "1:2:3", "-1:2", "1:", " 1:2"])
def test_what_is_no_range_is_refused_before_work(text, tmp_path):
    arguments = [str(ROOT / "configs" / "pairs_short.py"), "--workdir", str(tmp_path / "run"), "--profile-steps", text]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "FIRST:LAST, both included" in result.output
    assert not (tmp_path / "run").exists()


def test_a_range_beyond_the_run_is_refused_before_work(tmp_path):
    arguments = [str(ROOT / "configs" / "pairs_short.py"), "--workdir", str(tmp_path / "run"), "--profile-steps", "59999:60001"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "59999:60001 are to be profiled, and the run has 60000" in result.output
    assert not (tmp_path / "run").exists()


def test_ranges_are_parsed():
    assert parse_steps("100:104") == StepRange(100, 104) and parse_steps("7:7") == StepRange(7, 7)

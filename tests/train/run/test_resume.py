"""Runs that are killed, stopped, damaged or changed resume, or say why not.

A resumed run has the parameters of one that was left alone.
"""

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
from orbax.checkpoint import v1 as ocp

from helpers.training import FAULTS, Runs, assert_identical, log_of, run_config, saved_arrays, stages, write_datasets
from jina_jax.checkpoints.native import load_checkpoint
from jina_jax.model.adapters import base_arrays, extract_adapters
from train.run.checkpoints import Saver
from train.run.metrics import read_metrics

EVERY = 4
STEPS = 18


def model_arrays(workdir: Path) -> dict:
    encoder = load_checkpoint(workdir / "model")
    return base_arrays(encoder) | extract_adapters(encoder)


def assert_same_run(workdir: Path, want: Path) -> None:
    """Model, optimizer, and the steps of the metrics, each once."""
    assert_identical(model_arrays(workdir), model_arrays(want))
    assert_identical(saved_arrays(workdir), saved_arrays(want))
    lines, expected = read_metrics(workdir), read_metrics(want)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """Two stages side by side, of two kinds of records each."""
    made = stages(write_datasets(tmp_path_factory.mktemp("datasets")), steps=STEPS // 2)
    config = run_config(
        made["text_matching"], made["separation"], checkpoint_every=EVERY, log_every=3, read_threads=2, dtype="bfloat16"
    )
    return Runs(tmp_path_factory.getbasetemp() / "compiled", config, pause=0.05)


@pytest.fixture(scope="module")
def undisturbed(runs, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert runs.finish(workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def half(runs, tmp_path_factory) -> Path:
    """A run that was killed after its second checkpoint, while it made the third; to be copied."""
    workdir = tmp_path_factory.mktemp("half") / "run"
    assert runs.finish(workdir, ("killed behind the arrays", 3)) == -signal.SIGKILL
    assert steps_saved(workdir) == [EVERY, 2 * EVERY]
    return workdir


@pytest.fixture
def interrupted(half, tmp_path) -> Path:
    return Path(shutil.copytree(half, tmp_path / "run"))


def steps_saved(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))


def damage(checkpoint: Path) -> None:
    """One bit of the largest file."""
    file = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def killed_at_random(runs: Runs, workdir: Path, seconds: float, rng: np.random.Generator) -> int:
    process = runs.start(workdir)
    process.join(seconds * rng.random())
    process.kill()
    process.join()
    return process.exitcode


# ---- killed ----


def test_a_run_killed_three_times_goes_on_to_the_same_parameters(runs, undisturbed, tmp_path):
    began = time.perf_counter()
    assert runs.finish(tmp_path / "whole") == 0
    seconds, rng = time.perf_counter() - began, np.random.default_rng(0)
    assert_same_run(tmp_path / "whole", undisturbed)  # of two runs that were left alone, too
    for _ in range(3):
        killed_at_random(runs, tmp_path / "run", seconds, rng)
    assert runs.finish(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_run_killed_at_each_of_20_random_moments_goes_on_to_the_same_parameters(runs, undisturbed, tmp_path):
    began = time.perf_counter()
    assert runs.finish(tmp_path / "whole") == 0
    seconds, rng, killed = time.perf_counter() - began, np.random.default_rng(1), 0
    while killed < 20:
        workdir = tmp_path / f"run{killed}"
        killed += killed_at_random(runs, workdir, seconds, rng) == -signal.SIGKILL
        assert runs.finish(workdir) == 0
        assert_same_run(workdir, undisturbed)
        shutil.rmtree(workdir)


KILLED = [name for name in FAULTS if name.startswith("killed")]
IN_SHORT = ("killed before the rename", "killed before the model is saved")


@pytest.mark.parametrize("fault", [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.slow) for name in KILLED])
def test_a_run_killed_inside_a_save_goes_on_to_the_same_parameters(runs, undisturbed, tmp_path, fault):
    workdir = tmp_path / "lr[1e-4]"  # brackets are a pattern to what looks for files below
    number = 1 if fault in ("killed while old ones are removed", "killed before the model is saved") else 2
    assert runs.finish(workdir, (fault, number)) == -signal.SIGKILL
    assert runs.finish(workdir) == 0
    assert not list(workdir.rglob("*.partial*"))
    if number == 2:
        assert f"resumed {workdir} at step {EVERY}" in log_of(workdir)
    assert_same_run(workdir.rename(tmp_path / "run"), undisturbed)


def test_a_run_that_is_asked_to_end_saves_and_says_how_to_go_on(runs, undisturbed, tmp_path):
    process = runs.start(tmp_path)
    while not (tmp_path / "metrics.jsonl").exists() or not read_metrics(tmp_path):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 0
    (last,) = steps_saved(tmp_path)[-1:]
    assert last < STEPS and f"stopped at step {last} of {STEPS}; start it again to resume" in log_of(tmp_path)
    assert not (tmp_path / "model").exists()
    assert runs.finish(tmp_path) == 0
    assert f"resumed {tmp_path} at step {last}" in log_of(tmp_path)
    assert_identical(model_arrays(tmp_path), model_arrays(undisturbed))


# ---- damaged ----


def test_a_damaged_checkpoint_is_put_aside_for_the_one_before_it(runs, undisturbed, interrupted):
    damage(interrupted / "checkpoints" / f"{2 * EVERY:08d}")
    assert runs.finish(interrupted) == 0
    said = log_of(interrupted)
    assert f"checkpoint of step {2 * EVERY} is damaged" in said and f"at step {EVERY}\n" in said
    assert_same_run(interrupted, undisturbed)
    assert (interrupted / "checkpoints" / f"damaged-{2 * EVERY:08d}").is_dir()


@pytest.mark.parametrize("lost", ["manifest.json", "run.json", "arrays"])
def test_a_checkpoint_with_a_part_missing_is_put_aside(runs, undisturbed, interrupted, lost):
    part = interrupted / "checkpoints" / f"{2 * EVERY:08d}" / lost
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    assert runs.finish(interrupted) == 0
    assert f"checkpoint of step {2 * EVERY} is damaged" in log_of(interrupted)
    assert_same_run(interrupted, undisturbed)


def test_without_a_good_checkpoint_a_run_says_so_and_begins_again(runs, undisturbed, interrupted):
    for step in (EVERY, 2 * EVERY):
        damage(interrupted / "checkpoints" / f"{step:08d}")
    assert runs.finish(interrupted) == 0
    assert "is good; starting from the beginning" in log_of(interrupted) and "resumed" not in log_of(interrupted)
    assert_same_run(interrupted, undisturbed)


def test_a_full_disk_ends_the_run_with_one_error_and_leaves_the_checkpoints_as_they_were(runs, undisturbed, tmp_path):
    assert runs.finish(tmp_path, ("disk full", 2)) == 1
    (error,) = [line for line in log_of(tmp_path).splitlines() if line.startswith("error: ")]
    assert f"the checkpoint of step {2 * EVERY} was not saved; those before it are as they were" in error
    assert steps_saved(tmp_path) == [EVERY] and not list(tmp_path.rglob("*.partial-*"))
    assert runs.finish(tmp_path) == 0
    assert_same_run(tmp_path, undisturbed)


def test_a_finished_model_whose_checkpoints_are_gone_is_not_written_over(runs, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints")
    assert runs.finish(tmp_path, seed=1) == 1
    assert "has a finished model and no good checkpoint" in log_of(tmp_path)


# ---- changed ----


def test_a_run_may_be_gone_on_with_in_another_manner(runs, undisturbed, interrupted, tmp_path):
    """Its data, too, may have another path."""

    def moved(dataset):
        copy = shutil.copytree(dataset.path, tmp_path / "elsewhere" / dataset.kind, dirs_exist_ok=True)
        return replace(dataset, path=str(copy))

    of_run = tuple(replace(stage, datasets=tuple(map(moved, stage.datasets))) for stage in runs.config.stages)
    manner = {"log_every": 1, "keep_checkpoints": 5, "checkpoint_every": 5, "read_threads": 0}
    assert runs.finish(interrupted, stages=of_run, **manner) == 0, log_of(interrupted)
    assert log_of(interrupted).count("(it has the same records)") == 4
    assert_identical(model_arrays(interrupted), model_arrays(undisturbed))
    assert steps_saved(interrupted) == [EVERY, 2 * EVERY, 10, 15, STEPS]
    steps = [line["step"] for line in read_metrics(interrupted)]
    assert len(steps) == len(set(steps)) and {*range(9, STEPS + 1)} < {*steps}


def test_a_finished_run_goes_on_for_more_steps_in_another_manner(runs, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    first, second = runs.config.stages
    longer = (replace(first, steps=first.steps + 2, encode_chunk_rows=2, logit_chunk=4, remat="full"), second)
    assert runs.finish(tmp_path, stages=longer) == 0, log_of(tmp_path)
    (said,) = [line for line in log_of(tmp_path).splitlines() if line.startswith(f"changed after step {STEPS}: ")]
    assert said.count("(from here on not bit for bit)") == 3
    assert "stages.0.steps: 9 -> 11 (from here on the learning rate is that of a run of 11 steps)" in said
    assert [line["step"] for line in read_metrics(tmp_path)][-1] == STEPS + 2
    before, aside = model_arrays(undisturbed), load_checkpoint(tmp_path / f"model-{STEPS:08d}")
    assert_identical(base_arrays(aside) | extract_adapters(aside), before)
    after = model_arrays(tmp_path)
    assert any(not np.array_equal(after[name], before[name]) for name in before)

    assert runs.finish(tmp_path) == 1
    assert "stages.0.steps: 11 -> 9, and 11 have been taken" in log_of(tmp_path)


def test_a_cut_off_line_of_the_metrics_is_written_again(runs, undisturbed, interrupted):
    with (interrupted / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 7, "sta')
    assert runs.finish(interrupted) == 0
    assert_same_run(interrupted, undisturbed)


def test_a_finished_run_has_nothing_to_do(runs, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "model").rglob("*")}
    assert runs.finish(undisturbed) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (undisturbed / "model").rglob("*")}


def test_the_last_checkpoints_are_kept(undisturbed):
    assert steps_saved(undisturbed) == [16, STEPS]


def test_a_table_is_stored_in_chunks_of_many_rows(tmp_path):
    """Each chunk is looked up when a run resumes: of one row each, there would be 250,000."""
    saver = Saver(tmp_path, keep=1)
    prime = 250_037  # rows of multilingual-e5-small's table, of which no number between one and all is a part
    arrays = {"tokens.table": jnp.zeros((2**16, 64)), "layers.up.kernel": jnp.zeros((2, 64, 128))}
    saver.save(1, arrays | {"tokens.a": jnp.zeros((prime, 1, 16))}, {})
    saver.close()
    stored = ocp.metadata(str(tmp_path / f"{1:08d}" / "arrays")).metadata
    pieces = {name: array.storage_metadata.chunk_shape for name, array in stored.items()}
    assert pieces == {"tokens.table": (2**15, 64), "layers.up.kernel": (2, 1, 128), "tokens.a": (prime, 1, 16)}

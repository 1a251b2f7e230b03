"""Several processes are one process with as many devices.

They run on this machine, with real collectives between them.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
from helpers.training import (
    Runs,
    assert_identical,
    exit_codes,
    free_address,
    log_of,
    run_config,
    saved_arrays,
    stages,
    write_datasets,
)
from helpers.waiting import meet
from jina_jax.parallel import processes
from train.config import MeshConfig
from train.run.metrics import read_metrics

DEVICES = 4


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def runs_of(datasets, tmp_path_factory):
    def make(*names: str, devices: int, steps: int = 4, pause: float = 0.0, **fields) -> Runs:
        # A large epsilon: AdamW would otherwise make a whole step of a gradient that is nothing but
        # rounding.
        made = stages(datasets, steps=steps, epsilon=1e-2, batch_size=16, encode_chunk_rows=2, num_row_counts=3)
        config = run_config(*(made[name] for name in names), log_every=1, checkpoint_every=1, **fields)
        return Runs(tmp_path_factory.getbasetemp() / f"compiled-{devices}", config, pause, devices)

    return make


@pytest.mark.parametrize(
    ("names", "counts", "fsdp"),
    [
        (("pairs",), (2,), 2),
        pytest.param(("pairs",), (2, 4), 1, marks=pytest.mark.slow),
        pytest.param(("mlm",), (2, 4), 2, marks=pytest.mark.slow),
        pytest.param(("retrieval", "separation"), (2, 4), 4, marks=pytest.mark.slow),
    ],
)
def test_several_processes_are_one(runs_of, tmp_path, names, counts, fsdp):
    whole = tmp_path / "one"
    assert runs_of(*names, devices=DEVICES, mesh=MeshConfig(fsdp=fsdp)).finish(whole) == 0, log_of(whole)
    want, lines = saved_arrays(whole), read_metrics(whole)
    for count in counts:
        workdir = tmp_path / str(count)
        job = runs_of(*names, devices=DEVICES // count, mesh=MeshConfig(fsdp=fsdp)).start_job(workdir, count)
        assert exit_codes(job) == [0] * count, log_of(workdir)
        for key in ("loss", "grad_norm", "padding_fraction"):
            np.testing.assert_allclose([x[key] for x in read_metrics(workdir)], [x[key] for x in lines], rtol=1e-5)
        for name, array in saved_arrays(workdir).items():
            np.testing.assert_allclose(array, want[name], atol=1e-5, err_msg=name)
        assert (workdir / "model" / "manifest.json").exists()


def test_a_killed_process_ends_the_others_and_the_restart_goes_on(runs_of, tmp_path):
    runs = runs_of("pairs", devices=1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert exit_codes(runs.start_job(whole, 2)) == [0, 0], log_of(whole)
    began = time.monotonic()
    codes = exit_codes(runs.start_job(killed, 2, faults={1: ("dies in a step", 4)}), seconds=120)
    assert codes[1] == -9 and codes[0] not in (0, None)
    assert time.monotonic() - began < 60 + 30  # the run itself included
    assert "process" in log_of(killed) and not (killed / "model").exists()
    assert exit_codes(runs.start_job(killed, 2)) == [0, 0], log_of(killed)
    assert "resumed" in log_of(killed)
    assert_identical(saved_arrays(killed), saved_arrays(whole))


@pytest.mark.slow
def test_processes_stop_behind_the_same_step_when_one_is_asked_to_end(runs_of, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert exit_codes(runs_of("pairs", devices=1, steps=30).start_job(whole, 2)) == [0, 0], log_of(whole)
    job = runs_of("pairs", devices=1, steps=30, pause=0.5).start_job(stopped, 2)
    wait_for(lambda: len(read_metrics(stopped)) >= 3)
    os.kill(job[1].pid, signal.SIGTERM)
    assert exit_codes(job) == [0, 0], log_of(stopped)
    assert "stopped at step" in log_of(stopped, 0) and not (stopped / "model").exists()
    assert exit_codes(runs_of("pairs", devices=1, steps=30).start_job(stopped, 2)) == [0, 0], log_of(stopped)
    assert_identical(saved_arrays(stopped), saved_arrays(whole))


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.1)


def test_an_error_in_one_process_is_every_processs_error(runs_of, tmp_path):
    job = runs_of("pairs", devices=1).start_job(tmp_path, 2, faults={1: ("wrong in a step", 2)})
    assert exit_codes(job, seconds=90) == [1, 1]
    assert "error: another process failed; process 1: something is wrong here" in log_of(tmp_path, 0)
    assert "error: process 1: something is wrong here" in log_of(tmp_path, 1)


def test_a_step_that_does_not_fit_one_process_is_not_begun_by_any(runs_of, tmp_path):
    job = runs_of("pairs", devices=1).start_job(tmp_path, 2, faults={1: ("has little memory", 8)})
    assert exit_codes(job, seconds=90) == [1, 1]
    for process in range(2):
        assert "stage pairs: a step on" in log_of(tmp_path, process) and "0.01 GiB" in log_of(tmp_path, process)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_on_another_mesh(runs_of, tmp_path):
    """Four devices in two processes, then one device: same batches, same result."""
    assert runs_of("pairs", devices=1).finish(tmp_path / "whole") == 0
    moved = tmp_path / "moved"
    faults = {number: ("dies in a step", 4) for number in range(2)}
    first = runs_of("pairs", devices=2, mesh=MeshConfig(fsdp=2)).start_job(moved, 2, faults)
    assert 0 not in exit_codes(first)
    assert runs_of("pairs", devices=1).finish(moved) == 0, log_of(moved)
    assert "resumed" in log_of(moved)
    want = saved_arrays(tmp_path / "whole")
    for name, array in saved_arrays(moved).items():
        np.testing.assert_allclose(array, want[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({}, "JAX_NUM_PROCESSES must be an integer, not ''"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID must be an integer, not 'one'"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID must be in 0..1, not 2"),
    ],
)
def test_an_incomplete_environment_is_named(monkeypatch, job, message):
    for name, value in ({"JAX_COORDINATOR_ADDRESS": "localhost:1"} | job).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        processes.start()


def test_a_process_that_is_late_is_waited_for_and_one_that_never_comes_is_named(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.training"])
    address, logs = free_address(), [tmp_path / str(number) for number in range(2)]
    job = [context.Process(target=meet, args=(number, address, log)) for number, log in enumerate(logs)]
    for process in job:
        process.start()
    assert exit_codes(job, seconds=60) == [0, 0]
    main, other = (log.read_text("utf-8") for log in logs)
    assert "process 1 has waited 0 s for process 0 (datasets/a)" in other
    assert "process 0 has waited 0 s for process 1 (the model is saved)" in main
    cure = "see its log, and set JINA_JAX_WAIT_SECONDS to wait longer"
    assert f"error: process 0 has waited 0.5 seconds for process 1 (never), which is alive; {cure}" in main
    assert f"error: process 1 has waited 0.5 seconds for process 0 (never told), which is alive; {cure}" in other


@pytest.mark.parametrize("limit", ["0", "-1", "soon", "nan", "inf"])
def test_a_limit_that_is_none_is_named(monkeypatch, limit):
    monkeypatch.setenv("JINA_JAX_WAIT_SECONDS", limit)
    with pytest.raises(ValueError, match=f"JINA_JAX_WAIT_SECONDS must be a number of seconds above 0, not '{limit}'"):
        processes.start()


def test_alone_there_is_nobody_to_wait_for(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert not processes.start() and jax.process_count() == 1
    processes.barrier("anything")
    assert processes.asking_main("rows")(3, b"5", lambda values: [value * 2 for value in values]) == b"55"
    assert processes.broadcast_from_main("name", lambda: "value") == "value"

"""Training runs in a bucket: the same as on a disk, bit for bit, however they are interrupted.

With `-m buckets` runs are killed at BUCKET_KILLS random moments for each store and number of
processes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
from helpers.buckets import ENVIRONMENT, random_faults
from helpers.training import Runs, assert_identical, exit_codes, log_of, run_config, saved_arrays, stages, write_datasets
from jina_jax.checkpoints.chunked_arrays import read_arrays, read_metadata
from jina_jax.checkpoints.native import load_checkpoint
from jina_jax.errors import CheckpointError
from jina_jax.model.adapters import base_arrays, extract_adapters
from jina_jax.storage import BucketPath
from jina_jax.storage.cache import fetch_directory
from train.run.bucket_checkpoints import begin_save, chunk_files, saved_in_bucket
from train.run.checkpoints import latest, restore
from train.run.metrics import metrics_writer, read_metrics

KILLS = int(os.environ.get("BUCKET_KILLS", "10"))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def config(datasets):
    return run_config(stages(datasets, steps=8)["pairs"], checkpoint_every=3, log_every=2)


@pytest.fixture(scope="module")
def on_disk(config, tmp_path_factory) -> Path:
    """The run on a disk, left alone."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert Runs(tmp_path_factory.getbasetemp() / "compiled", config).finish(workdir) == 0
    return workdir


@pytest.fixture
def runs(config, server, root, tmp_path_factory, monkeypatch) -> Runs:
    return runs_in(config, server, root, tmp_path_factory)


def runs_in(config, server, root, tmp_path_factory, **options) -> Runs:
    names = [*ENVIRONMENT, "JINA_JAX_CACHE", "STORAGE_EMULATOR_HOST", "AWS_ENDPOINT_URL", "JINA_JAX_BUCKET_SECONDS"]
    environment = {name: os.environ[name] for name in names if name in os.environ}
    options = {"pause": 0.05, "place": lambda logs: root / logs.name, "environment": environment} | options
    return Runs(tmp_path_factory.getbasetemp() / "compiled", config, **options)


def stored(workdir: BucketPath, at: int = -1) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint."""
    _, directory = saved_in_bucket(workdir / "checkpoints")[at]
    folder, hashes = chunk_files(directory)
    found, one = read_metadata(folder, hashes), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = {name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=one) for name, array in found.items()}
    return {name: np.asarray(array) for name, array in read_arrays(folder, found, targets, hashes).items()}


def model_arrays(directory: Path) -> dict:
    encoder = load_checkpoint(directory)
    return base_arrays(encoder) | extract_adapters(encoder)


def assert_same_run(workdir: BucketPath, want: Path) -> None:
    """Model, optimizer, and the metrics of each step, each once."""
    assert_identical(model_arrays(fetch_directory(workdir / "model")), model_arrays(want / "model"))
    assert_identical(stored(workdir), saved_arrays(want))
    lines, expected = read_metrics(workdir), read_metrics(want)
    assert [(line["step"], line["stage"], line["loss"]) for line in lines] == [
        (line["step"], line["stage"], line["loss"]) for line in expected
    ]


def steps_saved(workdir: BucketPath) -> list[int]:
    return [step for step, _ in saved_in_bucket(workdir / "checkpoints")]


# ---- left alone, and killed at chosen moments


def test_a_run_in_a_bucket_is_the_run_on_a_disk_though_it_is_killed_while_it_saves(runs, root, on_disk, tmp_path):
    workdir = root / "run"
    assert runs.finish(tmp_path / "run", ("killed before the manifest", 2)) == -signal.SIGKILL, log_of(tmp_path / "run")
    assert steps_saved(workdir) == [3]
    assert runs.finish(tmp_path / "run") == 0, log_of(tmp_path / "run")
    assert f"resumed {workdir} at step 3" in log_of(tmp_path / "run")
    assert_same_run(workdir, on_disk)
    assert steps_saved(workdir) == [6, 8]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["00000006", "00000008"]
    names = [path.name for path in workdir.iterdir()]
    assert names == [".lock", "checkpoints", "config.json", "metrics.jsonl", "model", "tensorboard"]
    assert len([*(workdir / "tensorboard").iterdir()]) >= 3  # one of each save


def test_a_checkpoint_is_a_zarr_group_that_tensorstore_reads(root):
    """An independent reader of the format gets the same bytes."""
    ts = pytest.importorskip("tensorstore")
    rng = np.random.default_rng(0)
    arrays = {
        "0/parameters/tokens.table": jnp.asarray(rng.normal(size=(7001, 640)).astype(np.float32)),
        "0/optimizer/layers.up.kernel": jnp.asarray(rng.normal(size=(2, 33, 5)), jnp.bfloat16),
        "count": jnp.asarray(3, jnp.int32),
    }
    begin_save(root / "checkpoints", 7, arrays, {"done": [7]}).write(lambda: None, 2)
    folder, _ = chunk_files(root / "checkpoints" / "00000007")
    found = json.loads((folder / "zarr.json").read_bytes())["consolidated_metadata"]["metadata"]
    assert found["0/parameters/tokens.table"]["chunk_grid"]["configuration"]["chunk_shape"] == [3276, 640]  # 8 MiB
    local = fetch_directory(folder.parent) / folder.name
    for name, want in arrays.items():
        (local / name / "zarr.json").write_text(json.dumps(found[name]))
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{local / name}/"}}
        got = ts.open(spec, open=True).result().read().result()
        assert got.tobytes() == np.asarray(want).tobytes()


def damaged(directory: BucketPath) -> None:
    """One bit of the largest object."""
    path, info = max(directory.objects(), key=lambda each: each[1].bytes)
    content = bytearray(path.read_bytes())
    content[info.bytes // 2] ^= 1
    path.write_bytes(bytes(content))


def lost(directory: BucketPath) -> None:
    path, _ = max(directory.objects(), key=lambda each: each[1].bytes)
    path.unlink()


@pytest.mark.parametrize("harm", [damaged, lost])
def test_a_checkpoint_that_is_damaged_is_put_aside(root, harm, caplog):
    arrays = {"x": jnp.arange(100.0), "y": jnp.ones(3)}
    for step in (1, 2):
        begin_save(root, step, arrays, {"step": step}).write(lambda: None, 2)
    assert latest(root).step == 2
    harm(root / "00000002")
    (root / "00000003" / "arrays-x" / "c").write_bytes(b"half a save")
    found = latest(root)
    assert found.step == 1 and found.run == {"step": 1}
    assert "checkpoint of step 2 is damaged and was put aside as" in caplog.text
    assert sorted(path.name for path in root.iterdir()) == ["00000001", "damaged-00000002"]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert_identical(restore(found, arrays, dict.fromkeys(arrays, one)), arrays)
    with pytest.raises(CheckpointError, match=r"does not fit this run: \['z'\]"):
        restore(found, arrays | {"z": jnp.ones(2)}, dict.fromkeys([*arrays, "z"], one))


def test_a_chunk_that_changes_between_the_check_and_the_reading_is_an_error(root):
    arrays = {"x": jnp.arange(100.0)}
    begin_save(root, 1, arrays, {}).write(lambda: None, 2)
    found = latest(root)
    damaged(found.directory)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(CheckpointError, match="is not what was written: its SHA-256 differs"):
        restore(found, arrays, {"x": one})


def test_a_run_that_was_copied_from_a_disk_is_resumed(root, on_disk, runs, tmp_path):
    """Orbax's checkpoints, which hashes alone tell to be whole; and the other way round."""
    source = on_disk / "checkpoints"
    for file in source.rglob("*"):
        if file.is_file():
            (root / "copied" / file.relative_to(source).as_posix()).write_bytes(file.read_bytes())
    found = latest(root / "copied")
    assert found.step == 8
    want = saved_arrays(on_disk)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert_identical(restore(found, want, dict.fromkeys(want, one)), want)
    begin_save(root / "back", 9, {name: jnp.asarray(x) for name, x in want.items()}, {}).write(lambda: None, 2)
    shutil.copytree(fetch_directory(root / "back"), tmp_path / "back")
    assert_identical(restore(latest(tmp_path / "back"), want, dict.fromkeys(want, one)), want)


def test_metrics_are_in_the_bucket_at_every_log_and_resume_drops_later_ones(root):
    numbers = {"loss": 1.0}
    writer = metrics_writer(root, 0)
    for step in range(1, 7):
        writer.write(step, "a", numbers)
        writer.publish(step, saved=step == 4)
        writer.wait()
        assert [line["step"] for line in read_metrics(root)] == [*range(1, step + 1)]
    writer.close()
    assert sorted(path.name for path in (root / "metrics").iterdir()) == ["00000005.jsonl", "00000006.jsonl"]
    writer = metrics_writer(root, 4)
    assert [line["step"] for line in read_metrics(root)] == [1, 2, 3, 4] and not (root / "metrics").exists()
    writer.close()


# ---- bad input


def test_another_run_or_another_process_in_the_directory_is_refused(root, runs, tmp_path, server):
    workdir = root / "run"
    elsewhere = {"host": "another", "boot": "", "namespace": "", "pid": 1, "started": "1", "holder": "x", "renewals": 0}
    (workdir / ".lock").write_text(json.dumps(elsewhere))
    process = runs.start(tmp_path / "run")
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:  # it lives
        elsewhere["renewals"] += 1
        (workdir / ".lock").write_text(json.dumps(elsewhere))
        time.sleep(1.0)
    assert exit_codes([process]) == [1]
    assert f"another process is training in {workdir}" in log_of(tmp_path / "run")
    (root / "object").write_text("x")
    assert runs_at(runs, root / "object").finish(tmp_path / "object") == 1
    assert "object is an object, not a directory" in log_of(tmp_path / "object")


def runs_at(runs: Runs, place: BucketPath) -> Runs:
    runs._place = lambda logs: place
    return runs


# ---- for as long as there is time: make test-buckets


def random_kills(runs: Runs, workdir: BucketPath, logs: Path, processes: int, check: Callable[[], None]) -> None:
    """Kills runs at KILLS random moments of their time, saves included, and resumes them."""
    rng = np.random.default_rng(processes)
    began = time.monotonic()
    assert exit_codes(runs.start_job(logs, processes) if processes > 1 else [runs.start(logs)]) == [0] * processes
    seconds, killed = time.monotonic() - began, 0
    check()
    while killed < KILLS:
        workdir.rmtree()
        while killed < KILLS:
            job = runs.start_job(logs, processes) if processes > 1 else [runs.start(logs)]
            job[rng.integers(processes)].join(seconds * rng.random())
            victim = job[rng.integers(processes)]
            if victim.is_alive():
                victim.kill()
                killed += 1
            codes = exit_codes(job)
            if codes == [0] * processes:
                break
        assert exit_codes(runs.start_job(logs, processes) if processes > 1 else [runs.start(logs)]) == [0] * processes
        check()


@pytest.fixture(scope="module")
def long_config(datasets):
    """Two stages side by side, of two kinds of records each."""
    made = stages(datasets, steps=9)
    return run_config(
        made["text_matching"], made["separation"], checkpoint_every=2, log_every=3, read_threads=2, dtype="bfloat16"
    )


@pytest.mark.buckets
@pytest.mark.parametrize("processes", [1, 2])
def test_runs_killed_at_random_moments_go_on_to_the_same_parameters(
    long_config, server, root, tmp_path, tmp_path_factory, processes
):
    disk = Runs(tmp_path_factory.getbasetemp() / "compiled", long_config)
    want = tmp_path / "disk"
    assert exit_codes(disk.start_job(want, processes) if processes > 1 else [disk.start(want)]) == [0] * processes
    runs = runs_in(long_config, server, root, tmp_path_factory)
    workdir = root / "run"
    random_kills(runs, workdir, tmp_path / "run", processes, lambda: assert_same_run(workdir, want))


@pytest.mark.buckets
def test_a_store_that_fails_now_and_then_or_is_away_changes_nothing(config, server, root, on_disk, tmp_path, runs):
    server.fault = random_faults(0.05, seed=3)
    assert runs.finish(tmp_path / "run") == 0, log_of(tmp_path / "run")
    server.reset()
    assert_same_run(root / "run", on_disk)
    # Away for a while, as soon as the second save begins.
    (root / "run").rmtree()
    away = []

    def fault(method, path, body):
        if "00000006" in path and not away:
            away.append(time.monotonic())
        return 503 if away and time.monotonic() - away[0] < float(os.environ.get("BUCKET_AWAY", "10")) else None

    server.fault = fault
    assert runs.finish(tmp_path / "run") == 0, log_of(tmp_path / "run")
    server.reset()
    assert away
    assert_same_run(root / "run", on_disk)


@pytest.mark.buckets
def test_a_store_that_stays_away_ends_the_run_and_what_was_saved_stays(
    config, server, root, on_disk, tmp_path, monkeypatch, tmp_path_factory
):
    monkeypatch.setenv("JINA_JAX_BUCKET_SECONDS", "5")
    runs = runs_in(config, server, root, tmp_path_factory)
    gone = []
    server.fault = lambda method, path, body: 503 if gone or ("00000006" in path and not gone.append(1)) else None
    began = time.monotonic()
    assert runs.finish(tmp_path / "run") == 1
    assert time.monotonic() - began < 60
    assert "for 5 seconds" in log_of(tmp_path / "run").splitlines()[-1]
    server.reset()
    assert steps_saved(root / "run") == [3]
    assert runs.finish(tmp_path / "run") == 0, log_of(tmp_path / "run")
    assert_same_run(root / "run", on_disk)


@pytest.mark.buckets
def test_requests_of_a_save_and_a_restore_are_few(root, server):
    """One for each chunk, and a few more; `-s` prints what docs/pods.md says."""
    arrays = {f"{name}": jnp.zeros(4 * 2**20) for name in "abcdef"}  # two chunks each
    begin_save(root, 1, arrays, {}).write(lambda: None, 1)

    def requests(act: Callable[[], object]) -> dict[str, int]:
        server.counts.clear()
        act()
        return dict(server.counts)

    save = requests(lambda: begin_save(root, 2, arrays, {}).write(lambda: None, 1))
    find = requests(lambda: latest(root))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    load = requests(lambda: restore(latest(root), arrays, dict.fromkeys(arrays, one)))
    print(f"\n{server.scheme}: 12 chunks: save {save}, latest {find}, latest and restore {load}")
    assert save["POST" if server.scheme == "gs" else "PUT"] == 12 + 3 and sum(save.values()) <= 15 + 15 + 4
    assert sum(find.values()) <= 8 and sum(load.values()) <= 12 + sum(find.values()) + 4


@pytest.mark.buckets
def test_a_checkpoint_is_read_on_any_mesh(root):
    program = Path(__file__).parents[1] / "subprocesses" / "chunks_on_meshes.py"
    done = subprocess.run([sys.executable, str(program), str(root)], capture_output=True, text=True, cwd=program.parents[2])
    assert done.stdout.endswith("equal\n"), done.stderr

"""Training runs in a bucket: the same as on a disk, bit for bit, however they are interrupted.

With `-m buckets` runs are killed at BUCKET_KILLS random moments for each store and number of
processes.
"""

import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
from helpers.buckets import ENVIRONMENT
from helpers.training import Runs, assert_identical, log_of, run_config, saved_arrays, stages, write_datasets
from jina_jax.checkpoints.chunked_arrays import read_arrays, read_metadata
from jina_jax.checkpoints.native import load_checkpoint
from jina_jax.model.adapters import base_arrays, extract_adapters
from jina_jax.storage import BucketPath
from jina_jax.storage.cache import fetch_directory
from train.run.bucket_checkpoints import chunk_files, saved_in_bucket
from train.run.metrics import read_metrics

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
    found, one = read_metadata(folder), jax.sharding.SingleDeviceSharding(jax.devices()[0])
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
    assert runs.finish(tmp_path / "run", ("killed before the manifest", 3)) == -signal.SIGKILL, log_of(tmp_path / "run")
    assert steps_saved(workdir) == [3]  # the third object that is only made if there is none is the lock
    assert runs.finish(tmp_path / "run") == 0, log_of(tmp_path / "run")
    assert f"resumed {workdir} at step 3" in log_of(tmp_path / "run")
    assert_same_run(workdir, on_disk)
    assert steps_saved(workdir) == [6, 8]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["00000006", "00000008"]
    names = [path.name for path in workdir.iterdir()]
    assert names == [".lock", "checkpoints", "config.json", "metrics.jsonl", "model", "tensorboard"]
    assert len([*(workdir / "tensorboard").iterdir()]) == 3  # one of each save

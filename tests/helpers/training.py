"""Tiny training runs.

Datasets of every kind, stages of every objective, and runs in processes that can be killed.
"""

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from orbax.checkpoint import v1 as ocp

from jina_jax import ModelConfig
from jina_jax.checkpoints import chunked_arrays
from jina_jax.parallel.processes import abort_together, start
from jina_jax.storage import StoragePath
from train.config import DatasetConfig, InitialModel, Stage, TrainConfig
from train.data.tfds_datasets import prepare_records
from train.run import bucket_checkpoints, checkpoints, loop
from train.step import memory

TOKENIZER = str(Path(__file__).resolve().parents[2] / "data" / "tokenizer")
MODEL = ModelConfig(vocab_size=16_000, hidden_size=32, num_layers=1, num_heads=2, mlp_size=64)
START = InitialModel(model=MODEL, tokenizer=TOKENIZER)
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()
KINDS = ("text", "pair", "triplet", "scored_pair", "labelled_text")
RECORDS = 40
BATCH = {"batch_size": 8, "max_length": 24, "row_length": 48, "num_row_counts": 1}


def records(kind: str, seed: int = 0) -> list[dict[str, Any]]:
    """Records of random words, half of them marked as English and half as German."""
    rng = np.random.default_rng(seed)

    def text(words: int) -> str:
        return " ".join(rng.choice(WORDS, words))

    def fields(number: int) -> dict[str, Any]:
        # Some have the same positive, and some have it as a negative.
        positive, negative = ({} if number % 4 != rest else {"p": "alpha beta gamma"} for rest in (1, 3))
        match kind:
            case "text":
                return {"text": text(12)}
            case "pair":
                return {"anchor": text(4), "positive": positive.get("p", text(8))}
            case "triplet":
                negatives = [negative.get("p", text(6)), text(6), text(6)]
                return {"anchor": text(4), "positive": positive.get("p", text(8)), "negatives": negatives}
            case "scored_pair":
                return {"sentence1": text(5), "sentence2": text(5), "score": float(rng.random())}
        return {"text": text(6), "label": f"label {number % 3}"}

    return [fields(number) | {"language": "en" if number % 2 else "de"} for number in range(RECORDS)]


def write_datasets(directory: Path) -> dict[str, DatasetConfig]:
    """Writes a dataset of every kind; returns them by kind."""
    found = {}
    for kind in KINDS:
        file = directory / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records(kind)), "utf-8")
        found[kind] = DatasetConfig(str(prepare_records({"train": [file]}, kind, directory / kind)), kind)
    return found


def stages(datasets: dict[str, DatasetConfig], steps: int = 4, **fields: Any) -> dict[str, Stage]:
    """A stage of every objective, by name."""
    of_objective: dict[str, dict[str, Any]] = {
        "mlm": {"datasets": ("text",)},
        "pairs": {"datasets": ("pair",), "dims": (8, 32)},
        "retrieval": {"datasets": ("triplet",), "adapters": ("retrieval.query", "retrieval.passage"), "num_negatives": 2},
        "text_matching": {"datasets": ("scored_pair", "triplet"), "adapters": ("text-matching",), "num_negatives": 1},
        "classification": {"datasets": ("labelled_text",), "adapters": ("classification",), "num_negatives": 2},
        "separation": {"datasets": ("labelled_text", "pair"), "adapters": ("separation",)},
    }
    common = {"steps": steps, "warmup_steps": 1, "learning_rate": 1e-2} | BATCH | fields
    return {
        name: Stage(
            name=name, objective=name, **(own | {"datasets": tuple(datasets[kind] for kind in own["datasets"])} | common)
        )  # type: ignore[arg-type]
        for name, own in of_objective.items()
    }


def run_config(*of_run: Stage, **fields: Any) -> TrainConfig:
    return TrainConfig(**({"start": START, "stages": of_run, "dtype": "float32", "read_threads": 0} | fields))


def saved_arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Parameters and optimizer of a run's last checkpoint."""
    last = sorted(path for path in (workdir / "checkpoints").glob("[0-9]*"))[-1]
    stored, one = ocp.metadata(str(last.absolute() / "arrays")).metadata, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    whole = {name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=one) for name, array in stored.items()}
    return {name: np.asarray(array) for name, array in ocp.load(str(last.absolute() / "arrays"), whole).items()}


def traced_steps(workdir: Path) -> list[int]:
    """Numbers of the steps that the traces of a run hold, by JAX's own reader."""
    found = []
    for file in sorted((workdir / "profile").rglob("*.xplane.pb")):
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events if event.name == "train"]
        found += [int(dict(event.stats)["step_num"]) for event in events]
    return sorted(found)


def assert_identical(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Asserts that arrays are equal bit for bit."""
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert np.asarray(got[name]).tobytes() == np.asarray(array).tobytes(), name


@contextlib.contextmanager
def compiled_once(directory: Path) -> Iterator[None]:
    """Keeps the compiled programs of this process in a directory, however small they are."""
    settings = {
        "jax_compilation_cache_dir": str(directory),
        # A command tested before may have left a limit, and its bookkeeping.
        "jax_compilation_cache_max_size": -1,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_enable_xla_caches": "none",
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


# ---- runs in separate processes ----


class Runs:
    """Starts runs in processes.

    They are forked from a server that has everything imported, since imports take longer than the
    runs.
    """

    def __init__(
        self,
        cache: Path,
        config: TrainConfig,
        pause: float = 0.0,
        devices: int = 1,
        place: Callable[[Path], StoragePath] = lambda workdir: workdir,
        environment: dict[str, str] | None = None,
    ):
        """`place` says where a run trains whose logs are in a directory."""
        self.config, self._options = config, (cache, pause, devices)
        self._place, self._environment = place, environment or {}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["helpers.training"])
        with pytest.MonkeyPatch.context() as patch:
            # The server finds this module by it.
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            forkserver.ensure_running()

    def start(
        self, workdir: Path, fault: tuple[str, int] | None = None, *, job: dict[str, str] | None = None, **changes: Any
    ) -> Any:
        """Starts one process; `job` is the environment by which it finds the others of its job."""
        workdir.mkdir(parents=True, exist_ok=True)
        environment = self._environment | (job or {})
        arguments = replace(self.config, **changes), workdir, self._place(workdir), fault, environment, *self._options
        process = self._context.Process(target=_child, args=arguments)
        process.start()
        return process

    def start_job(
        self, workdir: Path, count: int, faults: dict[int, tuple[str, int]] | None = None, **changes: Any
    ) -> list[Any]:
        """Starts `count` processes that work together."""
        job = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": str(count)}
        return [
            self.start(workdir, (faults or {}).get(number), job=job | {"JAX_PROCESS_ID": str(number)}, **changes)
            for number in range(count)
        ]

    def finish(self, workdir: Path, fault: tuple[str, int] | None = None, **changes: Any) -> int:
        """Runs one process to its end; returns its exit code, negative for a signal's number."""
        return exit_codes([self.start(workdir, fault, **changes)])[0]


def free_address() -> str:
    """Address of a port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def exit_codes(processes: list[Any], seconds: float = 240) -> list[int]:
    """Waits for processes to end; returns their exit codes, negative for a signal's number.

    Processes that have not ended in time are killed, and fail the test.
    """
    for process in processes:
        process.join(seconds)
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        process.kill()
    assert not hanging, "the run hangs"
    return [process.exitcode for process in processes]


def log_of(workdir: Path, process: int = 0) -> str:
    """Log of the runs in a directory; of a job, the log of one of its processes."""
    return (workdir / f"run-{process}.log").read_text("utf-8")


def _child(
    config: TrainConfig,
    logs: Path,
    workdir: StoragePath,
    fault: tuple[str, int] | None,
    job: dict[str, str],
    cache: Path,
    pause: float,
    devices: int,
) -> None:
    output = (logs / f"run-{job.get('JAX_PROCESS_ID', 0)}.log").open("a", encoding="utf-8")
    os.environ.update(job)
    os.dup2(output.fileno(), sys.stdout.fileno())
    os.dup2(output.fileno(), sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=output, force=True)
    for noisy in ("absl", "orbax", "jax", "urllib3", "botocore"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    with compiled_once(cache):
        slow_next_stage = loop.next_stage
        loop.next_stage = lambda *arguments: (time.sleep(pause), slow_next_stage(*arguments))[1]  # type: ignore[assignment]
        if fault:
            FAULTS[fault[0]](fault[1])
        try:
            start()
            with abort_together():
                loop.train(config, workdir, progress=False)
        except (ValueError, OSError) as error:
            logging.error("error: %s", error)
            output.flush()
            sys.exit(1)


def _before(owner: Any, name: str, number: int, act: Callable[[], None]) -> None:
    """Makes the `number`-th call of a function do `act` first."""
    function, calls = getattr(owner, name), itertools.count(1)

    def replaced(*arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            act()
        return function(*arguments, **named)

    setattr(owner, name, replaced)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise ValueError("something is wrong here")


def _disk_full() -> None:
    """Limits every file to 128 KiB from here on.

    The largest arrays do not fit; the log, with Orbax's messages, does.
    """
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (131_072, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


FAULTS: dict[str, Callable[[int], None]] = {
    "killed before the arrays": lambda number: _before(checkpoints.ocp, "save_async", number, _die),
    "killed behind the arrays": lambda number: _before(checkpoints, "seal", number, _die),
    "killed before the rename": lambda number: _before(Path, "rename", number, _die),
    "killed while old ones are removed": lambda number: _before(shutil, "rmtree", number, _die),
    "killed before the chunks": lambda number: _before(bucket_checkpoints, "write_parts", number, _die),
    "killed among the chunks": lambda number: _before(chunked_arrays, "write_file", number, _die),
    "killed before the manifest": lambda number: _before(bucket_checkpoints, "create", number, _die),
    "killed behind the manifest": lambda number: _before(bucket_checkpoints, "saved_in_bucket", number, _die),
    "killed before the model is saved": lambda number: _before(loop, "save_checkpoint", number, _die),
    "dies in a step": lambda number: _before(loop, "from_process_local", number, _die),
    "wrong in a step": lambda number: _before(loop, "from_process_local", number, _raise),
    "disk full": lambda number: _before(checkpoints.ocp, "save_async", number, _disk_full),
    "has little memory": lambda number: setattr(memory, "_host_memory", lambda: number * 2**20),
}
"""Faults by name; each takes the number of the save, or of the step, at which it happens, or the
MiB that there are."""

"""The training loop: model, data, state, restore, step.

It does one run of a configuration in a working directory:

WORKDIR/config.json      configuration of the run
WORKDIR/checkpoints/     checkpoints to resume from
WORKDIR/metrics.jsonl    and tensorboard/: loss and speed
WORKDIR/profile/         a trace of some steps, where one is asked for
WORKDIR/model/           the finished model, for Embedder.load
"""

import contextlib
import fcntl
import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import grain
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from jina_jax.checkpoints.native import is_checkpoint, save_checkpoint
from jina_jax.checkpoints.sealed_directory import MANIFEST
from jina_jax.errors import RunError
from jina_jax.files import dump_json
from jina_jax.model.adapters import base_arrays
from jina_jax.model.parameters import Arrays
from jina_jax.parallel.mesh import from_process_local, make_mesh, shard_params, shardings
from jina_jax.parallel.processes import asking_main, barrier, is_main_process, main_process_first
from jina_jax.storage import StoragePath, is_bucket
from jina_jax.storage.lease import hold
from jina_jax.storage.upload import move_directory

from ..config import Stage, TrainConfig, to_dict
from ..data.stream import batch_stream, open_datasets, prefetch
from ..step.chips import peak_flops
from ..step.flops import training_flops
from ..step.memory import fitted_step
from ..step.trainable_split import merge_trained, ready_to_fold, split_trainable
from ..step.update import State, Step, abstract_state, all_finite, initial_state
from .checkpoints import Checkpoint, Saver, latest, remove_unfinished, restore
from .identity import changes, run_identity
from .initial_model import load_start, prepare_for_stages, with_token_frequencies
from .metrics import StepRecord, TrainingDiverged, fetch_metrics, metrics_writer, summarise
from .profiling import StepRange, StepTrace

logger = logging.getLogger(__name__)


FREQUENCY_BATCHES = 16
"""Batches over which token frequencies are counted, for a fresh MLM head."""


class StageRun(NamedTuple):
    """A stage in training."""

    stage: Stage
    frozen: Arrays
    batches: grain.DatasetIterator
    steps: dict[str, Step]
    """Compiled steps by the kind of a batch's records."""
    flops_per_token: float


def train(
    config: TrainConfig, workdir: StoragePath, *, progress: bool = True, profile: StepRange | None = None
) -> StoragePath | None:
    """Trains until the last step and writes the model.

    An interrupted run resumes from its newest good checkpoint.

    Args:
        config: configuration of the run.
        workdir: directory of everything that the run writes, on a disk that all processes share or
            in a bucket.
        progress: show a progress bar on a terminal.
        profile: steps to record a trace of, in WORKDIR/profile; None = none.

    Returns:
        The directory of the finished model; None if SIGTERM stopped the run after a save.

    Raises:
        RunError: `workdir` holds another run, and the message lists the differences; or another
            process is training in it, or has taken over a directory in a bucket.
        TrainingDiverged: a loss, gradient or parameter was not finite; the message has the step.
            Nothing of it is saved.
        ValueError, OSError: errors of the configuration, the data or the disk; or `profile` goes
            beyond the run's last step.
    """
    if profile is not None and profile.last > config.steps:
        raise ValueError(f"steps {profile} are to be profiled, and the run has {config.steps}")
    host = _host()
    with main_process_first("workdir"):
        if is_bucket(workdir) and workdir.is_file():
            raise NotADirectoryError(f"{workdir} is an object, not a directory")
        workdir.mkdir(parents=True, exist_ok=True)
    # The full model stays on the host, for the end: device memory is for what a step needs.
    with _only_run(workdir) if is_main_process() else contextlib.nullcontext(lambda: None) as check, jax.default_device(host):
        return _train(config, workdir, progress, profile, check)


def _host() -> Any:
    """Returns the CPU as a device; JAX omits it if JAX_PLATFORMS names only other platforms."""
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    if platforms and "cpu" not in platforms.split(","):
        # Once JAX has started this is too late, and an error below.
        jax.config.update("jax_platforms", f"{platforms},cpu")
    return jax.local_devices(backend="cpu")[0]


def _train(
    config: TrainConfig, workdir: StoragePath, progress: bool, profile: StepRange | None, check: Callable[[], None]
) -> StoragePath | None:
    # ---- model, mesh and data
    if is_main_process() and not is_bucket(workdir):
        remove_unfinished(workdir)
    checkpoint = latest(workdir / "checkpoints")
    if checkpoint is None and is_checkpoint(workdir / "model"):
        raise RunError(f"{workdir} has a finished model and no good checkpoint of its run; give another --workdir")
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    start, tokenizer = load_start(config)
    encoder = prepare_for_stages(start, config)
    base: Arrays = {}
    runs, states, opened = [], [], []
    for stage in config.stages:
        opened.append(sources := open_datasets(stage, workdir))
        stream = partial(batch_stream, stage, sources, encoder.config, tokenizer, seed=config.seed)
        if stage.objective == "mlm":
            global_stream = stream()  # the same for any number of processes
            labels = (global_stream[i][1].parts[0].labels for i in range(FREQUENCY_BATCHES))  # type: ignore[index]
            encoder = with_token_frequencies(encoder, labels)  # type: ignore[arg-type]
        local_stream = stream(
            devices=mesh.size // jax.process_count(),
            process=jax.process_index(),
            processes=jax.process_count(),
            asking_main=asking_main,
        )
        model, trained, frozen = split_trainable(encoder, stage)
        frozen = ready_to_fold(frozen, stage, config.dtype)
        base = base or shard_params({path: frozen[path] for path in base_arrays(encoder) if path in frozen}, mesh)
        # Stages share the base.
        frozen = base | shard_params({path: x for path, x in frozen.items() if path not in base}, mesh)
        kinds = {dataset.kind for dataset in stage.datasets}
        steps = {kind: fitted_step(stage, kind, model, config.dtype, mesh) for kind in kinds}
        flops = training_flops(model, stage)
        runs.append(StageRun(stage, frozen, prefetch(local_stream, config.read_threads), steps, flops))
        states.append(initial_state(stage, trained, mesh) if checkpoint is None else abstract_state(stage, trained))

    # ---- restore
    identity = run_identity(config, start, encoder, tokenizer, opened)
    done = [0] * len(runs)
    if checkpoint is not None:
        states, done = _resumed(checkpoint, identity, states, runs, mesh)
        logger.info("resumed %s at step %d", workdir, checkpoint.step)
        if sum(done) < config.steps:
            _put_aside(workdir / "model", checkpoint.step)
    if is_main_process():
        (workdir / "config.json").write_text(dump_json(to_dict(config)), "utf-8")

    # ---- loop
    saver = Saver(workdir / "checkpoints", config.keep_checkpoints, check)
    writer = metrics_writer(workdir, sum(done))
    trace = StepTrace(workdir / "profile", profile, sum(done))
    peak = peak_flops(jax.devices()[0], mesh.size)
    pending: list[StepRecord] = []
    began = time.perf_counter()
    with (
        contextlib.closing(writer),
        contextlib.closing(saver),
        contextlib.closing(trace),
        _stop_signal() as stopped,
        tqdm(
            total=config.steps, initial=sum(done), unit="step", disable=None if progress and is_main_process() else True
        ) as bar,
    ):
        stopping = False
        while sum(done) < config.steps and not stopping:
            turn = next_stage(config, done)
            run = runs[turn]
            with trace.step(sum(done) + 1, states):
                kind, batch = next(run.batches)
                states[turn], metrics = run.steps[kind](states[turn], run.frozen, from_process_local(batch, mesh))
            done[turn] += 1
            step, slots = sum(done), sum(part.tokens.size for part in batch.parts) * jax.process_count()
            pending.append(StepRecord(step, run.stage, done[turn], metrics, slots, run.flops_per_token))
            stopping = stopped(step)
            save = step % config.checkpoint_every == 0 or step == config.steps or stopping
            if save or step % config.log_every == 0:
                for number, name, numbers in summarise(fetch_metrics(pending), time.perf_counter() - began, peak):
                    writer.write(number, name, numbers)
                    bar.set_description(f"{name}: loss {numbers['loss']:.3f}", refresh=False)
                writer.publish(step, saved=save)
                bar.update(len(pending))
                pending, began = [], time.perf_counter()
            if save:  # only what is finite: `fetch_metrics` has checked the losses
                if not all_finite(states):
                    raise TrainingDiverged(f"step {step} made parameters that are not finite. Nothing of it was saved")
                saver.save(step, states, identity | _position(done, runs))
        saver.wait()
        writer.wait()
    if sum(done) < config.steps:
        logger.warning("stopped at step %d of %d; start it again to resume", sum(done), config.steps)
        return None

    # ---- the finished model
    if not is_checkpoint(workdir / "model"):
        for run, state in zip(runs, states, strict=True):
            encoder = merge_trained(encoder, run.stage, _on_host(state.parameters, mesh))
        save_checkpoint(workdir / "model", encoder, tokenizer)
    barrier("the model is saved")
    return workdir / "model"


def _on_host(arrays: Arrays, mesh: Mesh) -> Arrays:
    """Gathers full arrays on the host of each process."""
    if mesh.is_multi_process:
        arrays = {path: multihost_utils.process_allgather(x, tiled=True) for path, x in arrays.items()}
    return jax.device_put(arrays, _host())


@contextlib.contextmanager
def _only_run(workdir: StoragePath) -> Iterator[Callable[[], None]]:
    """Locks the directory: two processes that train in it would each remove what the other writes.

    The lock ends with its process. Yields a function that raises an error if it is lost, as one in
    a bucket may be to a process that has not heard of this one for long.
    """
    busy = f"another process is training in {workdir}; wait for it, or give another --workdir"
    if is_bucket(workdir):
        with hold(workdir / ".lock", busy) as lease:
            yield lease.check
        return
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(busy) from error
        yield lambda: None


def next_stage(config: TrainConfig, done: list[int]) -> int:
    """Index of the stage to train next: the one furthest behind. It depends on the counts only."""
    return min(range(len(done)), key=lambda i: (done[i] / config.stages[i].steps, i))


def _position(done: list[int], runs: list[StageRun]) -> dict[str, Any]:
    return {"done": list(done), "data": [dict(run.batches.get_state()) for run in runs]}


def _resumed(
    checkpoint: Checkpoint, identity: dict[str, Any], states: list[State], runs: list[StageRun], mesh: Mesh
) -> tuple[list[State], list[int]]:
    refused, taken = changes(checkpoint.run, identity)
    if refused:
        raise RunError(
            f"{checkpoint.directory.parents[1]} holds another run; it differs in: {'; '.join(refused)}. "
            "Give the same configuration, or another --workdir"
        )
    if taken:
        logger.warning("changed after step %d: %s", checkpoint.step, "; ".join(taken))
    for run, position in zip(runs, checkpoint.run["data"], strict=True):
        run.batches.set_state(position)
    return restore(checkpoint, states, shardings(states, mesh)), list(checkpoint.run["done"])


def _put_aside(model: StoragePath, step: int) -> None:
    """Renames the finished model of a run that goes on for more steps."""
    with main_process_first("model put aside"):
        if is_checkpoint(model):
            name = f"{model.name}-{step:08d}"  # the same model, if it was put aside before
            if is_bucket(model):
                move_directory(model, aside := model.with_name(name), MANIFEST)
            else:
                shutil.rmtree(aside := model.with_name(name), ignore_errors=True)
                model.rename(aside)
            logger.warning("the model of step %d is now %s", step, aside)


@contextlib.contextmanager
def _stop_signal() -> Iterator[Callable[[int], bool]]:
    """Yields a function that says whether to stop after a step, because of SIGTERM.

    All processes stop after the same step.
    """
    # JAX has caught the signal since the processes met, and agrees on the step.
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only that one can catch signals
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        yield lambda step: stopped.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)

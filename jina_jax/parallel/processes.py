"""Several processes as one program: start-up, agreement on values, a common end if one fails.

JAX's collectives run on the devices, in the order of the steps. The values agreed on here go
through the coordinator instead, so that any thread may agree at any time. A process that dies ends
the others within HEARTBEAT_SECONDS; one that only takes long is waited for. In a program of one
process none of this does anything.
"""

import base64
import contextlib
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed  # the coordinator's client has no public name

from ..errors import RunError

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 20
"""Seconds without a heartbeat after which a process counts as dead, and the others end."""

WAIT_SECONDS = 24 * 60 * 60
"""Most seconds that processes may be apart, such as while one of them prepares a dataset.

The environment variable JINA_JAX_WAIT_SECONDS sets another limit.
"""

SAY_SECONDS = 60.0
"""Seconds after which a process says what it waits for; it says so again when they have doubled."""

Answers = Callable[[list[bytes]], list[bytes]]

_FAILED = "jina-jax/failed/"
_LOOK_SECONDS = 1.0


def start() -> bool:
    """Joins the other processes of this job. Call it before anything asks for JAX's devices.

    The processes are found by, in this order:
      * JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID;
      * Slurm, if the job step has several tasks;
      * a Cloud TPU, as a JobSet on GKE (multislice too) or as virtual machines.

    Returns:
        True if there are other processes.

    Raises:
        ValueError: JAX_COORDINATOR_ADDRESS is set, and one of the other two is missing or invalid;
            or JINA_JAX_WAIT_SECONDS is no number of seconds.
    """
    _wait_limit()
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        count, number = _int_env("JAX_NUM_PROCESSES"), _int_env("JAX_PROCESS_ID")
        if not 0 <= number < count:
            raise ValueError(f"JAX_PROCESS_ID must be in 0..{count - 1}, not {number}")
        _initialize(num_processes=count, process_id=number)
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 or _on_cloud_tpu():
        _initialize()
    return jax.process_count() > 1


def _initialize(**arguments: Any) -> None:
    slow = threading.Timer(SAY_SECONDS, logger.warning, ["still waiting for the other processes of this job to start"])
    slow.daemon = True
    slow.start()
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **arguments)
    finally:
        slow.cancel()


def _int_env(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS is set, so {name} must be an integer, not {text!r}")
    return int(text)


def _on_cloud_tpu() -> bool:
    """True if this is a Cloud TPU that may have other processes to join.

    On GKE the environment lists the hosts. Virtual machines ask Google's metadata server, which
    notebooks do not have.
    """
    if os.environ.get("TPU_SKIP_MDS_QUERY") or os.environ.get("COLAB_RELEASE_TAG"):
        return False
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES")
    if hosts is not None:
        return "," in hosts or int(os.environ.get("MEGASCALE_NUM_SLICES", "1")) > 1
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def barrier(name: str) -> None:
    """Waits until every process has reached this call.

    Raises:
        RunError: some did not reach it within WAIT_SECONDS; the message has them.
    """
    client = _client()
    if client is None:
        return
    place = _unused_key(name)
    client.key_value_set(f"{place}/{jax.process_index()}", "")
    if is_main_process():
        for number in range(jax.process_count()):
            _wait_for(client, f"{place}/{number}", name, lambda: _not_there(client, place))
        client.key_value_set(f"{place}/all", "")
    _wait_for(client, f"{place}/all", name, lambda: _not_there(client, place))


def _not_there(client: Any, place: str) -> list[int]:
    """Numbers of the processes that have not reached a barrier."""
    there = {key.rpartition("/")[2] for key, _ in client.key_value_dir_get(f"{place}/")}
    return [number for number in range(jax.process_count()) if str(number) not in there]


@contextlib.contextmanager
def main_process_first(name: str) -> Iterator[None]:
    """Runs the body on the main process first, then on the others, which find its results."""
    if not is_main_process():
        barrier(name)
    yield
    if is_main_process():
        barrier(name)


def broadcast_from_main(name: str, value: Callable[[], str]) -> str:
    """Returns, in every process, the value that the main process computes."""
    client = _client()
    if client is None:
        return value()
    key = _unused_key(name)
    if is_main_process():
        client.key_value_set(key, value())
    return _wait_for(client, key, name, lambda: [0])


def asking_main(name: str) -> Callable[[int, bytes, Answers], bytes]:
    """Returns a function by which all processes, batch by batch, get the main process's answers.

    It takes the number of a batch, this process's value and a function from the values of all
    processes to their answers, both in the order of the processes; only the main process calls
    that. It returns this process's answer. Every process asks once for each number, in any thread.
    """
    client, place, own = _client(), _unused_key(name), jax.process_index()

    def ask(number: int, value: bytes, answers: Answers) -> bytes:
        if client is None:
            return answers([value])[0]
        what, others = f"{name}, batch {number}", range(1, jax.process_count())
        if own:
            client.key_value_set(f"{place}/{number}/value/{own}", base64.b64encode(value).decode())
            return _take(client, f"{place}/{number}/answer/{own}", what, 0)
        values = [value, *(_take(client, f"{place}/{number}/value/{i}", what, i) for i in others)]
        made = answers(values)
        for i in others:
            client.key_value_set(f"{place}/{number}/answer/{i}", base64.b64encode(made[i]).decode())
        return made[0]

    return ask


def _take(client: Any, key: str, name: str, process: int) -> bytes:
    """Waits for a process's value of a key that only this process reads, and removes it."""
    value = _wait_for(client, key, name, lambda: [process])
    client.key_value_delete(key)
    return base64.b64decode(value)


def _wait_for(client: Any, key: str, name: str, missing: Callable[[], list[int]]) -> str:
    """Returns the value of a key, once it has one.

    Args:
        client: the coordinator's client.
        key: the key.
        name: what the processes meet for, as messages name it.
        missing: returns the processes that are waited for.

    Raises:
        RunError: it has none within the limit.
    """
    began, limit, say = time.monotonic(), _wait_limit(), SAY_SECONDS
    while True:
        try:
            end = began + min(say, limit)
            return client.blocking_key_value_get(key, max(1, round(1000 * (end - time.monotonic()))))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        others = ", ".join(map(str, missing())) or "0"
        if say >= limit:
            raise RunError(
                f"process {jax.process_index()} has waited {limit:g} seconds for process {others} ({name}), which is alive; "
                "see its log, and set JINA_JAX_WAIT_SECONDS to wait longer"
            )
        logger.warning("process %d has waited %.0f s for process %s (%s)", jax.process_index(), say, others, name)
        say *= 2


def _wait_limit() -> float:
    text = os.environ.get("JINA_JAX_WAIT_SECONDS") or str(WAIT_SECONDS)
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit <= 10**9:
        raise ValueError(f"JINA_JAX_WAIT_SECONDS must be a number of seconds above 0, not {text!r}")
    return limit


@contextlib.contextmanager
def abort_together() -> Iterator[None]:
    """Ends all processes if an error is raised inside, with its message.

    Without this the others would wait for the lost process.
    """
    client = _client()
    if client is None:
        yield
        return
    threading.Thread(target=_watch, args=(client,), daemon=True).start()
    try:
        yield
    except BaseException as error:
        # If another process failed first, this error is only its consequence here.
        if not _report_failed(client):
            message = f"process {jax.process_index()}: {error}"
            logger.error("error: %s", message)
            with contextlib.suppress(Exception):
                client.key_value_set(f"{_FAILED}{jax.process_index()}", message)
        _end()


def _watch(client: Any) -> None:
    while True:
        time.sleep(_LOOK_SECONDS)
        if _report_failed(client):
            _end()


def _report_failed(client: Any) -> bool:
    """True if any process has reported a failure; logs the reports."""
    try:
        failed = client.key_value_dir_get(_FAILED)
    except Exception:  # the coordinator is gone or ending: JAX reports that
        return False
    if failed:
        logger.error("error: another process failed; %s", "; ".join(message for _, message in failed))
    return bool(failed)


def _end() -> None:
    """Ends this process at once: the usual way waits for the others.

    The main process, which is the coordinator, ends last.
    """
    if is_main_process():
        time.sleep(3 * _LOOK_SECONDS)
    os._exit(1)


def _unused_key(name: str) -> str:
    """Returns a fresh key for a name: a key is used up when the processes have met under it.

    All processes use a name equally often, so a count makes the next key.
    """
    _uses[name] += 1
    return f"jina-jax/{name}/{_uses[name]}"


_uses: dict[str, int] = defaultdict(int)


def is_main_process() -> bool:
    """True in the main process, which does the writing that only one process should do."""
    return jax.process_index() == 0


def _client() -> Any:
    return distributed.global_state.client if jax.process_count() > 1 else None

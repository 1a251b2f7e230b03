"""A process of a job of two, which waits for the other or is waited for."""

import logging
import os
import time
from pathlib import Path

import jax

from jina_jax.errors import RunError
from jina_jax.parallel import processes


def meet(number: int, address: str, log: Path) -> None:
    """Waits at a barrier that process 1 reaches late, and then at one that it never reaches."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", filename=log, force=True)
    logging.getLogger("jax").setLevel(logging.CRITICAL)
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(number))
    processes.start()
    processes.SAY_SECONDS = 0.2
    with processes.main_process_first("datasets/a"):
        time.sleep(1.0 if number == 0 else 0)
    time.sleep(number)
    processes.barrier("the model is saved")
    os.environ["JINA_JAX_WAIT_SECONDS"] = "0.5"
    try:
        if number == 0:
            processes.barrier("never")
        elif number == 1:
            processes.broadcast_from_main("never told", str)
    except RunError as error:
        logging.error("error: %s", error)
    time.sleep(0.5)
    logging.shutdown()
    os._exit(0)

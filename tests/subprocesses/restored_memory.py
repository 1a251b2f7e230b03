"""Saves a state of 850 MB, or restores it, compares it bit for bit and measures the host's memory.

    python restored_memory.py save DIR FSDP
    python restored_memory.py restore DIR FSDP

Runs on JAX_NUM_CPU_DEVICES devices, or in several processes with as many devices each. A restore
prints the most memory that the process held beyond that of before, as a multiple of the arrays that
it holds afterwards.
"""

import contextlib
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from jina_jax.parallel import processes
from jina_jax.parallel.mesh import make_mesh, shard_params, shardings
from train.run.checkpoints import Saver, latest, restore

SHAPES = {
    "tokens.table": (31_232, 1024),
    "layers.qkv.kernel": (3, 1024, 3, 1024),
    "layers.out.kernel": (3, 1024, 1024),
    "layers.up.kernel": (3, 1024, 4096),
    "layers.down.kernel": (3, 4096, 1024),
}
"""Large arrays of the published model, with an eighth of the words and of the layers."""

COPIES = ("parameters", "mean", "variance")


def whole_state(seed: int) -> dict[str, dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    return {copy: {path: generator.random(shape, np.float32) for path, shape in SHAPES.items()} for copy in COPIES}


def held() -> int:
    """Bytes of anonymous memory of this process; files that it has mapped are not counted."""
    found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@contextlib.contextmanager
def most_held() -> Iterator[list[int]]:
    """Yields a list with the most bytes held inside, sampled every millisecond.

    The list is complete at the end.
    """
    most, done = [held()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], held())

    watching = threading.Thread(target=watch)
    watching.start()
    yield most
    done.set()
    watching.join()


def restored(directory: Path, fsdp: int) -> float:
    """Restores and compares; returns the memory that it took, divided by that of the arrays."""
    mesh = make_mesh(fsdp=fsdp)
    shapes = {copy: {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SHAPES.items()} for copy in COPIES}
    checkpoint = latest(directory)
    assert checkpoint is not None
    before = held()
    with most_held() as most:
        state = jax.block_until_ready(restore(checkpoint, shapes, shardings(shapes, mesh)))
    own, want = 0, whole_state(0)
    for name, arrays in state.items():
        for path, array in arrays.items():
            for shard in array.addressable_shards:
                assert np.array_equal(shard.data, want[name][path][shard.index]), (name, path, shard.index)
                own += shard.data.nbytes
    return (most[0] - before) / own


def main(action: str, directory: Path, fsdp: int) -> None:
    processes.start()
    if action == "restore":
        print(f"{restored(directory, fsdp):.3f}")
        return
    saver = Saver(directory, keep=1)
    saver.save(1, shard_params(whole_state(0), make_mesh(fsdp=fsdp)), {})
    saver.wait()
    saver.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))

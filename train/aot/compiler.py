"""The TPU compiler, ahead of time and on a machine without a TPU: will a program fit a slice, and what will it cost there?

topology = load_topology("v5e:4x4")
measurement = measure(jitted, arguments, topology)   # arguments: jax.ShapeDtypeStruct with shardings over topology.devices
"""

import atexit
import importlib.util
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ..step.chips import GIB
from .hlo_cost import Collective, cost
from .kernel_schedules import DUMP_FLAGS, kernel_cycles, lookup_cycles
from .topology import Topology, parse_topology, send_rate

INSTALL = "pip install 'jina-jax[train,tpu]'"


class NoCompiler(ValueError):
    """libtpu is not installed, or another process has it."""


class DoesNotFit(ValueError):
    """A program needs more memory than a device has; `needed` in bytes, as far as the compiler says."""

    def __init__(self, needed: int, topology: Topology):
        super().__init__(
            f"needs {needed / GIB:.2f} GiB of the {topology.chip.hbm / GIB:.2f} GiB of a device of {topology.name}"
        )
        self.needed = needed


class Slice(NamedTuple):
    """A topology, and its devices as the compiler knows them: nothing can run on them."""

    topology: Topology
    devices: Sequence[Any]


class Measurement(NamedTuple):
    """What one device needs for one run of a program. Bytes, seconds, cycles."""

    topology: str
    devices: int
    memory: dict[str, int]
    """`arguments`, `outputs`, `aliased` (outputs in the place of arguments), `temporaries`, `code`, and the `peak` of all."""
    hbm: int
    """What a device has."""
    peak: float
    """Operations per second that a device can do."""
    cycles: dict[str, int]
    """The compiler's estimate by kind of work; `kernels` are counted from their schedule."""
    kernels: dict[str, dict[str, int]]
    """Of each Pallas kernel its calls, and the cycles of one; 0 = it was in no schedule, and is missing in the estimate."""
    collectives: tuple[Collective, ...]
    compute_seconds: float
    """All cycles over the clock."""
    communication_seconds: float
    """Of the collectives, by the model of `transfer_seconds`, as if nothing went on meanwhile."""
    compile_seconds: float

    @property
    def seconds(self) -> float:
        """Of one run: computation and communication one after the other."""
        return self.compute_seconds + self.communication_seconds


def load_topology(name: str) -> Slice:
    """A slice of TPU chips by name, such as v5e:4x4; no chip has to be there.

    Raises:
        NoCompiler: libtpu is not installed; the message says how to install it.
        ValueError: there is no such slice.
    """
    topology = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompiler(f"the TPU compiler is not installed: {INSTALL}")
    _schedules()
    options: dict[str, Any] = dict(topology.chip.options)
    if any(size % 2 for size in topology.shape[:2]):
        options["chips_per_host_bounds"] = (1, 1, 1)  # in place of 2 x 2
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    except RuntimeError as error:  # jax.errors.JaxRuntimeError is one
        reason = str(error).splitlines()[0]
        if "lockfile" in reason or "in use" in reason:
            raise NoCompiler(f"the TPU compiler cannot be loaded: {reason}") from error
        raise ValueError(f"the compiler has no slice {name!r}: {reason}") from error
    return Slice(topology, devices)


@cache
def _schedules() -> Path:
    """Where the compiler writes the schedules of the kernels. It reads its settings once, when it is loaded."""
    directory = tempfile.mkdtemp(prefix="jina-jax-schedules-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={directory} {DUMP_FLAGS}".strip()
    # It needs no chip, asks no cloud for one, and several may be at work at the same time: the lock file is for chips.
    os.environ.update(LIBTPU_INIT_ARGS=flags, TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    jax.config.update("jax_platforms", "cpu")
    return Path(directory)


def measure(jitted: Any, arguments: tuple[Any, ...], topology: Topology, hlo: Path | None = None, **static: Any) -> Measurement:
    """Compiles a program for a slice, and reads what it costs.

    Args:
        jitted: a function under `jax.jit`.
        arguments: for it, `jax.ShapeDtypeStruct`s with shardings over the slice's devices in place of arrays.
        topology: of the slice.
        hlo: a file to write the compiled program's text to.
        static: further arguments by name.

    Raises:
        DoesNotFit: the compiler finds no way to run it in the memory of a device.
    """
    schedules = _schedules()
    for file in schedules.iterdir():  # of the program before
        file.unlink()
    lowered = jitted.lower(*arguments, **static)
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_needed(str(error)), topology) from error
    seconds = time.perf_counter() - began
    bundles = kernel_cycles(schedules)
    text = compiled.as_text()
    if hlo:
        hlo.write_text(text, "utf-8")
    found = cost(text)
    kernels = {name: {"calls": calls, "cycles": lookup_cycles(name, bundles)} for name, calls in found.kernels.items()}
    cycles = dict(found.cycles)
    if kernels:
        cycles["kernels"] = sum(kernel["calls"] * kernel["cycles"] for kernel in kernels.values())
    return Measurement(
        topology=topology.name,
        devices=topology.devices,
        memory=_memory(compiled.memory_analysis()),
        hbm=topology.chip.hbm,
        peak=topology.peak,
        cycles=cycles,
        kernels=kernels,
        collectives=found.collectives,
        compute_seconds=sum(cycles.values()) / topology.chip.clock,
        communication_seconds=sum(transfer_seconds(each, topology) for each in found.collectives),
        compile_seconds=seconds,
    )


def transfer_seconds(collective: Collective, topology: Topology) -> float:
    """Time for what a device sends, over all links it can use: of n devices, an all-reduce of B bytes sends 2 B (n - 1) / n in
    rings, an all-gather, reduce-scatter or all-to-all half of it, a permutation B. Latency is left out.

    It is a model, not an estimate of the compiler.
    """
    n = collective.group or topology.devices
    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(collective.kind, (n - 1) / n)
    return share * collective.bytes / send_rate(topology, n)


def _memory(stats: Any) -> dict[str, int]:
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }


def _needed(message: str) -> int:
    """Bytes, from such as "Used 20.02G of 15.75G hbm" or "memory required for HLO temporaries (480.00G) exceeds"."""
    match = re.search(r"(?:Used |\()([\d.]+)([KMGT])(?: of|\) exceeds)", message)
    return int(float(match[1]) * 1024 ** ("KMGT".index(match[2]) + 1)) if match else 0

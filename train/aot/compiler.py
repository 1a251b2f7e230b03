"""The TPU compiler, run ahead of time and on a machine without a TPU.

It says whether a program fits a slice, and what the program costs there:

    slice_ = load_topology("v5e:4x4")
    # arguments: jax.ShapeDtypeStruct with shardings over slice_.devices
    measurement = measure(jitted, arguments, slice_.topology)
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

from jina_jax.errors import JinaJaxError, how_to_install

from ..step.chips import GIB
from ..step.memory import DoesNotFit
from .hlo_cost import Collective, cost
from .kernel_schedules import DUMP_FLAGS, lookup_cycles, scheduled_cycles
from .topology import Topology, parse_topology, send_rate

INSTALL = how_to_install("train,tpu")


class NoCompiler(JinaJaxError):
    """libtpu is not installed, or another process has it."""


class Slice(NamedTuple):
    """A topology, and its devices as the compiler knows them: nothing can run on them."""

    topology: Topology
    devices: Sequence[Any]


class Measurement(NamedTuple):
    """Cost of one run of a program on one device, in bytes, seconds and cycles."""

    topology: str
    devices: int
    memory: dict[str, int]
    """Bytes by kind: `arguments`, `outputs`, `aliased` (outputs in the place of arguments),
    `temporaries`, `code`, and the `peak` of all."""
    hbm: int
    """Bytes of memory that a program may use on a device."""
    peak: float
    """Operations per second that a device can do."""
    cycles: dict[str, int]
    """Cycles by kind of work by the compiler's estimate; `kernels` are counted from schedules."""
    bundles: int
    """Cycles by the schedules of all instructions, or, where one has none, by its estimate."""
    kernels: dict[str, dict[str, int]]
    """Number of `calls` of each Pallas kernel, and the `cycles` of one; 0 = the kernel was in no
    schedule, and is missing from the estimate."""
    collectives: tuple[Collective, ...]
    compute_seconds: float
    """Seconds of computation: all cycles divided by the clock rate."""
    communication_seconds: float
    """Seconds of the collectives by the model of `transfer_seconds`, as if nothing overlapped."""
    compile_seconds: float

    @property
    def seconds(self) -> float:
        """Seconds of one run: computation and communication one after the other."""
        return self.compute_seconds + self.communication_seconds


def load_topology(name: str) -> Slice:
    """Loads a slice of TPU chips by name, such as v5e:4x4; no chip is needed.

    Raises:
        NoCompiler: libtpu is not installed (the message says how to install it), or another process
            has it.
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
    """Directory that the compiler writes the schedules of the kernels to.

    The compiler reads its settings once, when it is loaded.
    """
    directory = tempfile.mkdtemp(prefix="jina-jax-schedules-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={directory} {DUMP_FLAGS}".strip()
    # The compiler needs no chip, asks no cloud for one, and several may work at the same time: the
    # lock file is for chips.
    os.environ.update(LIBTPU_INIT_ARGS=flags, TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    jax.config.update("jax_platforms", "cpu")
    return Path(directory)


def measure(jitted: Any, arguments: tuple[Any, ...], topology: Topology, hlo: Path | None = None, **static: Any) -> Measurement:
    """Compiles a program for a slice, and reads what it costs.

    Args:
        jitted: a function under `jax.jit`.
        arguments: those of the function, with `jax.ShapeDtypeStruct`s with shardings over the
            slice's devices in place of arrays.
        topology: that of the slice.
        hlo: a file to write the compiled program's text to.
        static: further arguments by name.

    Raises:
        DoesNotFit: the compiler finds no way to run it in the memory of a device.
    """
    schedules = _schedules()
    for file in schedules.iterdir():  # those of the program before
        file.unlink()
    lowered = jitted.lower(*arguments, **static)
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed, there = _needed(str(error)) / GIB, topology.chip.hbm / GIB
        raise DoesNotFit(f"needs {needed:.2f} GiB of the {there:.2f} GiB of a device of {topology.name}") from error
    seconds = time.perf_counter() - began
    scheduled = scheduled_cycles(schedules)
    text = compiled.as_text()
    if hlo:
        hlo.write_text(text, "utf-8")
    found = cost(text)
    kernels = {name: {"calls": calls, "cycles": lookup_cycles(name, scheduled)} for name, calls in found.kernels.items()}
    cycles = dict(found.cycles)
    bundles = sum(times * scheduled.get(name, estimate) for name, (times, estimate) in found.estimates.items())
    if kernels:
        cycles["kernels"] = sum(kernel["calls"] * kernel["cycles"] for kernel in kernels.values())
        bundles += cycles["kernels"]
    return Measurement(
        topology=topology.name,
        devices=topology.devices,
        memory=_memory(compiled.memory_analysis()),
        hbm=topology.chip.hbm,
        peak=topology.peak,
        cycles=cycles,
        bundles=bundles,
        kernels=kernels,
        collectives=found.collectives,
        compute_seconds=sum(cycles.values()) / topology.chip.clock,
        communication_seconds=sum(transfer_seconds(each, topology) for each in found.collectives),
        compile_seconds=seconds,
    )


def transfer_seconds(collective: Collective, topology: Topology) -> float:
    """Seconds in which a device sends its data of a collective, over all links that it can use.

    Of n devices, an all-reduce of B bytes sends 2 B (n - 1) / n in rings, an all-gather,
    reduce-scatter or all-to-all half of it, a permutation B. Latency is left out. This is a model,
    not an estimate of the compiler.
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
    """Bytes that a program needs, read from an error message; 0 if it does not say.

    Messages are such as "Used 20.02G of 15.75G hbm" or "memory required for HLO temporaries
    (480.00G) exceeds".
    """
    match = re.search(r"(?:Used |\()([\d.]+)([KMGT])(?: of|\) exceeds)", message)
    return int(float(match[1]) * 1024 ** ("KMGT".index(match[2]) + 1)) if match else 0

"""The machine and the versions of packages that every result states."""

import importlib.metadata
import os
import platform
import resource
from collections.abc import Iterable
from pathlib import Path

INSTRUCTION_SETS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
"""Names of the sets that decide a CPU's speed at products, by /proc/cpuinfo's, the widest first."""

MASKS = ("XLA_FLAGS", "ONEDNN_MAX_CPU_ISA")
"""Variables by which XLA (`--xla_cpu_max_isa=...`) and PyTorch are kept from a CPU's widest set."""


def machine() -> str:
    """Returns the CPU, the cores of this process, the instruction set, and what masks it."""
    cpu = Path("/proc/cpuinfo").read_text("utf-8")
    models = [line.split(":")[1].strip() for line in cpu.splitlines() if "model name" in line]
    masks = [f"{name}={os.environ[name]}" for name in MASKS if name in os.environ]
    parts = [models[0] if models else platform.processor(), f"{len(os.sched_getaffinity(0))} cores", instruction_set(cpu)]
    return ", ".join([*parts, platform.system(), *masks])


def instruction_set(cpu: str) -> str:
    """Returns the name of the widest instruction set in a text like /proc/cpuinfo's."""
    flags = {flag for line in cpu.splitlines() if line.startswith("flags") for flag in line.split()}
    return next((name for flag, name in INSTRUCTION_SETS.items() if flag in flags), "no AVX2")


def resident_bytes(process: int) -> int:
    """Returns the memory that a process holds, by its id."""
    return int(Path(f"/proc/{process}/statm").read_text("utf-8").split()[1]) * resource.getpagesize()


def versions(packages: Iterable[str]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}

"""The machine and the versions of packages that every result states."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path


def machine() -> str:
    models = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{models[0] if models else platform.processor()}, {len(os.sched_getaffinity(0))} cores, {platform.system()}"


def versions(packages: Iterable[str]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}

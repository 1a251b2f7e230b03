"""Device that a program is for: platform, kind, bfloat16 support, and the compiler's options."""

import os
from functools import cache
from pathlib import Path

import jax

OPERATION_MEMORY = {"TPU v5 lite": 65_536, "TPU v5e": 65_536, "TPU v5": 49_152, "TPU v5p": 49_152}
"""KiB of on-chip memory that one operation may use, by kind of device, where the compiler's default
is too little for large matmuls (docs/scaling.md)."""

_OPTION = "xla_tpu_scoped_vmem_limit_kib"


def platform() -> str:
    """Platform that the program is being traced for: that of the current mesh, else the default.

    The mesh counts because a program for TPUs may be compiled ahead of time on a machine without
    one. The choice is made when tracing and not when lowering, because a choice at lowering keeps
    the residuals of every branch for the gradient.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def device_kind() -> str:
    """Kind of the device that the program is being traced for, such as "TPU v5 lite"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


def compiler_options(kind: str | None) -> dict[str, str]:
    """Returns the compiler's options for programs on a kind of device; {} for one that is not
    known.

    What the user has set in LIBTPU_INIT_ARGS stays as it is.
    """
    if kind not in OPERATION_MEMORY or _OPTION in os.environ.get("LIBTPU_INIT_ARGS", ""):
        return {}
    return {_OPTION: str(OPERATION_MEMORY[kind])}


@cache
def cpu_multiplies_bfloat16() -> bool:
    """True if this machine's CPU has instructions for bfloat16 products.

    Read from Linux's /proc/cpuinfo, since XLA does not report it.
    """
    file = Path("/proc/cpuinfo")
    return file.exists() and any(name in file.read_text() for name in ("amx_bf16", "avx512_bf16"))

"""Device that a program is being traced for: platform, kind and bfloat16 support."""

from functools import cache
from pathlib import Path

import jax


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


@cache
def cpu_multiplies_bfloat16() -> bool:
    """True if this machine's CPU has instructions for bfloat16 products.

    Read from Linux's /proc/cpuinfo, since XLA does not report it.
    """
    file = Path("/proc/cpuinfo")
    return file.exists() and any(name in file.read_text() for name in ("amx_bf16", "avx512_bf16"))

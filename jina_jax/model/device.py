"""The kind of device that a program is being traced for."""

from functools import cache
from pathlib import Path

import jax


def platform() -> str:
    """Kind of device the program is being traced for: that of the mesh around it, else the default.

    The mesh is what counts when a program for TPUs is compiled ahead of time on a machine without one. The choice is made here,
    and not when the program is lowered, because a choice at lowering keeps the residuals of every branch for the gradient.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def device_kind() -> str:
    """Name of that device's kind, such as "TPU v5 lite"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for products of bfloat16, as Linux tells. XLA does not say."""
    file = Path("/proc/cpuinfo")
    return file.exists() and any(name in file.read_text() for name in ("amx_bf16", "avx512_bf16"))

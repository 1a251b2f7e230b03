"""Accelerators: how much each computes, holds and sends.

Everything is of one device, as JAX counts them: a chip, but half a chip of TPU7x.
"""

from typing import Any, NamedTuple

GIB = 2**30


class Tpu(NamedTuple):
    """What the estimates of a slice of TPUs need to know beside the peak."""

    clock: float
    """Cycles per second."""
    hbm: int
    """Bytes that a program may use: the limit in the compiler's message for one that does not fit."""
    link: float
    """Bytes per second, one way, of a link to a neighbour."""
    axes: int
    """Of the torus. A chip has two links on each."""
    full_axis: int
    """An axis of a multiple of so many chips is a ring; a shorter one is a line."""
    devices: int = 1
    """Devices of a chip."""
    options: tuple[tuple[str, str], ...] = ()
    """For the compiler, beside the topology's name."""


class Chip(NamedTuple):
    """One generation of accelerators."""

    peak: float
    """Operations per second in bfloat16, from the maker's data sheet."""
    device_kinds: tuple[str, ...]
    """What JAX calls it."""
    tpu: Tpu | None = None


# Peaks, links and axes: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, where the bandwidth between chips is that of all
# links in both directions: v5e 400 GB/s = 4 links x 2 x 50, v6e 800 = 4 x 2 x 100, v5p and tpu7x 1,200 = 6 x 2 x 100, of tpu7x
# for two devices, v4 600 = 6 x 2 x 50. Memory: what libtpu 0.0.42 says of a program that needs more.
CHIPS = {
    "v4": Chip(
        275e12,
        ("TPU v4",),
        Tpu(1.05e9, int(30.75 * GIB), 50e9, axes=3, full_axis=4, options=(("chip_config_name", "megacore"),)),
    ),
    "v5e": Chip(197e12, ("TPU v5 lite", "TPU v5e"), Tpu(1.503e9, int(15.75 * GIB), 50e9, axes=2, full_axis=16)),
    "v5p": Chip(459e12, ("TPU v5", "TPU v5p"), Tpu(1.751e9, int(95.74 * GIB), 100e9, axes=3, full_axis=4)),
    "v6e": Chip(918e12, ("TPU v6 lite", "TPU v6e"), Tpu(1.751e9, int(31.25 * GIB), 100e9, axes=2, full_axis=16)),
    "tpu7x": Chip(1153e12, ("TPU7x",), Tpu(2.2e9, int(94.75 * GIB), 50e9, axes=3, full_axis=4, devices=2)),
    "a100": Chip(312e12, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB")),
    "h100": Chip(989e12, ("NVIDIA H100 80GB HBM3",)),
    "h200": Chip(989e12, ("NVIDIA H200",)),
}
"""By the name that topologies begin with; GPUs by their own."""


def peak_flops(device: Any, count: int) -> float | None:
    """Returns what `count` devices of a kind compute per second; None for kinds without an entry, such as CPUs."""
    peak = next((chip.peak for chip in CHIPS.values() if device.device_kind in chip.device_kinds), None)
    return None if peak is None else peak * count

"""Accelerators: compute, memory and link speed of each.

All values are per device, as JAX counts them: a chip, but half a chip for TPU7x.
"""

from typing import Any, NamedTuple

GIB = 2**30


class Tpu(NamedTuple):
    """Values of a TPU that the estimates of a slice need beside the peak."""

    clock: float
    """Cycles per second."""
    hbm: int
    """Bytes that a program may use: the limit in the compiler's message for a larger one."""
    link: float
    """Bytes per second, one way, over a link to a neighbour."""
    axes: int
    """Axes of the torus. A chip has two links on each."""
    full_axis: int
    """Chips of the shortest ring: an axis of a multiple of them is a ring, any other a line."""
    devices: int = 1
    """Devices of a chip."""
    options: tuple[tuple[str, str], ...] = ()
    """Options of a topology for the compiler, beside its name."""


class Chip(NamedTuple):
    """One generation of accelerators."""

    peak: float
    """Peak operations per second in bfloat16, from the maker's data sheet."""
    device_kinds: tuple[str, ...]
    """Names that JAX gives its devices."""
    tpu: Tpu | None = None


# Peaks, links and axes: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, where the bandwidth
# between chips is that of all links in both directions: v5e 400 GB/s = 4 links x 2 x 50,
# v6e 800 = 4 x 2 x 100, v5p and tpu7x 1,200 = 6 x 2 x 100 (of tpu7x for two devices),
# v4 600 = 6 x 2 x 50. Memory: the limit that libtpu 0.0.42 reports for a program that needs more.
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
"""Chips by the name that topologies begin with; GPUs by their own name."""


def peak_flops(device: Any, count: int) -> float | None:
    """Returns the peak FLOP/s of `count` devices; None for kinds without an entry, such as CPUs."""
    peak = next((chip.peak for chip in CHIPS.values() if device.device_kind in chip.device_kinds), None)
    return None if peak is None else peak * count

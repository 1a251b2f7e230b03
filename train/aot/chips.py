"""TPU chips: how much each computes, holds and sends; and the names of the slices they come in.

Everything is of one device, as JAX counts them: a chip, but half a chip of TPU7x.
"""

import re
from math import prod
from typing import NamedTuple


class Chip(NamedTuple):
    """One generation. The product of `flops_per_cycle` and `clock` is the peak of the makers' data sheets in bfloat16."""

    flops_per_cycle: int
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

    @property
    def peak(self) -> float:
        """Operations per second."""
        return self.flops_per_cycle * self.clock


GIB = 2**30

# Peaks, links and axes: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, where the bandwidth between chips is that of all
# links in both directions: v5e 400 GB/s = 4 links x 2 x 50, v6e 800 = 4 x 2 x 100, v5p and tpu7x 1,200 = 6 x 2 x 100, of tpu7x
# for two devices, v4 600 = 6 x 2 x 50. Memory: what libtpu 0.0.42 says of a program that needs more.
CHIPS = {
    "v4": Chip(262_144, 1.05e9, int(30.75 * GIB), 50e9, axes=3, full_axis=4, options=(("chip_config_name", "megacore"),)),
    "v5e": Chip(131_072, 1.503e9, int(15.75 * GIB), 50e9, axes=2, full_axis=16),
    "v5p": Chip(262_144, 1.751e9, int(95.74 * GIB), 100e9, axes=3, full_axis=4),
    "v6e": Chip(524_288, 1.751e9, int(31.25 * GIB), 100e9, axes=2, full_axis=16),
    "tpu7x": Chip(524_288, 2.2e9, int(94.75 * GIB), 50e9, axes=3, full_axis=4, devices=2),
}
"""By the name that topologies begin with."""


class Topology(NamedTuple):
    """A slice: chips of one kind in a box."""

    name: str
    """As the compiler takes it."""
    chip: Chip
    shape: tuple[int, ...]
    """Chips along each axis."""

    @property
    def devices(self) -> int:
        return prod(self.shape) * self.chip.devices


def parse_topology(name: str) -> Topology:
    """The slice that a name such as v5e:4x4 or v5p:4x4x4 means.

    Raises:
        ValueError: no such chip, or not as many axes as its slices have; the message lists what there is.
    """
    kind, _, sizes = name.partition(":")
    kind = "tpu7x" if kind == "7x" else kind
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or len(sizes.split("x")) != chip.axes:
        examples = ", ".join(f"{each}:{'x'.join(['4'] * CHIPS[each].axes)}" for each in CHIPS)
        raise ValueError(f"there is no topology {name!r}; valid are a chip and the chips along each axis, such as {examples}")
    return Topology(f"{kind}:{sizes}", chip, tuple(map(int, sizes.split("x"))))


def send_rate(topology: Topology, group: int) -> float:
    """Bytes per second that a device can send to the others of its group, over all links it can use at once.

    A group of all devices uses every axis. A smaller one is taken to be a row of chips along one axis, the longest. A chip on a
    ring sends both ways; on a line, where a ring has to go back over the same links, it sends one way's worth.

    Args:
        topology: the slice.
        group: devices that communicate with one another.
    """
    axes = [size for size in topology.shape if size > 1] or [1]
    used = axes if group >= topology.devices else [max(axes)]
    links = sum(2 if size % topology.chip.full_axis == 0 else 1 for size in used)
    return links * topology.chip.link

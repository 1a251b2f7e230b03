"""Slices of TPUs by name, and the rates at which their devices send to one another."""

import re
from math import prod
from typing import NamedTuple

from ..step.chips import CHIPS, Tpu


class Topology(NamedTuple):
    """A slice: chips of one kind in a box."""

    name: str
    """Name that the compiler takes."""
    peak: float
    """Operations per second of one device."""
    chip: Tpu
    shape: tuple[int, ...]
    """Chips along each axis."""

    @property
    def devices(self) -> int:
        return prod(self.shape) * self.chip.devices


def parse_topology(name: str) -> Topology:
    """The slice that a name such as v5e:4x4 or v5p:4x4x4 means.

    Raises:
        ValueError: there is no such chip, or its slices have another number of axes; the message
            gives valid names.
    """
    kind, _, sizes = name.partition(":")
    kind = "tpu7x" if kind == "7x" else kind
    chip = CHIPS[kind].tpu if kind in CHIPS else None
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or len(sizes.split("x")) != chip.axes:
        examples = ", ".join(f"{name}:{'x'.join(['4'] * chip.tpu.axes)}" for name, chip in CHIPS.items() if chip.tpu)
        raise ValueError(f"there is no topology {name!r}; valid are a chip and the chips along each axis, such as {examples}")
    return Topology(f"{kind}:{sizes}", CHIPS[kind].peak, chip, tuple(map(int, sizes.split("x"))))


def send_rate(topology: Topology, group: int) -> float:
    """Bytes per second that a device can send to its group, over all links that it can use at once.

    A group of all devices uses every axis. A smaller one is taken to be a row of chips along one
    axis, the longest. A chip on a ring sends both ways; on a line, where a ring has to go back over
    the same links, it sends one way's worth.

    Args:
        topology: the slice.
        group: devices that communicate with one another.
    """
    axes = [size for size in topology.shape if size > 1] or [1]
    used = axes if group >= topology.devices else [max(axes)]
    links = sum(2 if size % topology.chip.full_axis == 0 else 1 for size in used)
    return links * topology.chip.link

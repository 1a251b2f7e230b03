"""Cycles of instructions, counted from the bundles of the compiler's final schedule.

The TPU compiler makes no estimate for Pallas kernels; for all else the count stands beside its
estimate. One bundle is issued per cycle. The count is a lower bound where the matrix unit stalls or
memory is waited for, and an upper bound where code of the body is skipped at some steps of the
grid.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

DUMP_FLAGS = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
"""Flags of libtpu beside `--xla_jf_dump_to=DIRECTORY`.

They dump the final schedule of every instruction of a program, and nothing else.
"""

PIPELINE_STEPS = 2
"""Iterations of the loop over a kernel's or fusion's grid beyond the steps of the grid.

They fill and empty the pipeline of its copies.
"""

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)([A-Z\s]*):([\s>]*)\{")
_EXIT = re.compile(r"%(\w+) = scmp\.[gl][et]\.s32\.totalorder (?:\(!?%\w+\), )?%\w+, (\d+) +/\* loop exit test \*/")
_JUMP = re.compile(r"sbr\.rel \(!?%(\w+)\)")
_ENTRY = re.compile(r"/\* entry bundle: %([\w.\-]+) = ")


class Bundle(NamedTuple):
    depth: int
    """Number of loops around the bundle, as the schedule marks them."""
    begins: bool
    """True for the first bundle of a loop."""
    exit: int | None
    """Count that the loop's test compares with, where the bundle jumps back or leaves its loop."""


def scheduled_cycles(directory: Path) -> dict[str, int]:
    """Cycles of one run of each HLO instruction in a directory of schedules, by its name."""
    found = {}
    for file in sorted(directory.glob("*final_bundles.txt")):
        if "schedule-analysis" not in file.name and (entry := _ENTRY.search(text := file.read_text("utf-8", "replace"))):
            found[entry[1]] = count(bundles(text))
    return found


def lookup_cycles(instruction: str, known: Mapping[str, int]) -> int:
    """Cycles of a kernel's call; 0 if it has no schedule.

    The compiler does not schedule equal kernels twice: one without a schedule takes as long as the
    others of its name (`row_attention.9` and `row_attention.8`).
    """
    name = instruction.rpartition(".")[0]
    alike = [cycles for other, cycles in known.items() if name and other.rpartition(".")[0] == name]
    return known.get(instruction) or max(alike, default=0)


def bundles(schedule: str) -> list[Bundle]:
    """Bundles of a schedule, parsed from the compiler's text."""
    found: list[Bundle] = []
    tests: dict[str, int] = {}  # they may come long before the jump
    for line in schedule.splitlines():
        if match := _BUNDLE.match(line):
            tests |= {name: int(turns) for name, turns in _EXIT.findall(line)}
            jump = _JUMP.search(line)
            found.append(Bundle(match[2].count(">"), "LB" in match[1].split(), tests.get(jump[1]) if jump else None))
    return found


def count(schedule: Sequence[Bundle]) -> int:
    """Cycles of a schedule; each loop counts once for every iteration.

    A loop without a constant test counts once. A loop extends from its first bundle to the first
    one after its jump that is marked as outside, or that begins the next loop. Before the jump,
    some bundles are marked as outside as well.
    """
    cycles = [0]  # those outside loops, then those of each open loop
    turns: list[int | None] = []
    for bundle in [*schedule, Bundle(0, False, None)]:
        while turns and turns[-1] is not None and bundle.depth - bundle.begins < len(turns):
            outer = len(turns) == 1
            body = cycles.pop() * max((turns.pop() or 1) - (PIPELINE_STEPS if outer else 0), 1)
            cycles[-1] += body
        if bundle.begins:
            cycles.append(0)
            turns.append(None)
        cycles[-1] += 1
        if bundle.exit is not None and turns:
            turns[-1] = bundle.exit
    return sum(cycles) - 1  # without the bundle that was appended

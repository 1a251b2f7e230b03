"""Cycles of Pallas kernels, for which the TPU compiler makes no estimate: the instruction bundles of its final schedule.

A bundle is issued in a cycle. What is counted is a lower bound where the matrix unit stalls or memory is waited for, and an
upper one where a part of the body is skipped at some steps of the grid.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

DUMP_FLAGS = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
"""For libtpu, beside `--xla_jf_dump_to=DIRECTORY`: of every instruction of a program, the final schedule and nothing else."""

PIPELINE_STEPS = 2
"""Turns of the loop over a kernel's grid beyond the steps of the grid, which fill and empty the pipeline of its copies."""

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)([A-Z\s]*):([\s>]*)\{")
_EXIT = re.compile(r"%(\w+) = scmp\.[gl][et]\.s32\.totalorder (?:\(!?%\w+\), )?%\w+, (\d+) +/\* loop exit test \*/")
_JUMP = re.compile(r"sbr\.rel \(!?%(\w+)\)")
_ENTRY = re.compile(r"/\* entry bundle: %([\w.\-]+) = custom-call\(")


class Bundle(NamedTuple):
    depth: int
    """Loops around it, as the schedule marks them."""
    begins: bool
    """Whether it is the first of a loop."""
    exit: int | None
    """Where it jumps back or leaves its loop: the count that the loop's test compares with."""


def kernel_cycles(directory: Path) -> dict[str, int]:
    """Cycles of one call of each custom call in a directory of schedules, by the name of its HLO instruction."""
    found = {}
    for file in sorted(directory.glob("*final_bundles.txt")):
        if "schedule-analysis" not in file.name and (entry := _ENTRY.search(text := file.read_text("utf-8", "replace"))):
            found[entry[1]] = count(bundles(text))
    return found


def lookup_cycles(instruction: str, known: Mapping[str, int]) -> int:
    """Cycles of a kernel's call; 0 where there is no schedule of it.

    The compiler does not schedule equal kernels twice: one without a schedule takes as long as the others of its name
    (`row_attention.9` and `row_attention.8`).
    """
    name = instruction.rpartition(".")[0]
    alike = [cycles for other, cycles in known.items() if name and other.rpartition(".")[0] == name]
    return known.get(instruction) or max(alike, default=0)


def bundles(schedule: str) -> list[Bundle]:
    """The bundles of a schedule as the compiler writes it."""
    found: list[Bundle] = []
    tests: dict[str, int] = {}  # they may come long before the jump
    for line in schedule.splitlines():
        if match := _BUNDLE.match(line):
            tests |= {name: int(turns) for name, turns in _EXIT.findall(line)}
            jump = _JUMP.search(line)
            found.append(Bundle(match[2].count(">"), "LB" in match[1].split(), tests.get(jump[1]) if jump else None))
    return found


def count(schedule: Sequence[Bundle]) -> int:
    """Cycles of a schedule, each loop as often as it turns; one without a constant test, once.

    A loop goes from its first bundle to the first one behind its jump that is marked as outside, or begins the next loop.
    Before the jump, some are marked as outside as well.
    """
    cycles = [0]  # of each open loop, behind that of what is outside
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
    return sum(cycles) - 1  # the one that was put behind

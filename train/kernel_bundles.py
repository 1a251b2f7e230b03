"""Cycles of Pallas kernels, for which the TPU compiler makes no estimate: the instruction bundles of its final schedule.

A bundle is issued in a cycle. What is counted is a lower bound where the matrix unit stalls or memory is waited for, and an
upper one where a part of the body is skipped at some steps of the grid.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

DUMP_FLAGS = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
"""For libtpu, beside `--xla_jf_dump_to=DIRECTORY`: of every instruction of a program, the final schedule and nothing else."""

PIPELINE_STEPS = 2
"""Turns of the loop over a kernel's grid beyond the steps of the grid, which fill and empty the pipeline of its copies."""

_BUNDLE = re.compile(r"\s*0x[0-9a-f]+\s*[A-Z]*\s*:([\s>]*)\{")
_EXIT = re.compile(r"scmp\.[gl][et]\.s32\.totalorder %\w+, (\d+) +/\* loop exit test \*/")
_ENTRY = re.compile(r"/\* entry bundle: %([\w.\-]+) = custom-call\(")


class Bundle(NamedTuple):
    depth: int
    """Loops around it."""
    exit: int | None
    """Where it tests whether a loop ends: the count it compares with."""


def kernel_bundles(directory: Path) -> dict[str, int]:
    """Cycles of one call of each custom call in a directory of schedules, by the name of its HLO instruction."""
    found = {}
    for file in sorted(directory.glob("*final_bundles.txt")):
        if "schedule-analysis" not in file.name and (entry := _ENTRY.search(text := file.read_text("utf-8", "replace"))):
            found[entry[1]] = count(bundles(text))
    return found


def bundles(schedule: str) -> list[Bundle]:
    """The bundles of a schedule as the compiler writes it."""
    found = []
    for line in schedule.splitlines():
        if match := _BUNDLE.match(line):
            test = _EXIT.search(line)
            found.append(Bundle(match[1].count(">"), int(test[1]) if test else None))
    return found


def count(schedule: Sequence[Bundle], depth: int = 0) -> int:
    """Cycles of bundles at some depth of loops: each loop inside counts as often as it turns. Neighbouring loops of one depth
    are taken together, and turn as often as the last one."""
    cycles, inner = 0, []
    for bundle in [*schedule, Bundle(depth, None)]:
        if bundle.depth > depth:
            inner.append(bundle)
            continue
        if inner:
            exits = [each.exit for each in inner if each.depth == depth + 1 and each.exit is not None]
            turns = exits[-1] - (PIPELINE_STEPS if depth == 0 else 0) if exits else 1
            cycles += max(turns, 1) * count(inner, depth + 1)
            inner = []
        cycles += 1
    return cycles - 1  # the one that was put behind

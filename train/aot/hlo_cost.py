"""Cost of a compiled TPU program, read from its text (HLO): cycles, collectives and kernels.

The TPU compiler writes `estimated_cycles` on most instructions. Here each counts once for every
iteration of the loops around it. Plain collectives carry no estimate, and are listed with their
bytes instead; Pallas kernels carry none either, and are listed with their number of calls
(`kernel_schedules` gives the cycles of one).
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from math import prod
from typing import NamedTuple

from jina_jax.errors import JinaJaxError

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_COPIES = {"copy", "transpose", "reshape", "bitcast", "parameter", "slice", "concatenate", "pad", "constant", "tuple"}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")


class HloError(JinaJaxError):
    """Text that is no compiled program, or one with a loop whose trip count it does not give."""


class Instruction(NamedTuple):
    name: str
    result: str
    """Type as written: `f32[8,128]{1,0}`, or a tuple of such types."""
    operation: str
    text: str


class Collective(NamedTuple):
    """All collectives of one kind over groups of one size."""

    kind: str
    group: int
    """Devices that communicate with one another; 0 = all."""
    calls: int
    bytes: float
    """Bytes that one device contributes over all calls; for an all-gather, that it receives."""


class Cost(NamedTuple):
    """Cost of one run of the program on one device."""

    cycles: dict[str, int]
    """Estimated cycles by kind of work.

    `matmul` includes matmuls that the compiler fused with a collective.
    """
    collectives: tuple[Collective, ...]
    kernels: dict[str, int]
    """Calls of Pallas kernels, by the name of the instruction."""
    estimates: dict[str, tuple[int, int]]
    """Runs of each instruction with an estimate, and the cycles of one."""


Program = dict[str, list[Instruction]]
"""Instructions of each computation."""


def cost(text: str) -> Cost:
    """Cost of a compiled program.

    Args:
        text: the scheduled module, from `jax.stages.Compiled.as_text()`.

    Raises:
        HloError: the text is no compiled program, or does not give the trip count of a loop.
    """
    program, entry = parse(text)
    kinds = cache(lambda computation: _operations(program, computation))
    cycles: Counter[str] = Counter()
    counts: Counter[tuple[str, int]] = Counter()
    sizes: Counter[tuple[str, int]] = Counter()
    kernels: Counter[str] = Counter()
    runs: Counter[tuple[str, int]] = Counter()
    for computation, instruction, times in _executed(program, entry):
        if 'custom_call_target="tpu_custom_call"' in instruction.text:
            kernels[instruction.name] += times
        inside = kinds(called) if instruction.operation == "fusion" and (called := _called(instruction)) else frozenset()
        if match := _CYCLES.search(instruction.text):
            cycles[_kind(instruction, inside)] += times * int(match[1])
            runs[instruction.name, int(match[1])] += times
        for within, collective in _collectives(program, computation, instruction):
            # One fusion that sums, and keeps a shard of the sum.
            scattered = within.startswith("all-reduce-scatter")
            key = "reduce-scatter" if scattered else _plain(collective.operation), _group(collective)
            counts[key] += times
            sizes[key] += times * _payload(collective, program[within])
    found = tuple(Collective(*key, counts[key], sizes[key]) for key in sorted(counts))
    estimates = {name: (times, estimate) for (name, estimate), times in runs.items()}
    return Cost(dict(cycles.most_common()), found, dict(kernels), estimates)


def parse(text: str) -> tuple[Program, str]:
    """Instructions by computation, and the name of the computation that the program enters."""
    program: Program = {}
    current, entry = None, None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = program.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line == "}":
            current = None
        elif current is not None:
            if match := _INSTRUCTION.match(line):
                current.append(Instruction(*match.groups(), text=line))
            elif current:  # the body of a kernel spans several lines
                current[-1] = current[-1]._replace(text=f"{current[-1].text}\n{line}")
    if entry is None:
        raise HloError("this is no text of a compiled program: it has no ENTRY computation")
    return program, entry


def trips(program: Program, loop: Instruction) -> int:
    """Trip count of a `while`: the known one, else the constant that its condition tests."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known[1])
    condition = _named(loop, "condition")
    computations = [condition, *filter(None, map(_called, program[condition]))]
    texts = [instruction.text for computation in computations for instruction in program[computation]]
    constants = [int(match[1]) for text in texts if (match := re.search(r"s32\[\]\S* constant\((\d+)\)", text))]
    if len(set(constants)) != 1:
        raise HloError(f"loop {loop.name} has no count: its condition {condition} compares with {constants or 'no constant'}")
    return constants[0]


def array_bytes(result: str) -> int:
    """Bytes of an array or of all arrays of a tuple, by its type as written."""
    return sum(_bits(kind) * prod(map(int, filter(None, sizes.split(",")))) for kind, sizes in _ARRAY.findall(result)) // 8


def _executed(program: Program, computation: str, times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
    """Yields each instruction that runs outside fusions, its computation, and how often it runs."""
    for instruction in program[computation]:
        match instruction.operation:
            case "while":
                yield from _executed(program, _named(instruction, "body"), times * trips(program, instruction))
            case "conditional":  # one branch is taken; counting all is on the safe side
                for branches in _BRANCHES.findall(instruction.text):
                    for name in filter(None, re.split(r"[%,\s]+", " ".join(branches))):
                        yield from _executed(program, name, times)
            case "call" | "async-start":
                if called := _called(instruction):
                    yield from _executed(program, called, times)
            case _:
                yield computation, instruction, times


def _collectives(program: Program, computation: str, instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
    """Yields the collectives that an instruction starts, and the computation that each is in.

    A collective is the instruction itself, or is in its fusion. An asynchronous collective is in
    three fusions; the first of them starts it, and the others continue it.
    """
    if _plain(instruction.operation) in COLLECTIVES and not instruction.operation.endswith("-done"):
        yield computation, instruction
    elif instruction.operation == "fusion" and (called := _called(instruction)):
        inner = program[called]
        begins = any("AsyncCollectiveStart" in each.text for each in inner)
        if begins or not (called.startswith("async_collective_fusion") or _continues(inner)):
            for each in inner:
                yield from _collectives(program, called, each)


def _continues(computation: list[Instruction]) -> bool:
    return any("AsyncCollectiveDone" in each.text for each in computation)


def _operations(program: Program, computation: str) -> frozenset[str]:
    """All operations in a computation and what it calls."""
    own = {instruction.operation for instruction in program[computation]}
    called = (name for instruction in program[computation] if (name := _called(instruction)))
    return frozenset(own.union(*(_operations(program, name) for name in called)))


def _kind(instruction: Instruction, inside: frozenset[str]) -> str:
    """Kind of work that an instruction counts as; `inside` are the operations of a fusion."""
    operations = inside or {instruction.operation}
    if operations & {"convolution", "dot"}:
        return "matmul"
    if any(_plain(operation) in COLLECTIVES for operation in operations):
        return "communication"
    if operations & {"gather", "scatter"}:
        return "gather and scatter"
    if operations & {"dynamic-slice", "dynamic-update-slice"}:
        return "slices"
    if operations <= _COPIES:
        return "copies"
    return "elementwise"


def _payload(collective: Instruction, computation: list[Instruction]) -> int:
    """Bytes that one device contributes; for an all-gather, that it receives."""
    results = {instruction.name: instruction.result for instruction in computation}
    arguments = collective.text.partition(f" {collective.operation}(")[2].partition(")")[0]
    size = sum(array_bytes(results[name]) for name in re.findall(r"%([\w.\-]+)", arguments) if name in results)
    if _plain(collective.operation) != "all-gather":
        return size
    group = _group(collective)
    return size * group if group else array_bytes(collective.result)


def _group(collective: Instruction) -> int:
    match = _GROUPS.search(collective.text)
    if match is None:
        return 0
    return int(match[2]) if match[2] else len(match[1].split(","))


def _plain(operation: str) -> str:
    return operation.removesuffix("-start").removesuffix("-done")


def _called(instruction: Instruction) -> str | None:
    match = _CALLED.search(instruction.text)
    return match[1] if match else None


def _named(instruction: Instruction, role: str) -> str:
    match = re.search(rf"{role}=%?([\w.\-]+)", instruction.text)
    if match is None:
        raise HloError(f"{instruction.name} has no {role}")
    return match[1]


def _bits(kind: str) -> int:
    """Bits of one element: pred and s8 have 8, s4 has 4; tokens have none."""
    if kind == "pred":
        return 8
    match = re.match(r"[a-z]+?(\d+)", kind)
    return int(match[1]) if match else 0

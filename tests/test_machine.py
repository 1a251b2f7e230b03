"""Benchmarks name the instruction set that they ran on, and what kept a library from it."""

import pytest

from benchmarks.machine import instruction_set, machine


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("fpu sse2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile", "AMX"),
        ("fpu sse2 avx2 avx512f avx512_bf16", "AVX-512 BF16"),
        ("fpu sse2 avx2", "AVX2"),
        ("fpu sse2", "no AVX2"),
    ],
)
def test_the_widest_instruction_set_is_named(flags, name):
    assert instruction_set(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: avx2\n") == name


def test_a_mask_is_part_of_the_machine(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert machine().endswith("ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16")

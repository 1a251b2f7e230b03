"""The plots of benchmarks/plots.py, against the results that they are drawn from."""

import json

import pytest

pytest.importorskip("matplotlib")
from click.testing import CliRunner

from benchmarks.plots import CHIPS, PROGRAMS, RESULTS, cpu, cpu_bars, main, tpu_estimate


def test_the_bars_of_a_chip_add_up_to_its_programs_cycles():
    whole = {
        (each["topology"], each["program"]): each["mcycles"]
        for each in json.loads((RESULTS / "tpu_estimate.json").read_text())["results"]
    }
    panels = tpu_estimate(RESULTS).axes
    assert len(panels) == len(CHIPS)
    for panel, topology in zip(panels, CHIPS, strict=True):
        top = dict.fromkeys(range(len(PROGRAMS)), 0.0)
        for bar in panel.patches:
            top[round(bar.get_x() + bar.get_width() / 2)] += bar.get_height()
        assert list(top.values()) == pytest.approx([whole[topology, program] for program in PROGRAMS])


def test_speed_on_cpu_is_ours_over_the_peers():
    found = json.loads((RESULTS / "cpu_long_text.json").read_text())["results"]
    seconds = {each["system"]: each["seconds"] for each in found if each["dtype"] == "float32"}
    widths = {bar.label: drawn.get_width() for bar, drawn in zip(cpu_bars(RESULTS), cpu(RESULTS).axes[0].patches, strict=True)}
    want = seconds["sentence-transformers"] / seconds["jina-jax"]
    assert widths["a text of 8,192 tokens, float32"] == pytest.approx(want)


def test_two_runs_write_the_same_bytes_and_missing_results_are_an_error(tmp_path):
    for run in ("a", "b"):
        CliRunner().invoke(main, ["--out", str(tmp_path / run)], catch_exceptions=False)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["cpu.svg", "tpu_estimate.svg"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    done = CliRunner().invoke(main, ["--results", str(tmp_path), "--out", str(tmp_path / "c")])
    assert done.exit_code == 1 and "tpu_estimate.json" in done.output and not list((tmp_path / "c").iterdir())

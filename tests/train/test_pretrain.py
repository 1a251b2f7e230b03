"""The run through all stages from end to end, with a handful of packages and two steps a stage."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from jina_jax import Embedder
from train import pretrain

TWO_STEPS = """
from dataclasses import replace
from configs import pretrain as presets

MODEL = replace(presets.MODEL, hidden_size=32, num_layers=1, mlp_size=64, num_heads=2, matryoshka_dims=(8, 32))


def shrunk(config):
    few = {"steps": 2, "warmup_steps": 1, "batch_size": 4, "dim_weights": (), "num_row_counts": 1}
    stages = tuple(replace(stage, dims=(8, 32) if stage.dims else (), **few) for stage in config.stages)
    start = replace(config.start, model=MODEL) if config.start.model else config.start
    return replace(config, start=start, stages=stages)


def mlm():
    return shrunk(presets.mlm())


def pairs():
    return shrunk(presets.pairs())


def adapters():
    return shrunk(presets.adapters())
"""


@pytest.fixture
def two_steps(monkeypatch, tmp_path):
    """The presets with two steps of four records, and a model of one layer."""
    (tmp_path / "two_steps.py").write_text(TWO_STEPS)
    monkeypatch.setattr(pretrain, "PRESETS", tmp_path / "two_steps.py")


def test_the_run_leaves_a_model_and_a_report_and_goes_on_where_it_was(tmp_path, small_corpus, two_steps):
    workdir = tmp_path / "run"

    def run():
        done = CliRunner().invoke(pretrain.main, ["--workdir", str(workdir), "--corpus", str(small_corpus)])
        assert done.exit_code == 0, done.output
        return done.output

    output = run()
    for query in pretrain.SEARCHES:
        assert query in output
    model = Embedder.load(workdir / "model")
    assert model.config.tasks == ("retrieval.query", "retrieval.passage", "text-matching", "classification", "separation")
    assert model.config.rope_theta == 20_000
    assert dict(model.config.prompts) == {task: "" for task in model.config.tasks}
    base, tuned = Embedder.load(workdir / "pairs" / "model"), model
    assert base.config.rope_theta == 10_000
    np.testing.assert_array_equal(base.encoder.tokens.table[...], tuned.encoder.tokens.table[...])

    contents = json.loads((workdir / "metrics.json").read_text())
    systems = {(record["system"], record["task"]) for record in contents["records"]}
    assert {("bm25", "retrieval"), ("untrained", "similarity"), ("model", "clustering")} <= systems
    report = (workdir / "report.md").read_text()
    for image in ("losses.png", "test.png", "validation.png"):
        assert image in report and (workdir / image).read_bytes().startswith(b"\x89PNG")

    written = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    (workdir / "report.md").unlink()  # as if it had been interrupted before the report
    run()
    rewritten = {path.name for path, when in written.items() if path.stat().st_mtime_ns != when}
    assert rewritten == {"report.md", "metrics.json", "losses.png", "test.png", "validation.png"}

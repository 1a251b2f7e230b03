"""Whole runs: stages side by side and alone, over several devices, in bfloat16.

And the program's errors.
"""

import fcntl
import itertools
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
pytest.importorskip("click")
from click.testing import CliRunner

from helpers.training import (
    Runs,
    assert_identical,
    compiled_once,
    log_of,
    records,
    run_config,
    saved_arrays,
    stages,
    traced_steps,
    write_datasets,
)
from jina_jax import Embedder
from jina_jax.checkpoints.native import load_checkpoint, save_checkpoint
from jina_jax.errors import RunError
from jina_jax.model.adapters import base_arrays, extract_adapters
from jina_jax.model.lora import AdapterParam
from jina_jax.model.parameters import abstract_variables
from train.__main__ import main
from train.config import DatasetConfig, InitialModel, MeshConfig
from train.run import loop
from train.run.loop import next_stage, train
from train.run.metrics import TrainingDiverged, read_metrics
from train.run.profiling import StepRange

ROOT = Path(__file__).resolve().parents[3]
ADAPTER_STAGES = ("retrieval", "text_matching", "classification")
SMALL = {"vocab_size": 16_000, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "mlp_size": 64}


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def source(make_encoder, tokenizer, tmp_path_factory) -> Path:
    """A model of random parameters with a task that is trained on and two that are not."""
    directory = tmp_path_factory.mktemp("source") / "model"
    encoder = make_encoder(**SMALL, tasks=("note", "classification", "other"), pooler=True, mlm_head=True)
    save_checkpoint(directory, encoder, tokenizer)
    return directory


@pytest.fixture(scope="module")
def together(datasets, source, tmp_path_factory) -> Path:
    made = stages(datasets, steps=4)
    config = run_config(*(made[name] for name in ADAPTER_STAGES), start=InitialModel(source=str(source)))
    workdir = tmp_path_factory.mktemp("together") / "run"
    assert train(config, workdir, progress=False, profile=StepRange(5, 7)) == workdir / "model"
    return workdir


# ---- adapters, side by side ----


def test_a_trace_holds_the_steps_that_the_run_was_asked_for(together):
    assert traced_steps(together) == [5, 6, 7]


@pytest.mark.parametrize("name", ADAPTER_STAGES)
def test_a_stage_beside_others_is_a_stage_by_itself(datasets, source, together, tmp_path, name):
    stage = stages(datasets, steps=4)[name]
    train(run_config(stage, start=InitialModel(source=str(source))), tmp_path, progress=False)
    alone, joint = (load_checkpoint(workdir / "model") for workdir in (tmp_path, together))
    assert_identical(extract_adapters(joint, stage.adapters), extract_adapters(alone, stage.adapters))


def test_stages_come_out_the_same_in_any_order(datasets, source, together, tmp_path, monkeypatch):
    rng = random.Random(0)
    monkeypatch.setattr(
        loop,
        "next_stage",
        lambda config, done: rng.choice([i for i, stage in enumerate(config.stages) if done[i] < stage.steps]),
    )
    made = stages(datasets, steps=4)
    config = run_config(*(made[name] for name in ADAPTER_STAGES), start=InitialModel(source=str(source)))
    train(config, tmp_path, progress=False)
    got, want = (load_checkpoint(workdir / "model") for workdir in (tmp_path, together))
    assert_identical(extract_adapters(got), extract_adapters(want))


def test_adapters_are_all_that_an_adapter_stage_changes(source, together):
    before, after = load_checkpoint(source), load_checkpoint(together / "model")
    assert_identical(base_arrays(after), base_arrays(before))
    assert_identical(extract_adapters(after, ("note", "other")), extract_adapters(before, ("note", "other")))
    assert after.config.tasks[:3] == before.config.tasks and set(after.config.tasks[3:]) == {
        "retrieval.query",
        "retrieval.passage",
        "text-matching",
    }
    for task in ("classification", "retrieval.query", "retrieval.passage", "text-matching"):
        for path, array in extract_adapters(after, (task,)).items():
            if not path.endswith(".scale") and not path.startswith("pooler.") and task in before.config.tasks:
                assert not jnp.array_equal(array, extract_adapters(before, (task,))[path]), path
    model = Embedder.load(together / "model")
    assert np.isfinite(model.encode(["alpha beta"], task="text-matching")).all()


def test_the_state_of_an_adapter_stage_holds_nothing_of_the_base_or_of_other_adapters(source, together):
    config = replace(load_checkpoint(source).config, tasks=("one",), pooler=False)
    adapters = {path: v.shape for path, v in abstract_variables(config).items() if isinstance(v, AdapterParam)}
    arrays = saved_arrays(together)
    for number, tasks in enumerate((2, 1, 1)):
        own = [name for name in arrays if name.startswith(f"{number}/") and arrays[name].ndim]
        assert {name.rpartition("/")[2] for name in own} == adapters.keys()
        assert len(own) == 3 * len(adapters)  # parameters, and AdamW's two moments
        assert sum(arrays[name].size for name in own) == 3 * tasks * sum(map(np.prod, adapters.values()))


def test_the_stage_furthest_behind_is_next(datasets):
    made = stages(datasets)
    config = run_config(replace(made["retrieval"], steps=6), replace(made["classification"], steps=3))
    done, order = [0, 0], []
    for _ in range(9):
        order.append(next_stage(config, done))
        done[order[-1]] += 1
    assert order == [0, 1, 0, 0, 1, 0, 0, 1, 0] and done == [6, 3]


# ---- numbers ----

MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.mark.parametrize(
    ("names", "meshes"),
    [
        (("mlm",), [(2, 4)]),
        (("pairs",), [(8, 1), (1, 8)]),
        (("retrieval", "separation"), [(4, 2)]),
        *(pytest.param(names, MESHES, marks=pytest.mark.slow) for names in (("mlm",), ("pairs",), ("retrieval", "separation"))),
    ],
)
def test_eight_devices_are_one_device(datasets, tmp_path, tmp_path_factory, names, meshes):
    # A large epsilon: AdamW would otherwise make a whole step of a gradient that is nothing but
    # rounding.
    made = stages(datasets, steps=3, epsilon=1e-2, batch_size=16, encode_chunk_rows=2)
    config = run_config(*(made[name] for name in names), log_every=1)
    runs = Runs(tmp_path_factory.getbasetemp() / "compiled", config, devices=8)
    assert runs.finish(tmp_path / "one", mesh=MeshConfig(data=1)) == 0, log_of(tmp_path / "one")
    one, want = read_metrics(tmp_path / "one"), saved_arrays(tmp_path / "one")
    for data, fsdp in meshes:
        workdir = tmp_path / f"{data} x {fsdp}"
        assert runs.finish(workdir, mesh=MeshConfig(data=data, fsdp=fsdp)) == 0, log_of(workdir)
        for key in ("loss", "grad_norm"):
            np.testing.assert_allclose([line[key] for line in read_metrics(workdir)], [line[key] for line in one], rtol=1e-5)
        for name, array in saved_arrays(workdir).items():
            np.testing.assert_allclose(array, want[name], atol=1e-5, err_msg=f"{workdir.name} {name}")


def test_a_directory_takes_one_run_at_a_time(datasets, tmp_path):
    config = run_config(stages(datasets, steps=1)["pairs"])
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is training in .*; wait for it"):
            train(config, tmp_path, progress=False)
    assert train(config, tmp_path, progress=False) == tmp_path / "model"


def test_a_batch_that_does_not_divide_by_the_devices_is_an_error(datasets, tmp_path, tmp_path_factory):
    config = run_config(stages(datasets)["pairs"], mesh=MeshConfig(data=3))
    runs = Runs(tmp_path_factory.getbasetemp() / "compiled", config, devices=8)
    assert runs.finish(tmp_path) == 1
    assert "error: stage pairs: batch_size 8 is not divisible by 3 devices" in log_of(tmp_path)
    assert runs.finish(tmp_path, mesh=MeshConfig(data=9)) == 1
    assert "mesh 9 x 1 needs 9 devices; there are 8" in log_of(tmp_path)


@pytest.mark.parametrize("name", ["pairs", "classification"])
def test_bfloat16_has_float32_state_and_a_loss_close_by(datasets, tmp_path, name):
    stage = stages(datasets, steps=3)[name]
    for dtype in ("float32", "bfloat16"):
        train(run_config(stage, dtype=dtype, log_every=1), tmp_path / dtype, progress=False)
    full, half = (read_metrics(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    np.testing.assert_allclose([line["loss"] for line in half], [line["loss"] for line in full], rtol=0.03)
    assert [line["loss"] for line in half] != [line["loss"] for line in full]
    assert {array.dtype.name for array in saved_arrays(tmp_path / "bfloat16").values()} == {"float32", "int32"}
    model = load_checkpoint(tmp_path / "bfloat16" / "model")
    assert {array.dtype.name for array in base_arrays(model).values()} == {"float32"}


@pytest.mark.parametrize("before, said", [(True, "step 4 .stage pairs, its step 4.: loss nan"), (False, "step 6 made param")])
def test_a_run_that_diverges_stops_with_its_step_and_saves_nothing_of_it(datasets, tmp_path, monkeypatch, before, said):
    """NaN parameters from the fourth step on, or as what the sixth one leaves behind."""
    config = run_config(stages(datasets, steps=6)["pairs"], checkpoint_every=3)
    fitted_step, calls = loop.fitted_step, itertools.count(1)

    def poisoned(*arguments):
        step = fitted_step(*arguments)

        def nan(state):
            return state._replace(parameters=jax.tree.map(lambda x: x * jnp.nan, state.parameters))

        def call(state, frozen, batch):
            number = next(calls)
            new, metrics = step(nan(state) if before and number == 4 else state, frozen, batch)
            return (nan(new) if not before and number == 6 else new), metrics

        return call

    with monkeypatch.context() as patched:
        patched.setattr(loop, "fitted_step", poisoned)
        with pytest.raises(TrainingDiverged, match=said):
            train(config, tmp_path / "run", progress=False)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["00000003"]
    for workdir in ("run", "undisturbed"):
        train(config, tmp_path / workdir, progress=False)
    assert_identical(saved_arrays(tmp_path / "run"), saved_arrays(tmp_path / "undisturbed"))


def test_a_rate_far_too_high_is_noticed(datasets, tmp_path):
    config = run_config(stages(datasets, steps=6, learning_rate=1e30)["pairs"], checkpoint_every=3)
    with pytest.raises(TrainingDiverged, match="Nothing of it was saved"):
        train(config, tmp_path, progress=False)
    assert not list((tmp_path / "checkpoints").glob("*")) and not (tmp_path / "model").exists()


# ---- what a run is ----


def test_a_run_of_another_configuration_is_refused_with_the_differences(datasets, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records("pair")), "utf-8")
    dataset = DatasetConfig(str(file), "pair")
    stage = stages(datasets | {"pair": dataset}, steps=1)["pairs"]
    config = run_config(stage)
    train(config, tmp_path / "run", progress=False)

    def refused(**changes) -> str:
        with pytest.raises(RunError, match="another --workdir") as raised:
            train(replace(config, **changes), tmp_path / "run", progress=False)
        return str(raised.value)

    assert "differs in: config.seed: 0 -> 1." in refused(seed=1)
    assert 'config.dtype: "float32" -> "bfloat16"' in refused(dtype="bfloat16")
    assert "config.stages.0.learning_rate: 0.01 -> 0.5." in refused(stages=(replace(stage, learning_rate=0.5),))
    heavier = replace(stage, datasets=(replace(dataset, weight=2.0),))
    assert "config.stages.0.datasets.0.weight: 1.0 -> 2.0." in refused(stages=(heavier,))
    said = refused(start=replace(config.start, rope_theta=10_000.0))
    assert "config.start.rope_theta: null -> 10000.0; model.rope_theta: 20000.0 -> 10000.0." in said
    file.write_text("".join(json.dumps(record) + "\n" for record in records("pair", seed=1)), "utf-8")
    assert re.search(rf"differs in: the records of {re.escape(str(file))}.*: 40 records, .* -> 40 records, ", refused())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["configs/none.py"], "no such configuration: configs/none.py"),
        (["configs/pairs_short.py", "--set", "stages.0.stepz=3"], "there is no field 'stepz'"),
        (["configs/pairs_short.py", "--set", "stages.0.steps=many"], "stages.0.steps"),
        (["configs/pairs_short.py", "--set", "stages.0.steps"], "path=value"),
        (["configs/pairs_short.py", "--set", "start.source=/nowhere/model"], "/nowhere/model"),
        (["configs/pairs_short.py", "--workdir", "http://bucket/run"], "http://bucket/run is at no known store"),
    ],
)
def test_a_wrong_call_is_one_line(tmp_path, arguments, said):
    result = CliRunner().invoke(main, ["--workdir", str(tmp_path / "run"), *arguments])
    assert result.exit_code == 1
    assert said in result.output and result.output.count("\n") == 1 and result.output.startswith("Error: ")


def test_the_program_trains_what_a_file_describes(datasets, tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(
        "from pathlib import Path\nfrom helpers.training import run_config, stages, DatasetConfig\n"
        f"def get_config():\n    return run_config(stages({{kind: DatasetConfig(path, kind) for kind, path in "
        f"{ {kind: dataset.path for kind, dataset in datasets.items()}!r}.items()}})['pairs'])\n"
    )
    command = [sys.executable, "-m", "train", str(file), "--workdir", str(tmp_path / "run"), "--set", "stages.0.steps=2"]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    environment |= {name: os.environ[name] for name in ("PATH", "JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"model: {tmp_path / 'run' / 'model'}\n" and not ran.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [2]

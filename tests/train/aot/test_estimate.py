"""Programs compiled for TPUs ahead of time.

Their arguments, the table of chips, and what the user is told.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
from click.testing import CliRunner

from conftest import ROOT
from helpers.training import KINDS, MODEL, compiled_once, run_config, stages, write_datasets
from jina_jax import ModelConfig
from jina_jax.checkpoints.hf_config import from_hf
from jina_jax.errors import ConfigError
from jina_jax.parallel.mesh import from_process_local, make_mesh, shard_params
from train.aot import compiler as tpu_compiler
from train.aot import estimate
from train.aot.abstract_step import PUBLISHED_SIZES, abstract_splits, source_sizes, step_arguments
from train.aot.compiler import Measurement, Slice, transfer_seconds
from train.aot.estimate import Compiled, compile_config, mesh_for, report, to_json
from train.aot.hlo_cost import Collective
from train.aot.topology import parse_topology, send_rate
from train.compile import main
from train.config import DatasetConfig, MeshConfig, load_config
from train.data.stream import batch_stream, open_datasets
from train.run.initial_model import load_initial_model
from train.step.chips import CHIPS, GIB
from train.step.memory import DoesNotFit, Plan
from train.step.trainable_split import split_trainable
from train.step.update import initial_state, make_step

CONFIGS = ROOT / "configs"
PUBLIC_PEAKS = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12, "tpu7x": 2307e12}
STAGES = stages({kind: DatasetConfig("not read", kind) for kind in KINDS})

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


# ---- arguments


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("datasets"))


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec if hasattr(x, "sharding") else None), tree)


@pytest.mark.parametrize("name", ["mlm", "retrieval"])
def test_the_arguments_are_those_of_training(name, datasets, tmp_path):
    stage = stages(datasets, encode_chunk_rows=None, remat="full")[name]
    config, mesh = run_config(stage), make_mesh(devices=jax.devices()[:1])
    encoder, tokenizer = load_initial_model(config)
    model, trained, frozen = split_trainable(encoder, stage)
    source = open_datasets(stage, tmp_path)
    kind, batch = batch_stream(stage, source, encoder.config, tokenizer, seed=0)[0]
    want = initial_state(stage, trained, mesh), shard_params(frozen, mesh), from_process_local(batch, mesh)

    (abstract,) = abstract_splits(config, source_sizes(config, tmp_path))
    assert replace(abstract.config, prompts=()) == replace(model, prompts=())
    got = step_arguments(stage, kind, abstract, mesh)
    assert shapes(got[:2]) == shapes(want[:2])
    of_batches = [jax.tree.map(lambda x: (x.shape, x.dtype), batch) for batch in (got[2], want[2])]
    assert of_batches[0] == of_batches[1]
    make_step(stage, kind, abstract.config, "float32", mesh).lower(*got)


def test_sources_that_are_not_there_have_the_sizes_of_what_makes_them():
    sizes = source_sizes(load_config(CONFIGS / "pairs_long.py"), CONFIGS)
    assert replace(sizes, mlm_head=False) == ModelConfig(rope_theta=10_000.0, matryoshka_dims=sizes.matryoshka_dims)
    assert sizes.matryoshka_dims == (32, 64, 128, 256, 512, 768, 1024)
    assert source_sizes(load_config(CONFIGS / "add_adapter.py"), CONFIGS) == PUBLISHED_SIZES["jinaai/jina-embeddings-v3"]
    with pytest.raises(ValueError, match="runs/other/model is no directory here.*FacebookAI/xlm-roberta-large"):
        source_sizes(load_config(CONFIGS / "pairs_long.py", ["start.source=runs/other/model"]), CONFIGS)


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_sizes_by_name_are_those_of_the_published_config(name):
    """Apart from what the tensors and the tokenizer say when a model is loaded."""
    file = CONFIGS.parent / "tests" / "fixtures" / "published_settings" / f"{name.partition('/')[2]}.json"
    read = from_hf(json.loads(file.read_text("utf-8"))["config.json"])
    assert read.pad_id == (0 if name.endswith("e5-small") else 1)
    read = replace(read, pad_id=1, prompts=(), matryoshka_dims=(), pooler=PUBLISHED_SIZES[name].pooler)
    assert PUBLISHED_SIZES[name] == read


def test_adapters_above_e5_small_have_its_positions():
    config = load_config(CONFIGS / "retrieval.py", ["start.source=intfloat/multilingual-e5-small", "start.rope_theta=None"])
    (model,) = abstract_splits(config, source_sizes(config, CONFIGS))
    assert model.config.is_bert and model.config.max_tokens == 512
    assert model.frozen["positions.table"].shape == (512, 384) and model.frozen["token_types.table"].shape == (2, 384)
    rotary = load_config(CONFIGS / "retrieval.py", ["start.source=intfloat/multilingual-e5-small"])
    with pytest.raises(ConfigError, match="start.rope_theta: intfloat/multilingual-e5-small has absolute positions"):
        abstract_splits(rotary, source_sizes(rotary, CONFIGS))


def test_every_stage_of_the_adapters_has_a_model():
    config = load_config(CONFIGS / "adapters.py")
    models = abstract_splits(config, source_sizes(config, CONFIGS))
    assert [model.config.tasks for model in models] == [stage.adapters for stage in config.stages]
    for model in models:
        assert sum(x.size for x in model.trained.values()) < 1e7 < 5e8 < sum(x.size for x in model.frozen.values())


# ---- chips


@pytest.mark.parametrize("kind", PUBLIC_PEAKS)
def test_peaks_are_the_public_ones(kind):
    assert CHIPS[kind].peak * CHIPS[kind].tpu.devices == pytest.approx(PUBLIC_PEAKS[kind], rel=0.005)


def test_topologies_by_name():
    assert parse_topology("v5e:4x4").devices == 16 and parse_topology("7x:2x2x1") == parse_topology("tpu7x:2x2x1")
    assert parse_topology("7x:2x2x1").devices == 8
    for wrong in ("v9:2x2", "v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "v5e:0x4", "v5e:4x-4", "v5e:axb", ""):
        with pytest.raises(ValueError, match=r"no topology.*v5e:4x4.*v5p:4x4x4"):
            parse_topology(wrong)


def test_what_a_device_sends():
    pod, slice_ = parse_topology("v5e:16x16"), parse_topology("v5e:4x4")
    assert send_rate(pod, 256) * 256 == pytest.approx(51.2e12)  # "all-reduce bandwidth" of a pod in the data sheet
    assert send_rate(slice_, 16) == 100e9 and send_rate(pod, 16) == 100e9
    assert send_rate(parse_topology("v5p:4x4x4"), 64) == 600e9
    assert transfer_seconds(Collective("all-reduce", 256, 3, 2e9), pod) == pytest.approx(2 * 255 / 256 * 2e9 / 200e9)
    assert transfer_seconds(Collective("all-gather", 0, 1, 2e9), slice_) == pytest.approx(15 / 16 * 2e9 / 100e9)


# ---- what the user is told


class Device:
    platform = "cpu"


def a_slice(name: str = "v5e:4x4") -> Slice:
    return Slice(parse_topology(name), [Device()] * parse_topology(name).devices)


def measurement() -> Measurement:
    return Measurement(
        topology="v5e:4x4",
        devices=16,
        memory={"arguments": GIB, "peak": 2 * GIB},
        hbm=CHIPS["v5e"].tpu.hbm,
        peak=CHIPS["v5e"].peak,
        cycles={"matmul": 1_503_000_000, "kernels": 1_503_000_000},
        bundles=2_500_000_000,
        kernels={"ours.1": {"calls": 2, "cycles": 751_500_000}, "lost.1": {"calls": 2, "cycles": 0}},
        collectives=(Collective("all-reduce", 16, 6, 2.3e9),),
        compute_seconds=2.0,
        communication_seconds=0.5,
        compile_seconds=30.0,
    )


def test_shares_and_rates_are_of_the_whole_step():
    flops = 16 * CHIPS["v5e"].peak  # a second of all devices at their peak
    done = Compiled("pairs", 1000, flops, measurement=measurement())
    fields = to_json(done)
    assert fields["mfu"] == pytest.approx(0.4) and fields["mfu_without_communication"] == pytest.approx(0.5)
    assert fields["tokens_per_second"] == pytest.approx(400) and json.dumps(fields)
    text = report(done)
    for part in (
        "peak 2.00",
        "there are 15.75",
        "2.500 s",
        "40.0%",
        "all-reduce",
        "6 over 16 devices, 2.300 GB",
        "NOT COUNTED",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("mesh", "valid"),
    [
        (MeshConfig(fsdp=3), r"\[1, 2, 4, 8, 16\]"),
        (MeshConfig(data=2, fsdp=4), "16 devices"),
        (MeshConfig(data=32), "16 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_chips(mesh, valid):
    with pytest.raises(ValueError, match=f"does not fit.*{valid}"):
        mesh_for(mesh, a_slice())


def test_what_does_not_fit_is_told_with_what_would_help(monkeypatch):
    def fails(*_):
        raise DoesNotFit("needs 20.00 GiB of 15.75 GiB")

    monkeypatch.setattr(estimate, "measure", fails)
    monkeypatch.setattr(estimate, "mesh_for", lambda *_: make_mesh(devices=jax.devices()[:1]))
    config = replace(load_config(CONFIGS / "pairs_short.py"), start=run_config(STAGES["pairs"]).start)
    config = replace(config, stages=(replace(config.stages[0], logit_chunk=None, batch_size=64),))
    (done,) = compile_config(config, CONFIGS, a_slice())
    assert done.measurement is None and "needs 20.00 GiB" in done.failure and "15.75 GiB" in done.failure
    assert "encode_chunk_rows (now 32)" in done.failure and "logit_chunk" in done.failure and "\n" not in done.failure
    assert to_json(done)["fits"] is False


def test_a_stage_that_leaves_memory_open_is_compiled_as_training_would_run_it(monkeypatch):
    """All 64 rows, whole layers recomputed, half of the rows; a plan that is given is taken."""
    peaks = iter([15.5, 15.2, 14.0, 15.5])
    found = measurement()

    def measured(*_):
        return found._replace(memory=found.memory | {"peak": int(next(peaks) * GIB)})

    monkeypatch.setattr(estimate, "measure", measured)
    monkeypatch.setattr(estimate, "mesh_for", lambda *_: make_mesh(devices=jax.devices()[:1]))
    config = replace(load_config(CONFIGS / "pairs_short.py"), start=run_config(STAGES["pairs"]).start)

    def compiled(**fields):
        stage = replace(config.stages[0], batch_size=64, **fields)
        (done,) = compile_config(replace(config, stages=(stage,)), CONFIGS, a_slice())
        return done

    done = compiled(encode_chunk_rows="auto", remat="auto")
    assert done.plan == Plan(encode_chunk_rows=32, remat="except_attention") and done.measurement.memory["peak"] == 14 * GIB
    assert to_json(done)["encode_chunk_rows"] == 32 and "rows at once           32" in report(done)
    given = compiled(encode_chunk_rows=None, remat="full")
    assert given.plan == Plan(None, "full") and given.measurement.memory["peak"] == 15.5 * GIB


def test_sizes_in_the_compilers_message():
    used = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
    )
    temporaries = "the total memory required for HLO temporaries (480.00G) exceeds available HBM (15.75G)."
    assert tpu_compiler._needed(used) == 20.5 * GIB and tpu_compiler._needed(temporaries) == 480 * GIB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5e:4x4"], "the TPU compiler is not installed: pip install -e '.[train,tpu]'"),
        (["--topology", "v5e:4"], "no topology 'v5e:4'"),
        (["--topology", "v5e:4x4", "--set", "mesh.x=1"], "there is no field 'x'"),
        (["--topology", "v5e:4x4", "--json", "/no/such/directory/out.json"], "no directory /no/such/directory"),
    ],
)
def test_errors_are_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = CliRunner().invoke(main, [str(CONFIGS / "pairs_short.py"), *arguments])
    assert done.exit_code == 1 and message in done.output and len(done.output.splitlines()) == 1


# ---- with the compiler


def compiled(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
    config = tmp_path / "tiny.py"
    config.write_text(
        "from train.config import *\nfrom jina_jax.config import ModelConfig\n"
        "def get_config():\n"
        f"    return TrainConfig(start=InitialModel(model={MODEL!r}, tokenizer='data/tokenizer'), stages=(Stage(name='tiny', "
        "objective='pairs', datasets=(DatasetConfig('x', 'pair'),), steps=1, batch_size=64, max_length=64, row_length=128, "
        "learning_rate=1e-3),))\n"
    )
    command = [sys.executable, "-m", "train.compile", str(config), "--json", str(tmp_path / "out.json"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": ""})
    return done, json.loads((tmp_path / "out.json").read_text())["programs"][0]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("arguments", [["--set", "mesh.fsdp=4"], ["--inference"]])
def test_a_small_model_is_compiled_for_four_chips(arguments, tmp_path):
    done, found = compiled(tmp_path, "--topology", "v5e:2x2", "--hlo", str(tmp_path / "out.hlo"), *arguments)
    assert done.returncode == 0, done.stderr
    assert found["fits"] and found["devices"] == 4 and 0 < found["mfu"] < 1
    assert 0 < found["memory_bytes"]["peak"] < found["memory_bytes"]["usable"]
    assert "ENTRY" in (tmp_path / "out.hlo").read_text()


@pytest.mark.slow
@needs_compiler
def test_a_model_that_is_too_large_is_told_in_a_line(tmp_path):
    large = "start.model.mlp_size=4194304"
    done, found = compiled(tmp_path, "--topology", "v5e:2x2", "--set", large, "--set", "start.model.num_layers=64")
    assert done.returncode == 1 and not found["fits"] and "GiB" in found["reason"] and "fsdp" in found["reason"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_large_product_is_estimated_near_the_peak(name):
    topology, devices = tpu_compiler.load_topology(name)
    mesh = jax.sharding.Mesh(devices[:1], ("data",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where) for shape in ((8192, 4096), (4096, 4096))]
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(jnp.bfloat16))
    found = tpu_compiler.measure(product, tuple(arguments), topology)
    share = 2 * 8192 * 4096 * 4096 / (topology.peak / topology.chip.clock) / sum(found.cycles.values())
    assert 0.85 < share <= 1.0

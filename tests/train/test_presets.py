"""Every configuration of `configs/` runs two steps, with a small model and small data.

Everything else is unchanged.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
from helpers.training import compiled_once, saved_arrays, write_datasets
from jina_jax import Embedder
from jina_jax.checkpoints.native import save_checkpoint
from oracles.checkpoints import write_original, write_xlmr
from train.config import Stage, TrainConfig, load_config
from train.run.loop import train
from train.run.metrics import read_metrics

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("[!_]*.py") if path.stem not in ("quickstart", "pretrain"))
HIDDEN = 32
TORCH_SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def sources(make_encoder, tokenizer, tmp_path_factory) -> dict[str, str]:
    """Small models in place of the hub's, and of those that earlier runs have made."""
    directory = tmp_path_factory.mktemp("sources")
    write_xlmr(directory / "xlmr", **TORCH_SIZES)
    write_original(directory / "published", **TORCH_SIZES)
    sizes = {"vocab_size": 16_000, "hidden_size": HIDDEN, "num_layers": 1, "num_heads": 2, "mlp_size": 64}
    save_checkpoint(directory / "mlm", make_encoder(**sizes, mlm_head=True, rope_theta=10_000.0), tokenizer)
    save_checkpoint(directory / "pairs", make_encoder(**sizes, rope_theta=10_000.0), tokenizer)
    return {
        "FacebookAI/xlm-roberta-large": str(directory / "xlmr"),
        "jinaai/jina-embeddings-v3": str(directory / "published"),
        "runs/mlm_short/model": str(directory / "mlm"),
        "runs/mlm_long/model": str(directory / "mlm"),
        "runs/pairs_short/model": str(directory / "pairs"),
        "runs/pairs_long/model": str(directory / "pairs"),
    }


def shrunk(config: TrainConfig, sources: dict[str, str], datasets: dict) -> TrainConfig:
    def small(stage: Stage) -> Stage:
        return replace(
            stage,
            datasets=tuple(replace(dataset, path=datasets[dataset.kind].path) for dataset in stage.datasets),
            steps=2,
            warmup_steps=1,
            batch_size=8,
            max_length=24,
            row_length=24 * (stage.row_length // stage.max_length),
            num_row_counts=1,
            dims=tuple(dim for dim in stage.dims if dim <= HIDDEN),
            encode_chunk_rows=2 if stage.encode_chunk_rows else None,
            logit_chunk=stage.logit_chunk and 4,
        )

    assert config.start.source is not None
    start = replace(config.start, source=sources[config.start.source])
    if start.matryoshka_dims:
        start = replace(start, matryoshka_dims=tuple(dim for dim in start.matryoshka_dims if dim <= HIDDEN))
    return replace(config, start=start, stages=tuple(map(small, config.stages)), log_every=1)


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "adapters"])
def test_a_configuration_runs(preset, sources, datasets, tmp_path):
    config = shrunk(load_config(CONFIGS / f"{preset}.py"), sources, datasets)
    assert train(config, tmp_path / "run", progress=False) == tmp_path / "run" / "model"
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == config.steps and {line["stage"] for line in lines} == {stage.name for stage in config.stages}
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert all(np.isfinite(array).all() for array in saved_arrays(tmp_path / "run").values())
    model = Embedder.load(tmp_path / "run" / "model")
    theta = 10_000.0 if preset.startswith(("mlm", "pairs")) else 20_000.0
    assert model.config.position_type == "rope" and model.config.rope_theta == theta
    assert model.config.mlm_head == preset.startswith("mlm")
    for task in (None, *(task for stage in config.stages for task in stage.adapters)):
        assert np.isfinite(model.encode(["alpha beta"], task=task)).all()


def test_the_adapters_of_one_run_are_those_of_four():
    """`helpers/training.py` has stages side by side, which each preset alone has not."""
    together = load_config(CONFIGS / "adapters.py")
    alone = [load_config(CONFIGS / f"{name}.py") for name in ("retrieval", "text_matching", "classification", "separation")]
    assert together.stages == tuple(stage for config in alone for stage in config.stages)
    assert all(config.start == together.start for config in alone)


def test_there_is_a_configuration_for_every_stage_of_the_paper():
    stages = {
        "mlm_short",
        "mlm_long",
        "pairs_short",
        "pairs_long",
        "retrieval",
        "text_matching",
        "classification",
        "separation",
    }
    assert stages | {"adapters", "add_adapter"} <= {*PRESETS}

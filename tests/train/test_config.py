"""Configurations: the paper's numbers, overrides, and one clear error for everything wrong."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from jina_jax import ModelConfig
from jina_jax.errors import ConfigError
from train.config import ACCEPTED, DatasetConfig, InitialModel, Stage, TrainConfig, from_dict, load_config, to_dict
from train.data.records import KINDS
from train.old_names import FIELDS, with_new_names

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("[!_]*.py") if path.stem not in ("quickstart", "pretrain"))
DIMS = (32, 64, 128, 256, 512, 768, 1024)

PAPER = {  # table A1: steps, devices * batch of each, tokens, rate, temperature
    "mlm_short": (100_000, 8 * 128, 512, 1e-4, None),
    "mlm_long": (60_000, 8 * 8, 8192, 5e-5, None),
    "pairs_short": (60_000, 8 * 2048, 192, 3e-5, 0.05),
    "pairs_long": (50_000, 2 * 512, 1024, 2e-5, 0.02),
    "retrieval": (20_000, 128, 512, 5e-4, 0.05),
    "text_matching": (15_000, 256, 192, 1e-4, 0.05),
    "classification": (11_500, 256, 192, 5e-4, 0.02),
    "separation": (12_500, 512, 192, 5e-5, 0.02),
}


def load(name: str, *overrides: str) -> TrainConfig:
    return load_config(CONFIGS / f"{name}.py", overrides)


def wrong(*overrides: str, name: str = "retrieval") -> str:
    with pytest.raises(ConfigError) as error:
        load(name, *overrides)
    return str(error.value)


@pytest.mark.parametrize("name", PAPER)
def test_numbers_of_the_paper(name):
    (stage,) = load(name).stages
    steps, batch, length, rate, temperature = PAPER[name]
    assert (stage.steps, stage.batch_size, stage.max_length, stage.learning_rate) == (steps, batch, length, rate)
    if temperature is None:
        assert stage.objective == "mlm" and all(dataset.by_language for dataset in stage.datasets)
    else:
        assert stage.temperature == temperature and stage.dims == DIMS


def test_the_stages_follow_each_other():
    assert load("mlm_short").start.source == "FacebookAI/xlm-roberta-large"
    order = ["mlm_short", "mlm_long", "pairs_short", "pairs_long", "retrieval"]
    for before, after in zip(order, order[1:], strict=False):
        assert load(after).start.source == f"runs/{before}/model"
    assert load("mlm_short").start == InitialModel(
        source="FacebookAI/xlm-roberta-large", position_type="rope", rope_theta=10_000.0, max_position_embeddings=8194
    )
    assert {load(name).start.position_type for name in PRESETS if name != "mlm_short"} == {"keep"}
    tasks = {"retrieval": ("retrieval.query", "retrieval.passage"), "text_matching": ("text-matching",)}
    for name in ("retrieval", "text_matching", "classification", "separation"):
        start, (stage,) = load(name).start, load(name).stages
        assert (start.source, start.rope_theta, start.lora_rank) == ("runs/pairs_long/model", 20_000, 4)
        assert stage.adapters == tasks.get(name, (name,))
    assert load("retrieval").stages[0].num_negatives == load("classification").stages[0].num_negatives == 7
    assert load("adapters").stages == tuple(load(name).stages[0] for name in PAPER if name not in order or name == "retrieval")


@pytest.mark.parametrize(
    "name", [*PRESETS, "quickstart", "quickstart.py:retrieval", "pretrain.py:mlm", "pretrain.py:pairs", "pretrain.py:adapters"]
)
def test_every_preset_loads_and_survives_json(name):
    config = load_config(CONFIGS / (name if ":" in name else f"{name}.py"))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert config.steps == sum(stage.steps for stage in config.stages)
    for stage in config.stages:
        assert all(dataset.kind in ACCEPTED[stage.objective] for dataset in stage.datasets)


def test_record_kinds_of_objectives_exist():
    assert {kind for kinds in ACCEPTED.values() for kind in kinds} == set(KINDS)


def test_overrides():
    before = load("retrieval")
    changed = load(
        "retrieval",
        "stages.0.steps=7",
        "stages.0.warmup_steps=0",
        "stages.0.datasets.1.path=other/place",
        "stages.0.datasets.1.weight=2.5",
        "stages.0.betas.1=0.99",
        "stages.0.dims=(8, 16)",
        "stages.0.encode_chunk_rows=None",
        "stages.0.remat=full",
        "start.source=a=b",
        "mesh.data=4",
        "seed=5",
    )
    stage, (first, second, third) = before.stages[0], before.stages[0].datasets
    second = dataclasses.replace(second, path="other/place", weight=2.5)
    stage = dataclasses.replace(
        stage,
        steps=7,
        warmup_steps=0,
        betas=(0.9, 0.99),
        dims=(8, 16),
        encode_chunk_rows=None,
        remat="full",
        datasets=(first, second, third),
    )
    assert changed.stages == (stage,) and changed.start == dataclasses.replace(before.start, source="a=b")
    assert changed.mesh.data == 4 and changed.seed == 5
    assert load("retrieval") == before


def test_overrides_are_checked_together():
    wrong("stages.0.max_length=4096")
    assert load("retrieval", "stages.0.max_length=4096", "stages.0.row_length=4096").stages[0].max_length == 4096


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.stepz=7", "--set stages.0.stepz: there is no field 'stepz'; valid here are ['name', 'objective', "),
        ("stages.1.steps=7", "there is no field '1'; valid here are [0]"),
        ("stages.-1.steps=7", "there is no field '-1'; valid here are [0]"),
        ("stages.first.steps=7", "there is no field 'first'; valid here are [0]"),
        ("stages.0.steps.now=7", "there is no field 'now'; valid here are none"),
        ("=7", "there is no field ''; valid here are ['start', "),
        ("stages.0.steps", "--set takes path=value, not 'stages.0.steps'"),
        ("stages.0.steps=many", "stages.0.steps: Input should be a valid integer"),
        ("stages.0.steps=7.5", "stages.0.steps: "),
        ("stages.0.steps='7'", "stages.0.steps: Input should be a valid integer"),
        ("stages.0.steps=True", "stages.0.steps: "),
        ("stages.0.steps=0", "stages.0.steps: Input should be greater than or equal to 1"),
        ("stages.0.remat=True", "stages.0.remat: Input should be 'auto', 'none', 'except_products', "),
        (
            "stages.0.encode_chunk_rows=0",
            "greater than or equal to 1; stages.0.encode_chunk_rows: Input should be 'auto'",
        ),
        ("stages.0.learning_rate=0", "stages.0.learning_rate: Input should be greater than 0"),
        ("stages.0.learning_rate=1e999", "stages.0.learning_rate: "),
        ("stages.0.temperature=-1", "stages.0.temperature: "),
        ("stages.0.mask_rate=1.0", "stages.0.mask_rate: Input should be less than 1"),
        ("stages.0.betas=(0.9, 1.0)", "stages.0.betas.1: Input should be less than 1"),
        ("stages.0.betas=(0.9,)", "stages.0.betas"),
        ("stages.0.dims=(0,)", "stages.0.dims.0: "),
        ("stages.0.objective='mine'", "stages.0.objective: Input should be 'mlm', 'pairs', "),
        ("stages.0.datasets=()", "stages.0.datasets: "),
        ("stages.0.datasets.0.kind=pears", "stages.0.datasets.0.kind: Input should be 'text', 'pair'"),
        ("stages.0.datasets.0.kind=labelled_text", "retrieval does not learn from labelled_text records (datasets/msmarco/"),
        ("stages.0.datasets.0.weight=0", "stages.0.datasets.0.weight: "),
        ("stages.0.max_length=600", "stage retrieval: max_length 600 is above row_length 512"),
        ("stages.0.row_length=4", "stages.0.row_length: Input should be greater than or equal to 8"),
        ("stages.0.dim_weights=(1.0, 2.0)", "stage retrieval: dim_weights has 2 numbers for 7 dims"),
        ("stages.0.dim_weights=(1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0)", "stages.0.dim_weights.3: Input should be greater than 0"),
        ("stages.0.warmup_steps=20001", "stage retrieval: warmup_steps 20001 is above steps 20000"),
        ("stages.0.adapters=()", "stage retrieval: retrieval trains (1, 2) adapters, not []"),
        ("stages.0.adapters=('a', 'a')", "two stages train the same adapter: ['a', 'a']"),
        ("stages=()", "stages: "),
        ("start.source=None", "start: give either source, a checkpoint, or model"),
        ("start.rope_theta=inf", "start.rope_theta: "),
        ("start.position_type=learned", "start.position_type: Input should be 'keep' or 'rope'"),
        ("stages.0.prompts=('a', 'b', 'c')", "stages.0.prompts"),
        ("stages.0.prompts=('a',)", "stages.0.prompts"),
        ("stages.0.prompts=('a', 1)", "stages.0.prompts.1: Input should be a valid string"),
        ("stages.0.prompts=(None, 'b')", "stages.0.prompts.0: Input should be a valid string"),
        ("stages.0.prompts=query: ", "stages.0.prompts: "),
        ("dtype=float16", "dtype: Input should be 'float32' or 'bfloat16'"),
        ("mesh.fsdp=0", "mesh.fsdp: Input should be greater than or equal to 1"),
        ("read_threads=-1", "read_threads: "),
    ],
)
def test_wrong_overrides_name_the_field(override, message):
    assert message in wrong(override)


def test_every_wrong_field_is_listed():
    assert all(name in wrong("stages.0.steps=0", "stages.0.max_length=1", "seed=x") for name in ("steps", "max_length", "seed"))


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "classification",
            ["stages.0.num_negatives=0"],
            "stage classification: classification needs num_negatives of at least 1",
        ),
        ("mlm_short", ["stages.0.adapters=('a',)"], "stage mlm_short: mlm trains (0,) adapters, not ['a']"),
        ("mlm_short", ["stages.0.datasets.0.kind=pair"], "mlm does not learn from pair records"),
        ("mlm_short", ["stages.0.prompts.0=query: "], "stage mlm_short: mlm takes no prompts, not ('query: ', '')"),
        (
            "separation",
            ["stages.0.prompts=('query: ', 'passage: ')"],
            "stage separation: prompts are ('query: ', 'passage: '), and separation, one task, has one instruction",
        ),
        ("separation", ["stages.0.datasets.0.kind=triplet"], "it takes ['labelled_text', 'scored_pair', 'pair']"),
        ("adapters", ["stages.1.name=retrieval"], "stages need names of their own: ['retrieval', 'retrieval', "),
        ("adapters", ["stages.2.adapters=('separation',)"], "two stages train the same adapter"),
    ],
)
def test_contradictions_are_named(name, overrides, message):
    assert message in wrong(*overrides, name=name)


def test_texts_of_other_classes_in_the_batch_are_negatives_enough():
    config = load("classification", "stages.0.num_negatives=0", "stages.0.same_class=excluded")
    assert config.stages[0].num_negatives == 0


def stage(name: str, **fields) -> Stage:
    return Stage(
        **({"name": name, "objective": "pairs", "steps": 1, "batch_size": 1, "max_length": 8, "learning_rate": 1.0} | fields)
    )


def test_contradictions_in_python():
    pairs = (DatasetConfig("d", "pair"),)
    with pytest.raises(ValueError, match="a stage that trains the base model needs a run of its own"):
        TrainConfig(start=InitialModel(source="x"), stages=(stage("a", datasets=pairs), stage("b", datasets=pairs)))
    with pytest.raises(ValueError, match="give either source, a checkpoint, or model"):
        InitialModel(source="x", model=ModelConfig())
    with pytest.raises(ValueError, match="a model with random weights needs a tokenizer directory"):
        InitialModel(model=ModelConfig())
    with pytest.raises(ValueError, match="stepz"):
        stage("a", datasets=pairs, stepz=3)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.py", "", "c.py has no function get_config"),
        ("c.py", "get_config = 3", "c.py has no function get_config"),
        ("c.py", "def get_config():\n    return 3", "get_config() gives a int, not a TrainConfig"),
        ("c.py", "def get_config(:", "c.py: "),
        ("c.py", "import nowhere_to_be_found", "c.py: No module named 'nowhere_to_be_found'"),
        ("c.py", "from train.config import Start\ndef get_config():\n    return Start()", "c.py: "),
        ("c.py", "from train.config import Start\ndef get_config():\n    return Start(model=3, source=4)", "c.py: "),
        ("c.yaml", "steps: 3", "c.yaml is not a Python file"),
    ],
)
def test_files_that_are_no_configuration_are_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / name)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_missing_files_and_functions_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such configuration: .*none.py"):
        load_config(tmp_path / "none.py")
    with pytest.raises(ConfigError, match=r"pretrain\.py has no function pears"):
        load_config(f"{CONFIGS}/pretrain.py:pears")


def test_the_nearest_names_are_suggested():
    with pytest.raises(FileNotFoundError, match=r"did you mean 'pairs_short\.py'"):
        load("pair_short")
    with pytest.raises(ConfigError, match="has no function pear; did you mean 'pairs'"):
        load_config(f"{CONFIGS}/pretrain.py:pear")
    assert wrong("stages.0.stepz=7").endswith("; did you mean 'steps'?")
    assert "did you mean 'start'" in wrong("strat.source=x")


# ---- names of before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.length=100", "there is no field 'length'; .*; length is now called max_length"),
        ("stages.0.negatives=1", "negatives is now called num_negatives"),
        ("stages.0.row_shapes=1", "row_shapes is now called num_row_counts"),
        ("stages.0.chunk_rows=1", "chunk_rows is now called encode_chunk_rows"),
        ("stages.0.loss_chunk=1", "loss_chunk is now called logit_chunk"),
        ("keep=1", "keep is now called keep_checkpoints"),
        ("stages.0.same_class=masked", "same_class: Input should be 'suffix' or 'excluded'; 'masked' is now called 'excluded'"),
        ("stages.0.same_class=numbered", "'numbered' is now called 'suffix'"),
    ],
)
def test_an_override_with_an_old_name_is_told_the_new_one(override, message):
    with pytest.raises(ConfigError, match=message):
        load("retrieval", override)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max_length=", "length="),
        ("num_negatives=7", "negatives=7"),
        ("num_negatives=", "negatives="),
        ("import DatasetConfig, InitialModel,", "import Dataset, InitialModel,"),
        ("import DatasetConfig, InitialModel,", "import DatasetConfig, Start,"),
    ],
)
def test_a_configuration_with_an_old_name_is_told_the_new_one(old, new, tmp_path):
    text = (ROOT / "configs" / "retrieval.py").read_text()
    assert old in text
    (tmp_path / "mine.py").write_text(text.replace(old, new))
    wanted = [
        (before, after)
        for before, after in zip(re.findall(r"\w+", new), re.findall(r"\w+", old), strict=True)
        if before != after
    ]
    with pytest.raises(ConfigError, match=f"mine.py: .*; {wanted[0][0]} is now called {wanted[0][1]}"):
        load_config(tmp_path / "mine.py")


def test_the_configuration_of_a_saved_run_is_read_with_the_present_names():
    present = to_dict(load("classification"))
    stage = dict(present["stages"][0])
    old = {before: stage.pop(after) for before, after in FIELDS.items() if after in stage} | {"same_class": "numbered"}
    saved = json.loads(json.dumps(present | {"stages": [stage | old], "keep": present["keep_checkpoints"]}))
    del saved["keep_checkpoints"]
    assert from_dict(with_new_names(saved)) == load("classification")
    assert with_new_names(json.loads(json.dumps(present))) == json.loads(json.dumps(present))

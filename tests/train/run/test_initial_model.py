"""What runs start from: fresh models, checkpoints of every layout, and finished models.

Finished models get one more adapter.
"""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
from helpers.training import KINDS, MODEL, START, TOKENIZER, assert_identical, compiled_once, run_config, stages, write_datasets
from jina_jax import Embedder, ModelConfig
from jina_jax.checkpoints.native import save_checkpoint
from jina_jax.checkpoints.torch_reader import read_torch_checkpoint
from jina_jax.config import PUBLISHED_INSTRUCTIONS
from jina_jax.errors import ConfigError
from jina_jax.model.adapters import base_arrays, extract_adapter, extract_adapters
from jina_jax.model.parameters import from_arrays, variables
from oracles.checkpoints import write_original, write_xlmr
from train.config import DatasetConfig, InitialModel
from train.run.identity import fingerprint
from train.run.initial_model import load_initial_model, with_token_frequencies
from train.run.loop import train
from train.step.trainable_split import merge_trained, split_trainable

STAGES = stages({kind: DatasetConfig("not read", kind) for kind in KINDS})
TORCH_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
HEAD = {f"mlm_head.{name}" for name in ("dense.kernel", "dense.bias", "norm.scale", "norm.bias", "bias")}


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


def arrays(encoder) -> dict:
    return {path: variable.get_value() for path, variable in variables(encoder).items()}


def started(*names: str, **start):
    """The encoder that a run of some stages starts from."""
    made = START if not start else InitialModel(**start)
    return load_initial_model(run_config(*(STAGES[name] for name in names), start=made))[0]


@pytest.fixture(scope="module")
def xlmr(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("xlmr")
    write_xlmr(directory, **TORCH_SIZES)
    return directory


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """jina-embeddings-v3 in its original layout, small: five tasks, and weights in bfloat16."""
    directory = tmp_path_factory.mktemp("published")
    write_original(directory, **TORCH_SIZES)
    return directory


# ---- from random weights ----


def test_random_weights_depend_on_the_seed_alone():
    stage = STAGES["pairs"]
    first, again, other = (load_initial_model(run_config(stage, seed=seed))[0] for seed in (0, 0, 1))
    assert_identical(arrays(first), arrays(again))
    assert not jnp.array_equal(first.tokens.table[...], other.tokens.table[...])
    assert first.config == MODEL


def test_texts_longer_than_the_model_can_have_are_refused():
    long = replace(STAGES["pairs"], max_length=9000, row_length=9000)
    with pytest.raises(ValueError, match="stage pairs: max_length 9000 is above the model's 8194 tokens"):
        load_initial_model(run_config(long))


def test_an_adapter_is_the_same_whichever_others_are_made_beside_it():
    alone, beside = started("separation"), started("classification", "separation")
    assert beside.config.tasks == ("classification", "separation")
    assert_identical(extract_adapter(beside, "separation"), extract_adapter(alone, "separation"))
    assert not jnp.array_equal(
        extract_adapter(beside, "classification")["layers.qkv.a"], extract_adapter(beside, "separation")["layers.qkv.a"]
    )


def test_adapters_have_the_rank_scale_and_instructions_that_were_asked_for():
    start = {"model": MODEL, "tokenizer": TOKENIZER, "lora_rank": 3, "lora_alpha": 6.0}
    encoder = started("retrieval", "separation", **start, instructions=(("separation", "Group: "),))
    assert encoder.layers.up.a.shape == (1, 32, 3, 3) and set(np.asarray(encoder.layers.up.scale[...]).ravel()) == {2.0}
    assert dict(encoder.config.prompts) == {
        "retrieval.query": PUBLISHED_INSTRUCTIONS["retrieval.query"],
        "retrieval.passage": PUBLISHED_INSTRUCTIONS["retrieval.passage"],
        "separation": "Group: ",
    }


# ---- the bias of a fresh MLM head ----


def test_a_fresh_head_begins_with_the_tokens_frequencies():
    """An encoder whose states say nothing then has the entropy of the tokens as its loss.

    A uniform head has log(vocabulary).
    """
    rng = np.random.default_rng(0)
    frequencies = rng.dirichlet(np.full(20, 0.5))
    tokens = rng.choice(20, size=(50, 4, 100), p=frequencies) + 7
    masked = np.where(rng.random(tokens.shape) < 0.3, tokens, -1)
    bias = np.asarray(variables(with_token_frequencies(started("mlm"), iter(masked)))["mlm_head.bias"].get_value(), np.float64)
    counted = np.bincount(masked[masked >= 0], minlength=MODEL.vocab_size)
    np.testing.assert_allclose(np.exp(bias).sum(), 1, rtol=1e-4)
    seen = counted > 0
    np.testing.assert_allclose(np.exp(bias[seen]), (counted[seen] + 0.1) / (counted.sum() + 1600), rtol=1e-4)
    assert bias[~seen].max() < bias[seen].min()


def test_a_trained_head_keeps_its_bias():
    encoder = with_token_frequencies(started("mlm"), [np.array([[7, 8, -1]])])
    assert with_token_frequencies(encoder, [np.array([[9, 9, 9]])]) is encoder


# ---- from checkpoints ----


def test_a_native_checkpoint_comes_back_bit_for_bit(make_encoder, tokenizer, tmp_path):
    encoder = make_encoder(vocab_size=16_000, hidden_size=32, tasks=("classification", "note"), pooler=True)
    save_checkpoint(tmp_path / "model", encoder, tokenizer)
    source = str(tmp_path / "model")
    continued = started("classification", source=source)
    assert continued.config == encoder.config
    assert_identical(arrays(continued), arrays(encoder))
    base = started("pairs", source=source)
    assert base.config.tasks == ()  # adapters would belong to another base
    assert_identical(arrays(base), base_arrays(encoder))


@pytest.mark.parametrize("name", ["mlm", "pairs", "classification"])
def test_positions_stay(name, xlmr, published):
    read = read_torch_checkpoint(xlmr, dtype=jnp.float32, param_dtype=jnp.float32)
    encoder = started(name, source=str(xlmr))
    assert encoder.config.position_type == "absolute" and encoder.config.max_tokens == 512
    assert_identical({"table": arrays(encoder)["positions.table"]}, {"table": arrays(read)["positions.table"]})
    assert started(name, source=str(published), rope_theta=123.0).config.rope_theta == 123.0
    assert started(name, source=str(published), position_type="rope").config == started(name, source=str(published)).config


@pytest.mark.parametrize("name", ["mlm", "pairs"])
def test_xlm_roberta_becomes_a_rotary_model_where_that_is_asked_for(name, xlmr):
    before = read_torch_checkpoint(xlmr, dtype=jnp.float32, param_dtype=jnp.float32)
    assert before.config.position_type == "absolute" and before.positions is not None
    rope = {"source": str(xlmr), "position_type": "rope"}
    encoder = started(name, **rope, rope_theta=10_000.0, max_position_embeddings=600)
    sizes = {"vocab_size": 16_000, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "mlp_size": 64}
    rotary = ModelConfig(**sizes, rope_theta=10_000.0, max_position_embeddings=600, mlm_head=name == "mlm")
    assert encoder.config == rotary
    kept = {path: x for path, x in arrays(before).items() if path != "positions.table" and (path not in HEAD or name == "mlm")}
    assert_identical(arrays(encoder), kept)
    rows = jnp.arange(24).reshape(2, 12) % 7 + 5, jnp.ones((2, 12), jnp.int32), jnp.tile(jnp.arange(12), (2, 1))
    states = [np.asarray(model(*rows)) for model in (encoder, from_arrays(rotary, kept, dtype=jnp.float32), before)]
    np.testing.assert_array_equal(states[0], states[1])
    assert np.abs(states[0] - states[2]).max() > 0.1
    plain = started(name, **rope).config
    assert (plain.rope_theta, plain.max_position_embeddings, plain.max_tokens) == (20_000.0, 8194, 8194)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_theta": 10_000.0}, "start.rope_theta"),
        ({"max_position_embeddings": 514}, "start.max_position_embeddings"),
        ({"rope_theta": 1.0, "max_position_embeddings": 8194}, "start.rope_theta and start.max_position_embeddings"),
    ],
)
def test_fields_of_rotary_positions_are_refused_where_absolute_ones_stay(xlmr, fields, named):
    message = f'{named}: {xlmr} has absolute positions, .* or set start.position_type="rope"'
    with pytest.raises(ConfigError, match=message):
        started("pairs", source=str(xlmr), **fields)


def test_a_length_above_absolute_positions_is_refused_and_told_of_rotary_ones(xlmr):
    fields = {"max_length": 513, "row_length": 1024}
    start = InitialModel(source=str(xlmr))
    message = "max_length 513 is above the model's 512 tokens"
    with pytest.raises(ConfigError, match=f'{message}; .* start.position_type="rope" makes them rotary'):
        load_initial_model(run_config(replace(STAGES["mlm"], **fields), start=start))
    with pytest.raises(ConfigError, match=f"{message}$"):  # under adapters the base would be broken
        load_initial_model(run_config(replace(STAGES["retrieval"], **fields), start=start))


def test_a_fresh_model_has_the_positions_of_its_sizes():
    absolute = replace(MODEL, position_type="absolute", max_position_embeddings=34)
    assert started("mlm", model=absolute, tokenizer=TOKENIZER).config.position_type == "absolute"
    assert started("mlm", model=absolute, tokenizer=TOKENIZER, position_type="rope").config.max_tokens == 8194


def test_mlm_training_adds_a_head_and_pairs_drop_it(xlmr, tmp_path):
    write_xlmr(tmp_path, mlm_head=False, **TORCH_SIZES)
    headless = read_torch_checkpoint(tmp_path, dtype=jnp.float32, param_dtype=jnp.float32)
    with_head, without = started("mlm", source=str(tmp_path)), started("pairs", source=str(xlmr))
    assert arrays(with_head).keys() - arrays(headless).keys() == HEAD
    assert not HEAD & arrays(without).keys() and not without.config.mlm_head
    assert with_head.mlm_head.dense.kernel[...].std() > 0
    assert_identical({path: arrays(with_head)[path] for path in arrays(headless)}, arrays(headless))


def test_the_published_model_starts_with_all_it_has(published):
    read = read_torch_checkpoint(published, dtype=jnp.float32, param_dtype=jnp.float32)
    encoder = started("retrieval", "classification", source=str(published))
    assert encoder.config.tasks == read.config.tasks and len(read.config.tasks) == 5
    assert_identical(arrays(encoder), arrays(read))
    assert {x.dtype.name for x in arrays(encoder).values()} == {"float32"}


@pytest.mark.parametrize("rank", [None, 6])
def test_a_new_adapter_on_a_finished_model_leaves_the_rest_as_it_is(published, tmp_path, rank):
    stage = replace(stages(write_datasets(tmp_path), steps=2)["classification"], adapters=("tickets",))
    start = InitialModel(source=str(published), instructions=(("tickets", "Sort: "),), lora_rank=rank)
    train(run_config(stage, start=start), tmp_path / "run", progress=False)
    before, after = Embedder.load(published), Embedder.load(tmp_path / "run" / "model")
    assert after.config.tasks == (*before.config.tasks, "tickets") and after.config.prompt("tickets") == "Sort: "
    assert_identical(base_arrays(after.encoder), base_arrays(before.encoder))
    if rank is None:
        assert_identical(
            extract_adapters(after.encoder, before.config.tasks), extract_adapters(before.encoder, before.config.tasks)
        )
    texts = ["alpha beta gamma", "delta"]
    for task in (None, "separation", "retrieval.query"):
        np.testing.assert_allclose(after.encode(texts, task=task), before.encode(texts, task=task), atol=1e-6)
    assert np.abs(after.encode(texts, task="tickets") - after.encode(texts, prompt="Sort: ")).max() > 1e-4


# ---- trainable split ----


@pytest.mark.parametrize("name", ["retrieval", "classification", "pairs"])
def test_a_model_is_its_parts(published, name):
    encoder = started(name, source=str(published))
    stage = STAGES[name]
    config, trained, frozen = split_trainable(encoder, stage)
    assert config.tasks == stage.adapters and not trained.keys() & frozen.keys()
    assert not any(path.startswith("pooler.") for path in trained)
    assert_identical(arrays(merge_trained(encoder, stage, trained)), arrays(encoder))
    changed = arrays(merge_trained(encoder, stage, {path: x + 1 for path, x in trained.items()}))
    moved = {path for path, x in arrays(encoder).items() if not jnp.array_equal(x, changed[path])}
    assert moved == trained.keys()


def test_a_fingerprint_sees_every_bit_and_every_name():
    one = {"a": jnp.zeros(3), "b": jnp.ones(2)}
    assert fingerprint(one) == fingerprint(dict(reversed(one.items())))
    others = [{"a": jnp.zeros(3), "c": jnp.ones(2)}, one | {"a": jnp.array([0, -0.0, 0])}, {"a": jnp.zeros(3)}]
    assert len({fingerprint(x) for x in (one, *others)}) == 4


@pytest.mark.parametrize("source, error", [("/nowhere/model", FileNotFoundError), (TOKENIZER, ValueError)])
def test_a_source_that_is_no_model_is_an_error(source, error):
    with pytest.raises(error, match=source):
        started("pairs", source=source)

"""The configuration, its errors, and its translation from and to `config.json`."""

import json

import pytest

from jina_jax.checkpoints.hf_config import from_hf, to_hf
from jina_jax.config import ModelConfig
from jina_jax.errors import ConfigError

SIZES = dict(vocab_size=99, hidden_size=32, num_layers=2, num_heads=4, mlp_size=64, max_position_embeddings=50)
PUBLISHED = {
    "vocab_size": 250002, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "max_position_embeddings": 8194, "type_vocab_size": 1, "layer_norm_eps": 1e-05, "pad_token_id": 1, "hidden_act": "gelu",
    "position_embedding_type": "rotary", "rotary_emb_base": 20000.0, "lora_rank": 4, "lora_alpha": 1, "truncate_dim": None,
    "lora_adaptations": ["retrieval.query", "separation"], "task_instructions": {"retrieval.query": "Q: ", "separation": ""},
    "matryoshka_dimensions": [32, 64, 1024],
}  # fmt: skip


def test_the_defaults_are_the_published_model():
    config = from_hf(PUBLISHED)
    assert config == ModelConfig(
        tasks=("retrieval.query", "separation"),
        prompts=(("retrieval.query", "Q: "), ("separation", "")),
        matryoshka_dims=(32, 64, 1024),
    )
    assert config.max_tokens == 8194 and config.head_dim == 64


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({"rope_parameters": {"rope_theta": 3.0, "rope_type": "default"}, "rope_theta": 4.0, "rotary_emb_base": 5.0}, 3.0),
        ({"rope_theta": 4.0, "rotary_emb_base": 5.0}, 4.0),
        ({"rotary_emb_base": 5.0}, 5.0),
        ({"rotary_emb_base": None}, 10_000.0),
        ({"rotary_emb_base": None, "model_type": "jina_embeddings_v3"}, 20_000.0),
    ],
    ids=str,
)
def test_where_the_rotary_base_is_read_from(fields, theta):
    assert from_hf(PUBLISHED | fields).rope_theta == theta


def test_absolute_positions_hold_fewer_tokens():
    hf = PUBLISHED | {"position_embedding_type": "absolute", "model_type": "xlm-roberta", "max_position_embeddings": 514}
    assert from_hf(hf).max_tokens == 512


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_to_hf_is_read_back_the_same(layout):
    config = ModelConfig(**SIZES, rope_theta=123.0, matryoshka_dims=(8, 32), truncate_dim=8, pad_id=3)
    assert from_hf(json.loads(json.dumps(to_hf(config, layout, "float32")))) == config


def test_to_dict_is_read_back_the_same():
    config = ModelConfig(**SIZES, tasks=("a", "b"), prompts=(("a", "A: "),), matryoshka_dims=(8,), default_prompt="a")
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(ModelConfig.from_dict(config.to_dict()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, "hidden_size 32 is not divisible by num_heads 5"),
        ({"num_heads": 32}, "even head dimension, not 1"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"tasks": ("a", "a")}, "not unique"),
        ({"tasks": ("a",), "lora_rank": 0}, "lora_rank must be at least 1"),
        ({"rope_theta": -1.0}, "rope_theta must be above 0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be above 0 and finite, not nan"),
        ({"rope_theta": float("inf")}, "rope_theta must be above 0 and finite, not inf"),
        ({"lora_alpha": float("-inf")}, "lora_alpha must be finite, not -inf"),
        ({"truncate_dim": 33}, "truncate_dim 33 is outside 1..32"),
        ({"tasks": ("a", "")}, "a task needs a name"),
        ({"pad_id": 99}, "pad_id 99 is not in the vocabulary of 99"),
        ({"position_type": "absolute", "max_position_embeddings": 2}, "max_position_embeddings 2 leaves no position"),
        ({"matryoshka_dims": (8, 64)}, r"matryoshka_dims \[64\] are outside 1..32"),
    ],
    ids=str,
)
def test_impossible_configurations_name_the_field(fields, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**(SIZES | fields))
    with pytest.raises(ConfigError, match="unknown configuration fields"):
        ModelConfig.from_dict(SIZES | {"layers": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": None}, "tasks is None, should be tuple"),
        ({"tasks": "abc"}, "tasks is 'abc'"),
        ({"prompts": [["a"]]}, "prompts is"),
        ({"prompts": [["a", 5]]}, "prompts is"),
        ({"position_type": "alibi"}, r"position_type is 'alibi', should be Literal\['rope', 'absolute'\]"),
        ({"num_heads": 4.0}, "num_heads is 4.0, should be int"),
        ({"num_heads": True}, "num_heads is True"),
        ({"rope_theta": "x", "unroll": 1}, "rope_theta is 'x', should be float; unroll is 1, should be bool"),
        ({"truncate_dim": "8"}, "truncate_dim is '8', should be int | None"),
    ],
    ids=str,
)
def test_fields_of_the_wrong_type_in_a_file_are_listed(fields, message):
    with pytest.raises(ConfigError, match=f"wrong type: {message}"):
        ModelConfig.from_dict(SIZES | fields)
    assert ModelConfig.from_dict(SIZES | {"rope_theta": 10_000}).rope_theta == 10_000.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "deberta"}, "model_type 'deberta' is not supported.*xlm-roberta"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported.*gelu"),
        ({"emb_pooler": "cls"}, "emb_pooler 'cls' is not supported.*mean"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'.*absolute"),
        ({"position_embedding_type": ["rotary"]}, r"position_embedding_type \['rotary'\] is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": [1]}, "rope_parameters must be a dict"),
        ({"lora_adaptations": "separation"}, "lora_adaptations must be a list"),
        ({"lora_adaptations": ["separation", "new"]}, r"task_instructions has no entry for \['new'\]"),
        ({"task_instructions": ["Q: "]}, "task_instructions must be a dict"),
        ({"lora_alpha": "1"}, "lora_alpha is '1', should be float"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"hidden_size": None}, "hidden_size is None, should be int"),
    ],
    ids=str,
)
def test_a_config_json_that_asks_for_something_else_names_the_field(fields, message):
    with pytest.raises(ConfigError, match=message):
        from_hf(PUBLISHED | fields)


def test_an_unknown_task_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"unknown task 'c'; this model has \['a', 'b'\]"):
        ModelConfig(**SIZES, tasks=("a", "b")).task_index("c")
    with pytest.raises(ValueError, match="this model has no adapters"):
        ModelConfig(**SIZES).task_index("c")

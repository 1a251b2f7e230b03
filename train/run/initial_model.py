"""The model that a run starts from, with the adapters and heads that its stages train."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Int

from jina_jax.checkpoints.load import load_encoder
from jina_jax.checkpoints.sources import local_directory
from jina_jax.config import SERVING_ROPE_THETA, ModelConfig
from jina_jax.errors import ConfigError
from jina_jax.model.adapters import add_adapter, base_arrays
from jina_jax.model.encoder import Encoder
from jina_jax.model.parameters import Arrays, abstract_variables, from_arrays, variables
from jina_jax.text.tokenizer import Tokenizer, load_tokenizer

from ..config import InitialModel, Stage, TrainConfig
from .instructions import prompts_after, task_instructions


def load_initial_model(config: TrainConfig) -> tuple[Encoder, Tokenizer]:
    """Loads the model of `config.start` in float32, and its tokenizer.

    The model has every adapter and head that the stages need.

    Raises:
        ValueError: the source is damaged or not supported, the tokenizer is another model's, or the
            configuration does not fit the model, see `prepare_for_stages`.
        FileNotFoundError: a path does not exist.
    """
    start, tokenizer = load_start(config)
    return prepare_for_stages(start, config), tokenizer


def load_start(config: TrainConfig) -> tuple[Encoder, Tokenizer]:
    """Loads the model of `config.start` as it is, in float32, and its tokenizer.

    Raises:
        ValueError: the source is damaged or not supported, or the tokenizer is another model's.
        FileNotFoundError: a path does not exist.
    """
    start = config.start
    if start.source is None:
        assert start.model is not None and start.tokenizer is not None
        encoder = _fresh(fresh_sizes(start.model), jax.random.key(config.seed))
        tokenizer = load_tokenizer(local_directory(start.tokenizer), encoder.config)
    else:
        encoder, tokenizer, _ = load_encoder(
            start.source, dtype=jnp.float32, param_dtype=jnp.float32, tokenizer=start.tokenizer
        )
    return encoder, tokenizer


def fresh_sizes(model: ModelConfig) -> ModelConfig:
    """Sizes of a model with random weights, without adapters and head: its stages bring them."""
    return replace(model, mlm_head=False, tasks=())


def prepare_for_stages(encoder: Encoder, config: TrainConfig) -> Encoder:
    """Applies the changes of `config.start`, and adds every adapter and head that the stages need.

    Raises:
        ConfigError: a stage has longer texts than the model can have, or prompts that are not its
            tasks' instructions; or fields of rotary positions are given for a model that keeps
            absolute ones.
    """
    key = jax.random.key(config.seed)
    encoder = _with_overrides(encoder, config.start)
    for stage in config.stages:
        _check_length(stage, encoder.config)
    stage = config.stages[0]
    if stage.adapters:
        return _with_new_adapters(encoder, config, key)
    # Adapters of the source are dropped: they were trained on another base.
    encoder = _with_config(encoder, replace(encoder.config, tasks=(), prompts=prompts_after(stage, encoder.config)))
    return _with_head(encoder, stage.objective == "mlm", key)


def with_token_frequencies(encoder: Encoder, labels: Iterable[Int[np.ndarray, "b t"]]) -> Encoder:
    """Sets the bias of a fresh MLM head to the tokens' log frequencies; a trained head stays.

    Adam moves the bias too slowly to learn them in a short run. The table, which the head shares
    with the input, takes them up meanwhile, and every text's mean state points the same way.

    Args:
        encoder: model with an MLM head.
        labels: batches of labels: original tokens of masked positions, -1 elsewhere.
    """
    bias = variables(encoder)["mlm_head.bias"].get_value()
    if jnp.any(bias):
        return encoder
    counts = np.full(len(bias), 0.1)  # a token that was not seen is rare, not impossible
    for batch in labels:
        counts += np.bincount(batch[batch >= 0], minlength=len(bias))
    return from_arrays(
        encoder.config,
        base_arrays(encoder) | {"mlm_head.bias": jnp.asarray(np.log(counts / counts.sum()), bias.dtype)},
        dtype=encoder.dtype,
    )


def _fresh(config: ModelConfig, key: Array) -> Encoder:
    @jax.jit
    def initialise(key: Array) -> Arrays:
        encoder = Encoder(config, rngs=nnx.Rngs(key))
        return {path: variable.get_value() for path, variable in variables(encoder).items()}

    return from_arrays(config, initialise(key), dtype=jnp.float32)


def _with_overrides(encoder: Encoder, start: InitialModel) -> Encoder:
    """Applies the changes of `start` to a model.

    Its positions stay, unless `start` asks for rotary ones: absolute ones then lose their table, as
    section 3 of the paper does to XLM-R.
    """
    config = encoder.config
    changes = {
        "rope_theta": start.rope_theta,
        "max_position_embeddings": start.max_position_embeddings,
        "matryoshka_dims": start.matryoshka_dims,
        "lora_rank": start.lora_rank,
        "lora_alpha": start.lora_alpha,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    if config.position_type == "absolute":
        rotary = {"rope_theta": SERVING_ROPE_THETA, "max_position_embeddings": ModelConfig().max_position_embeddings}
        if start.position_type == "rope":
            given = {"position_type": "rope"} | rotary | given
        elif fields := [f"start.{name}" for name in rotary if name in given]:
            raise ConfigError(
                f"{' and '.join(fields)}: {start.source or 'start.model'} has absolute positions, which stay as they are; "
                f'leave this out, or set start.position_type="rope" for rotary ones, which a base has to learn'
            )
    if config.tasks:  # existing adapters keep their rank; new ones are padded to fit
        given.pop("lora_rank", None)
    return _with_config(encoder, replace(config, **given))


def _check_length(stage: Stage, config: ModelConfig) -> None:
    if stage.max_length <= config.max_tokens:
        return
    cure = ""
    if config.position_type == "absolute" and not stage.adapters:
        cure = '; its positions are absolute, and start.position_type="rope" makes them rotary ones'
    raise ConfigError(
        f"stage {stage.name}: max_length {stage.max_length} is above the model's {config.max_tokens} tokens{cure}"
    )


def _with_config(encoder: Encoder, config: ModelConfig) -> Encoder:
    """Encoder of a configuration, with those arrays that it has a place for."""
    arrays = {path: variable.get_value() for path, variable in variables(encoder).items()}
    wanted = abstract_variables(config)
    return from_arrays(config, {path: arrays[path] for path in wanted}, dtype=encoder.dtype)


def _with_new_adapters(encoder: Encoder, config: TrainConfig, key: Array) -> Encoder:
    instructions = task_instructions(config, encoder.config)
    for stage in config.stages:
        for task in stage.adapters:
            if task not in encoder.config.tasks:
                encoder = add_adapter(
                    encoder,
                    task,
                    rank=config.start.lora_rank,
                    alpha=config.start.lora_alpha,
                    instruction=instructions[task],
                    rngs=nnx.Rngs(jax.random.fold_in(key, _stable_hash(task))),
                )
    return encoder


def _with_head(encoder: Encoder, head: bool, key: Array) -> Encoder:
    """Adds a fresh MLM head where it is needed and missing; drops it where it is not needed."""
    if head == encoder.config.mlm_head:
        return encoder
    config = replace(encoder.config, mlm_head=head)
    if not head:
        return _with_config(encoder, config)
    fresh = {path: variable.get_value() for path, variable in variables(_fresh(config, key)).items()}
    return from_arrays(config, fresh | base_arrays(encoder), dtype=encoder.dtype)


def _stable_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])

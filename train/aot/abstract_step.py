"""The arguments of a stage's step as shapes with shardings.

They are those that `train` would make, without weights, data or devices.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jina_jax.checkpoints.load import load_config as load_model_config
from jina_jax.config import PUBLISHED_INSTRUCTIONS, ModelConfig
from jina_jax.model.encoder import Encoder
from jina_jax.parallel.mesh import BATCH, shardings

from ..config import Stage, TrainConfig, load_config
from ..data.collate import PackedRows, TrainBatch
from ..data.examples import texts_per_example
from ..data.row_counts import most_rows
from ..run.initial_model import fresh_sizes, prepare_for_stages
from ..step.trainable_split import TrainableSplit, ready_to_fold, split_trainable
from ..step.update import State, abstract_state

_ABSOLUTE: dict[str, Any] = {"position_type": "absolute", "rope_theta": 10_000.0}
_XLM_R: dict[str, Any] = _ABSOLUTE | {"max_position_embeddings": 514}
_BERT: dict[str, Any] = _ABSOLUTE | {
    "max_position_embeddings": 512,
    "position_offset": 0,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
_SMALLER: dict[str, dict[str, Any]] = {
    "base": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "mlp_size": 3072},
    "small": {"hidden_size": 384, "num_layers": 12, "num_heads": 12, "mlp_size": 1536},
}

PUBLISHED_SIZES = {
    "jinaai/jina-embeddings-v3": ModelConfig(tasks=tuple(PUBLISHED_INSTRUCTIONS), pooler=True),
    "FacebookAI/xlm-roberta-large": ModelConfig(**_XLM_R),
    "FacebookAI/xlm-roberta-base": ModelConfig(**_XLM_R, **_SMALLER["base"]),
    "intfloat/multilingual-e5-large-instruct": ModelConfig(**_XLM_R),
    "intfloat/multilingual-e5-large": ModelConfig(**_XLM_R),
    "intfloat/multilingual-e5-base": ModelConfig(**_XLM_R, **_SMALLER["base"]),
    "intfloat/multilingual-e5-small": ModelConfig(**_BERT, **_SMALLER["small"], vocab_size=250_037),
}
"""Sizes of models on the hub, by id, as they are loaded: a BERT pads with its tokenizer's id."""


def source_sizes(config: TrainConfig, directory: Path) -> ModelConfig:
    """Sizes of the model that a run starts from; no weights are read.

    Args:
        config: configuration of the run.
        directory: that of the configuration's file. A source `runs/NAME/model` that does not exist
            yet is taken to be the model that NAME.py in this directory will make.

    Raises:
        ValueError: the sizes are not known; the message lists the models whose sizes are.
    """
    source = config.start.source
    if source is None:
        assert config.start.model is not None
        return fresh_sizes(config.start.model)
    if source in PUBLISHED_SIZES:
        return PUBLISHED_SIZES[source]
    path = Path(source)
    if path.is_dir():
        return load_model_config(path)
    if path.parts[:1] == ("runs",) and path.name == "model" and (earlier := directory / f"{path.parent.name}.py").is_file():
        before = load_config(earlier)
        return abstract_splits(before, source_sizes(before, directory))[0].config
    raise ValueError(
        f"start.source {source} is no directory here, nor made by a configuration in {directory}, nor a model whose sizes are "
        f"known: {sorted(PUBLISHED_SIZES)}. Give one with --set start.source=..., and the same sizes"
    )


def abstract_splits(config: TrainConfig, sizes: ModelConfig) -> list[TrainableSplit]:
    """What a run has of each stage's `split_trainable`, with shapes in place of arrays."""
    made: list[ModelConfig] = []

    def arrays() -> list[tuple[Any, Any]]:
        encoder = prepare_for_stages(Encoder(sizes, rngs=nnx.Rngs(0)), config)
        splits = [split_trainable(encoder, stage) for stage in config.stages]
        made.extend(part.config for part in splits)
        stages = zip(config.stages, splits, strict=True)
        return [(part.trained, ready_to_fold(part.frozen, stage, config.dtype)) for stage, part in stages]

    return [TrainableSplit(model, *shapes) for model, shapes in zip(made, jax.eval_shape(arrays), strict=False)]


def step_arguments(stage: Stage, kind: str, model: TrainableSplit, mesh: Mesh) -> tuple[State, Mapping[str, Any], TrainBatch]:
    """Arguments of `make_step`'s step on the largest batch that the stage can have."""
    return placed(abstract_state(stage, model.trained), mesh), placed(model.frozen, mesh), abstract_batch(stage, kind, mesh)


def placed(tree: Any, mesh: Mesh) -> Any:
    """Shapes with the shardings that `jina_jax.parallel.mesh.shard_params` gives arrays."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings(tree, mesh))


def abstract_batch(stage: Stage, kind: str, mesh: Mesh) -> TrainBatch:
    """The largest batch, of texts of full length.

    Raises:
        ValueError: the batch is not divisible by the number of devices.
    """
    if stage.batch_size % mesh.size:
        most = max(n for n in range(1, mesh.size) if stage.batch_size % n == 0)
        raise ValueError(
            f"stage {stage.name}: batch_size {stage.batch_size} is not divisible by {mesh.size} devices; "
            f"of fewer, {most} are the most that it divides by"
        )
    texts = texts_per_example(stage, kind)
    counts = most_rows(stage.batch_size // mesh.size, texts, stage)
    rows = [int32_struct(mesh, count * mesh.size, stage.row_length) for count in counts]
    return TrainBatch(
        parts=tuple(PackedRows(each, each, each, each) for each in rows),
        places=int32_struct(mesh, stage.batch_size, texts),
        scores=int32_struct(mesh, stage.batch_size, 2),
        groups=int32_struct(mesh, stage.batch_size, max(texts - 1, 1)),
    )


def int32_struct(mesh: Mesh, *shape: int) -> Any:
    """Shape of an int32 array of a batch; an array without axes is replicated on every device."""
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, BATCH if shape else PartitionSpec()))

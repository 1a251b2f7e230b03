"""What `benchmarks.same_as` runs in each of two trees of this repository.

    python -P benchmarks/same_as_worker.py make data/tokenizer model
    python -P benchmarks/same_as_worker.py embed model texts.json embeddings.npz
    python -P -m train benchmarks/same_as_worker.py:adapters --workdir run

Both trees execute this one file; the one meant comes first on PYTHONPATH. So it uses only names
that all of them have, and puts the fields of a run into the words of the tree. The runs read
`model` and `records/*.jsonl` in the current directory.
"""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

TASKS = {"retrieval.query": "Query: ", "retrieval.passage": "Passage: "} | dict.fromkeys(
    ("separation", "classification", "text-matching"), ""
)
"""The adapters of the model, and their instructions."""

MODEL: dict[str, Any] = {"vocab_size": 16_000, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "mlp_size": 128}

STEPS = {"adapters": 48, "pairs": 40, "mlm": 40}
CHECKPOINT_EVERY = 4

OLDER_NAMES = {
    "max_length": "length",
    "num_negatives": "negatives",
    "num_row_counts": "row_shapes",
    "logit_chunk": "loss_chunk",
    "encode_chunk_rows": "chunk_rows",
    "keep_checkpoints": "keep",
}
"""Fields of a stage and of a run, and what commit 4fe3f70 calls them."""

OLDER_VALUES = {"suffix": "numbered", "excluded": "masked"}
"""The same for the values of `same_class`."""


@click.group()
def main() -> None:
    """Work in the tree that comes first on PYTHONPATH."""


# ---- a model and its embeddings


@main.command()
@click.argument("tokenizer", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
def make(tokenizer: Path, directory: Path) -> None:
    """Write a native checkpoint of a small model with five adapters, every parameter random."""
    from flax import nnx
    from transformers import PreTrainedTokenizerFast

    from jina_jax import Embedder, Encoder, ModelConfig

    config = ModelConfig(**MODEL, tasks=tuple(TASKS), prompts=tuple(TASKS.items()), matryoshka_dims=(16, 32, 64))
    encoder, rng = Encoder(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    state = nnx.state(encoder)
    nnx.update(encoder, jax.tree_util.tree_map_with_path(lambda path, x: _random(path, x.shape, rng), state))
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text("utf-8"))
    special = {name: token for name, token in settings.items() if name.endswith("_token")}
    pieces = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer / "tokenizer.json"), model_max_length=settings["model_max_length"], **special
    )
    Embedder(encoder, config, pieces).save(directory)


def _random(path: Any, shape: tuple[int, ...], rng: np.random.Generator) -> jax.Array:
    """A parameter that is neither zero nor one, of a size that keeps activations near 1."""
    name, noise = jax.tree_util.keystr(path, simple=True, separator="."), rng.standard_normal(shape)
    if "scale" in name:
        return jnp.asarray(0.2 * noise + (1.0 if "norm" in name else 0.5), jnp.float32)
    if "kernel" in name:
        return jnp.asarray(noise / shape[-2] ** 0.5, jnp.float32)
    return jnp.asarray(0.2 * noise, jnp.float32)


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def embed(directory: Path, file: Path, out: Path) -> None:
    """Embed the texts of a JSON file in every way that makes another program of it."""
    from jina_jax import Embedder

    texts = json.loads(file.read_text("utf-8"))
    mixed = [(None, *TASKS)[i % (1 + len(TASKS))] for i in range(len(texts))]
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        model = Embedder.load(directory, dtype=dtype)
        for task in (None, *TASKS):
            found[f"{dtype}, {task or 'base'}"] = model.encode(texts, task=task)
        found[f"{dtype}, mixed tasks"] = model.encode(texts, task=mixed)
        found[f"{dtype}, mixed tasks of few texts"] = model.encode(texts[:12], task=mixed[:12])
        found[f"{dtype}, queries"] = model.encode_query(texts, truncate_dim=32)
        found[f"{dtype}, documents as int8"] = model.encode_document(texts, precision="int8")
        for task in (None, "separation"):
            states = model.encode(texts, task=task, output_value="token_embeddings")
            found[f"{dtype}, tokens, {task or 'base'}"] = np.concatenate(states)
            found[f"{dtype}, numbers of tokens, {task or 'base'}"] = np.array([len(each) for each in states])
    np.savez(out, **found)


# ---- configurations of runs, for python -m train


def adapters() -> Any:
    """The four stages of adapters side by side."""
    of_stages = {
        "retrieval": {
            "adapters": ("retrieval.query", "retrieval.passage"),
            "datasets": (_records("triplet"), _records("pair")),
            "num_negatives": 2,
            "dims": (16, 64),
            "encode_chunk_rows": 4,
            "logit_chunk": 8,
        },
        "text_matching": {"adapters": ("text-matching",), "datasets": (_records("scored_pair"),), "temperature": 1.0},
        "classification": {
            "adapters": ("classification",),
            "datasets": (_records("labelled_text"),),
            "num_negatives": 1,
            "same_class": "suffix",
            "num_row_counts": 2,
        },
        "separation": {
            "adapters": ("separation",),
            "datasets": (_records("labelled_text"), _records("pair")),
            "temperature": 0.3,
            "remat": "except_attention",
        },
    }
    stages = [_stage(name, STEPS["adapters"] // len(of_stages), **fields) for name, fields in of_stages.items()]
    return _run(stages, start={"source": "model", "lora_rank": 4})


def pairs() -> Any:
    """Pairs, in one language each, in float32."""
    dataset = _records("pair", by_language=True, language_exponent=0.5)
    stage = _stage(
        "pairs", STEPS["pairs"], datasets=(dataset,), dims=(16, 64), dim_weights=(2.0, 1.0), num_row_counts=2, logit_chunk=8
    )
    return _run([stage], start={"source": "model"}, dtype="float32")


def mlm() -> Any:
    """Masked words, from random weights."""
    stage = _stage(
        "mlm", STEPS["mlm"], datasets=(_records("text"),), mask_rate=0.2, encode_chunk_rows=4, logit_chunk=64, remat="full"
    )
    return _run([stage], start={"model": MODEL, "tokenizer": "model", "rope_theta": 10_000.0})


def _records(kind: str, **fields: Any) -> dict[str, Any]:
    return {"path": f"records/{kind}.jsonl", "kind": kind} | fields


def _stage(name: str, steps: int, **fields: Any) -> dict[str, Any]:
    sizes = {"steps": steps, "warmup_steps": 2, "batch_size": 8, "max_length": 48, "row_length": 96, "learning_rate": 1e-3}
    return {"name": name, "objective": name} | sizes | fields


def _run(stages: list[dict[str, Any]], **fields: Any) -> Any:
    """A TrainConfig of this tree."""
    from pydantic import TypeAdapter

    from train.config import Stage, TrainConfig

    same_class = {new: _known_value(new, typing.get_type_hints(Stage)["same_class"]) for new in OLDER_VALUES}
    for stage in stages:
        if "same_class" in stage:
            stage["same_class"] = same_class[stage["same_class"]]
    run = {"checkpoint_every": CHECKPOINT_EVERY, "keep_checkpoints": 3, "log_every": 1, "read_threads": 2} | fields
    known = _known_names(TrainConfig, run) | {"stages": [_known_names(Stage, stage) for stage in stages]}
    return TypeAdapter(TrainConfig).validate_json(json.dumps(known))


def _known_names(of: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields by the names that a class has for them."""
    names = {field.name for field in dataclasses.fields(of)}
    return {name if name in names else OLDER_NAMES.get(name, name): value for name, value in fields.items()}


def _known_value(value: str, of: Any) -> str:
    return value if value in typing.get_args(of) else OLDER_VALUES[value]


if __name__ == "__main__":
    main()

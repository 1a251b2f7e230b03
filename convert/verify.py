"""Compares a converted checkpoint with its PyTorch source, layer by layer and task by task."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jina_jax.checkpoints.pipeline import transformer_folder
from jina_jax.checkpoints.sources import checkpoint_format, find_model
from jina_jax.checkpoints.torch_reader import read_torch_checkpoint
from jina_jax.embed.embedder import Embedder
from jina_jax.embed.forward import token_states
from jina_jax.embed.similarity import normalize
from jina_jax.model.encoder import Encoder, pool, token_adapter_ids
from jina_jax.model.layers import DeferredLayerNorm
from jina_jax.text import packing

TOLERANCES = {"layer": 1e-5, "states": 1e-4, "embedding": 1e-5}
"""Largest differences allowed in float32.

`layer`: output of one layer, given the reference's input. `states`: output of all layers in turn.
Both are relative to the largest reference value where that exceeds 1. `embedding`: normalised mean,
absolute.
"""

TEXTS = (
    "",
    "The quick brown fox jumps over the lazy dog.",
    "Ein Paketverwaltungsprogramm mit grafischer Oberfläche, das Abhängigkeiten auflöst.",
    "日本語の形態素解析システム。辞書と設定ファイルを含みます。",
    "Программа для просмотра и редактирования изображений.",
    "🦊 emoji 🎉   and \t whitespace \n\n",
    "tokens spelled <pad> out <pad><pad> in </s> a text [PAD] [SEP]",
    "A longer text. " * 40,
)


def verify(source: Path, target: str | Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Compares `target` with its PyTorch source, both computed in float32.

    Returns:
        A report: `ok`, the tolerances, and the largest differences for the base and each task.

    Raises:
        ValueError: `source` is a native checkpoint or `target` itself, or their tasks differ.
    """
    from .torch_reference import TorchReference

    if checkpoint_format(source) != "torch":
        raise ValueError(f"{source} is a native checkpoint; the source of a comparison is a PyTorch one")
    model = Embedder.load(target, dtype=jnp.float32)
    if find_model(target).samefile(source):
        raise ValueError("source and target are the same directory")
    config = read_torch_checkpoint(source, dtype=jnp.float32, allow_pickle=allow_pickle).config
    if set(config.tasks) != set(model.config.tasks):  # their order is that of files, in some layouts
        raise ValueError(f"the source has the tasks {list(config.tasks)}, the target {list(model.config.tasks)}")
    reference = TorchReference(transformer_folder(source), config, allow_pickle=allow_pickle)
    token_ids = [model.tokenizer(text)["input_ids"][: model.max_length] for text in TEXTS]
    systems = [_compare(model.encoder, reference, token_ids, task) for task in (None, *config.tasks)]
    ok = all(system[name] <= limit for system in systems for name, limit in TOLERANCES.items())
    return {"ok": ok, "source": str(source), "target": str(target), "tolerances": TOLERANCES, "systems": systems}


def _compare(encoder: Encoder, reference: Any, token_ids: list[list[int]], task: str | None) -> dict[str, Any]:
    import torch

    rows = _one_text_a_row(token_ids, encoder.config.pad_id)
    real = rows.segment_ids > 0
    expected = [
        states.numpy()
        for states in reference.hidden_states(torch.from_numpy(rows.tokens).long(), torch.from_numpy(real).long(), task)
    ]
    tasks = None if task is None else np.full((len(token_ids), 1), encoder.config.task_index(task), np.int32)
    layers = [_difference(got[real], want[real]) for got, want in _layer_outputs(encoder, rows, tasks, expected)]
    states = token_states(encoder, rows.tokens, rows.segment_ids, rows.positions, tasks)
    got, want = (
        normalize(np.asarray(pool(jnp.asarray(s), jnp.asarray(rows.segment_ids), 1))[:, 0]) for s in (states, expected[-1])
    )
    return {
        "task": task,
        "layer": float(np.max(layers)),  # max() would pass over NaN
        "layers": layers,
        "states": _difference(np.asarray(states)[real], expected[-1][real]),
        "embedding": float(np.abs(got - want).max()),
    }


def _layer_outputs(encoder: Encoder, rows: packing.PackedBatch, tasks: np.ndarray | None, expected: list[np.ndarray]):
    """Yields (ours, the reference's) output of the embedding and of each layer.

    Each layer is given the reference's input.
    """
    task = None if tasks is None else token_adapter_ids(jnp.asarray(tasks), jnp.asarray(rows.segment_ids))
    tables = encoder.rotary_tables(jnp.asarray(rows.positions))
    tokens, positions = jnp.asarray(rows.tokens), jnp.asarray(rows.positions)
    yield np.asarray(encoder.embed(encoder.tokens.rows(tokens), tokens, positions, task)), expected[0]
    run = jax.jit(lambda layer, x: layer(DeferredLayerNorm.identity(x), jnp.asarray(rows.segment_ids), tables, task).value())
    for index, (given, wanted) in enumerate(zip(expected[:-1], expected[1:], strict=True)):
        layer = jax.tree.map(lambda array, index=index: array[index], encoder.layers)
        yield np.asarray(run(layer, jnp.asarray(given))), wanted


def _one_text_a_row(token_ids: list[list[int]], pad_id: int) -> packing.PackedBatch:
    length = max(map(len, token_ids))
    batch = packing.BatchPlan([[i] for i in range(len(token_ids))], (len(token_ids), max(length, packing.TOKENS_PER_TEXT)))
    return packing.lay_out(token_ids, batch, pad_id)


def _difference(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / max(1.0, np.abs(want).max()))

"""At the published size, with random weights, against transformers with PEFT.

Takes minutes: marked slow.
"""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
import jax
import jax.numpy as jnp
import torch
from flax import nnx

from jina_jax import Embedder, Encoder, ModelConfig
from jina_jax.checkpoints.torch_writer import write_transformers
from jina_jax.config import PUBLISHED_INSTRUCTIONS
from jina_jax.model.adapters import base_arrays, extract_adapters
from jina_jax.model.parameters import from_arrays
from jina_jax.text.tokenizer import load_tokenizer
from oracles import checkpoints

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("retrieval.query", "text-matching")
TEXTS = (
    "",
    "x",
    "An editor for photographs and other raster images.",
    "Ein Betrachter für Ölgemälde, der überall läuft: größer, schöner, heißer.",
    "日本語の形態素解析システム。辞書と設定ファイルを含みます。",
    "Программа для просмотра и редактирования изображений.",
    "🦊 emoji 👩‍👩‍👧   and \t white space \n\n",
    "a longer text about packages and their dependencies, " * 60,
)


def random_model() -> Encoder:
    """Every parameter random.

    The writer is ours; transformers' loader checks the names that it writes.
    """
    config = ModelConfig(tasks=TASKS, prompts=tuple((task, PUBLISHED_INSTRUCTIONS[task]) for task in TASKS), pooler=True)
    encoder = jax.jit(lambda: Encoder(config, rngs=nnx.Rngs(0)))()
    arrays = base_arrays(encoder) | extract_adapters(encoder)
    for number, (path, array) in enumerate(sorted(arrays.items())):
        leaf, noise = path.rpartition(".")[2], jax.random.normal(jax.random.fold_in(jax.random.key(1), number), array.shape)
        if leaf == "bias" or (leaf == "scale" and "norm" in path):
            arrays[path] = array + 0.1 * noise
        elif leaf in ("a", "b"):
            arrays[path] = 0.05 * noise
    return from_arrays(config, arrays, dtype=jnp.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_published_size_agrees_with_transformers(tmp_path):
    encoder = random_model()
    write_transformers(tmp_path / "model", encoder, load_tokenizer(ROOT / "data" / "tokenizer", encoder.config))
    del encoder
    model = Embedder.load(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == 250_002
    for task in (None, *TASKS):
        prompt = (model.config.prompt(task) or "") if task else ""
        batch = model.tokenizer([prompt + text for text in TEXTS], padding=True, return_tensors="pt")
        folder = task.replace(".", "_").replace("-", "_") if task else None
        states = checkpoints.transformers_states(tmp_path / "model", batch["input_ids"], batch["attention_mask"], folder)[-1]
        mask = batch["attention_mask"][..., None].float()
        expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).numpy()
        np.testing.assert_allclose(model.encode(TEXTS, task), expected, atol=1e-5)
        ours = model.encode(TEXTS, task, output_value="token_embeddings")
        for row, text in enumerate(ours):
            np.testing.assert_allclose(text, states[row, : len(text)].numpy(), atol=1e-4)

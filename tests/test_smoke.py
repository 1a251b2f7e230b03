"""From random weights to the same vectors after a trip to disk, without PyTorch."""

import jax.numpy as jnp
import numpy as np

from jina_jax import Embedder

TEXTS = ["an image editor", "ein Bildbearbeitungsprogramm", "画像エディタ", "редактор изображений", "", "🎨 " * 300]


def test_save_and_load_give_the_same_vectors(embedder, tmp_path):
    tasks = [None, "retrieval.query", "classification", "retrieval.passage", None, "classification"]
    before = embedder.encode(TEXTS, tasks, truncate_dim=32)
    assert before.shape == (6, 32) and np.isfinite(before).all()
    np.testing.assert_allclose(np.linalg.norm(before, axis=1), 1, atol=1e-6)
    embedder.save(tmp_path / "model")
    after = Embedder.load(tmp_path / "model")
    assert after.config == embedder.config
    np.testing.assert_array_equal(after.encode(TEXTS, tasks, truncate_dim=32), before)


def test_bfloat16_is_close(embedder, tmp_path):
    embedder.save(tmp_path / "model")
    low = Embedder.load(tmp_path / "model", dtype=jnp.bfloat16)
    assert low.encoder.layers.up.kernel.get_value().dtype == jnp.bfloat16
    cosine = (low.encode(TEXTS, "classification") * embedder.encode(TEXTS, "classification")).sum(-1)
    assert cosine.min() > 0.995

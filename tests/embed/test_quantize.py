"""Quantised embeddings have sentence-transformers' values."""

import logging

import numpy as np
import pytest

from jina_jax.embed.quantize import EMBEDDING_PRECISIONS, quantize

pytest.importorskip("sentence_transformers")
from sentence_transformers.util import quantize_embeddings


@pytest.mark.parametrize("precision", EMBEDDING_PRECISIONS)
@pytest.mark.parametrize("shape", [(120, 64), (3, 13), (2, 1), (0, 16)], ids=str)
def test_values_are_those_of_sentence_transformers(precision, shape):
    embeddings = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    embeddings[:, :1] = 0.25  # a dimension without a range
    got, expected = quantize(embeddings, precision), quantize_embeddings(embeddings, precision)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_ranges_need_more_than_one_embedding(precision):
    with pytest.raises(ValueError, match="one embedding has none"):
        quantize(np.ones((1, 4), np.float32), precision)


def test_few_embeddings_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        quantize(np.eye(3, dtype=np.float32), "int8")
    assert "only 3 embeddings" in caplog.text

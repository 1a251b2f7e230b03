"""Quantised embeddings have sentence-transformers' values."""

import logging

import numpy as np
import pytest

from jina_jax.embed.quantize import EMBEDDING_PRECISIONS, dequantize, quantize

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


@pytest.mark.parametrize("precision", ["int8", "uint8"])
@pytest.mark.parametrize("texts", [1, 5])
def test_calibration_ranges_are_those_of_sentence_transformers(precision, texts):
    rng = np.random.default_rng(1)
    ranges = np.sort(rng.standard_normal((2, 16)).astype(np.float32), axis=0)
    embeddings = rng.uniform(ranges[0], ranges[1], (texts, 16)).astype(np.float32)
    got = quantize(embeddings, precision, ranges)
    np.testing.assert_array_equal(got, quantize_embeddings(embeddings, precision, ranges=ranges))


def test_values_beyond_the_ranges_become_their_ends():
    got = quantize(np.array([[-9, 0, 9]], np.float32), "int8", [[-1, -1, -1], [1, 1, 1]])
    np.testing.assert_array_equal(got, [[-128, -1, 127]])


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([[0, 0]], r"ranges must be \[2, 2\]"),
        ([[0, 0], [1, np.nan]], "must be finite"),
        ([[0, 2], [1, 1]], "no least value above its largest"),
        ("wide", "must be numbers"),
        ([[0], [1, 1]], "must be numbers"),
    ],
)
def test_what_are_no_ranges(ranges, message):
    with pytest.raises(ValueError, match=message):
        quantize(np.ones((3, 2), np.float32), "int8", ranges)


def test_ranges_beside_a_precision_that_takes_none():
    with pytest.raises(ValueError, match="int8 and uint8, not for ubinary"):
        quantize(np.ones((3, 2), np.float32), "ubinary", [[0, 0], [1, 1]])


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_steps_are_read_back_to_their_middles(precision):
    embeddings = np.random.default_rng(2).standard_normal((200, 7)).astype(np.float32)
    ranges = np.stack([embeddings.min(axis=0), embeddings.max(axis=0)])
    back = dequantize(quantize(embeddings, precision, ranges), precision, 7, ranges)
    step = (ranges[1] - ranges[0]) / 255
    assert (np.abs(back - embeddings) <= step * 0.5001 + 1e-6).all()
    assert np.abs((back - embeddings).mean(axis=0) / step).max() < 0.1  # no bias


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_bits_are_read_back_to_signs(precision):
    embeddings = np.random.default_rng(3).standard_normal((5, 13)).astype(np.float32)
    back = dequantize(quantize(embeddings, precision), precision, 13)
    np.testing.assert_array_equal(back, np.where(embeddings > 0, 1, -1))


def test_floats_are_read_back_as_they_are():
    embeddings = np.ones((2, 3), np.float32)
    assert dequantize(embeddings, "float32", 3) is embeddings


@pytest.mark.parametrize(
    ("precision", "ranges", "message"),
    [
        ("int8", None, "with the ranges that they were"),
        ("int8", [[0], [1]], r"ranges must be \[2, 2\]"),
        ("int4", None, "unknown"),
    ],
)
def test_what_cannot_be_read_back_is_an_error(unchecked, precision, ranges, message):
    with pytest.raises(ValueError, match=message):
        dequantize(np.zeros((1, 2), np.int8), precision, 2, ranges)

"""The examples in the docstrings of the losses give what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["info_nce", "cosent", "masked_lm", "matryoshka"])
def test_examples(name, unchecked):
    found = doctest.testmod(importlib.import_module(f"jina_jax.losses.{name}"))
    assert found.attempted and not found.failed

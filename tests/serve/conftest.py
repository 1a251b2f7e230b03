"""A server of a small random model."""

from collections.abc import Iterator

import pytest

pytest.importorskip("starlette")

from helpers.serving import Served, serving
from jina_jax import Embedder
from jina_jax.config import PUBLISHED_INSTRUCTIONS


@pytest.fixture(scope="session")
def five(make_encoder, tokenizer) -> Embedder:
    """A model with the five published tasks, small enough for thousands of requests."""
    prompts = tuple(PUBLISHED_INSTRUCTIONS.items())
    sizes = {"hidden_size": 32, "num_heads": 2, "num_layers": 2, "mlp_size": 32}
    encoder = make_encoder(vocab_size=16_000, tasks=tuple(PUBLISHED_INSTRUCTIONS), prompts=prompts, **sizes)
    return Embedder(encoder, encoder.config, tokenizer)


@pytest.fixture(scope="session")
def served(five) -> Iterator[Served]:
    with serving(five) as server:
        yield server

"""A server of a small random model."""

from collections.abc import Iterator

import pytest

pytest.importorskip("starlette")

from helpers.serving import Served, serving
from jina_jax import Embedder
from jina_jax.config import PUBLISHED_INSTRUCTIONS
from jina_jax.embed.batch_runner import Tuning


@pytest.fixture(scope="session")
def five(make_encoder, tokenizer) -> Embedder:
    """A model with the five published tasks, small enough for thousands of requests."""
    prompts = tuple(PUBLISHED_INSTRUCTIONS.items())
    sizes = {"hidden_size": 32, "num_heads": 1, "num_layers": 1, "mlp_size": 32}
    encoder = make_encoder(vocab_size=16_000, tasks=tuple(PUBLISHED_INSTRUCTIONS), prompts=prompts, **sizes)
    # Its calls compile one set of programs: folded adapters would need another.
    return Embedder(encoder, encoder.config, tokenizer, tuning=Tuning(worth_folding=10**9))


@pytest.fixture(scope="session")
def served(five) -> Iterator[Served]:
    with serving(five) as server:
        yield server

"""Large and small calls above real weights in bfloat16: the former fold the adapter."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jina_jax import Embedder
from jina_jax.embed.batch_runner import Tuning
from jina_jax.model.adapters import add_adapter
from jina_jax.model.lora import AdapterParam


@pytest.mark.parametrize("size", [1e-3, 3e-2])
def test_a_folded_adapter_gives_the_embeddings_of_one_beside_the_kernels(demo_model, corpus, size):
    base = Embedder.load(demo_model, dtype="bfloat16")
    encoder = add_adapter(base.encoder, "own", rank=4, alpha=1.0, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(encoder, AdapterParam)):
        if path[-1] == "b":
            noise = size * rng.standard_normal(variable.get_value().shape)
            variable.set_value(jnp.asarray(noise, variable.get_value().dtype))
    texts = corpus[: 2 * 12 : 2]
    large, small, plain = (
        Embedder(encoder, encoder.config, base.tokenizer, tuning=Tuning(worth_folding=worth)).encode(texts, task)
        for worth, task in ((0, "own"), (10**9, "own"), (0, None))
    )
    assert (large * small).sum(-1).min() > 0.9999
    assert (plain * small).sum(-1).max() < 1 - 1e-7 or size < 1e-2  # the adapter does something

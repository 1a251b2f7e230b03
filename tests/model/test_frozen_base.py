"""Layers with an adapter folded into a frozen kernel: the gradients of the mixed form, and updates
that bfloat16 does not lose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jina_jax.model.frozen_base import DENSE, fold_layer, fold_layers, folded_kernel
from jina_jax.model.parameters import variables

TASKS = ("first", "second")


def dense_of(layer, name: str, index: int):
    return jax.tree.map(lambda array: array[index], getattr(layer, name))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_a_folded_layer_is_the_mixed_form(make_encoder, name, separate):
    encoder = make_encoder(tasks=TASKS, lora_rank=3, separate_qkv_adapters=separate)
    dense, rng = dense_of(encoder.layers, name, 1), np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 8, dense.kernel[...].shape[0])), jnp.float32)
    d_y = jnp.asarray(rng.standard_normal((2, 8, *dense.bias[...].shape)), jnp.float32)
    ids = jnp.full((2, 8), 1)

    def mixed(x, dense):
        return dense(x, ids)

    def folded(x, dense):
        layer = jax.tree.map(lambda array: array[1], encoder.layers)
        setattr(layer, name, dense)
        return getattr(fold_layer(layer, 1, jnp.float32), name)(x)

    (want, pull), (got, pull_folded) = jax.vjp(mixed, x, dense), jax.vjp(folded, x, dense)
    np.testing.assert_allclose(got, want, atol=1e-5)
    (d_x, d_dense), (d_x_folded, d_folded) = pull(d_y), pull_folded(d_y)
    np.testing.assert_allclose(d_x_folded, d_x, atol=1e-5)
    for array in ("a", "b", "bias"):
        expected, found = (getattr(gradient, array)[...] for gradient in (d_dense, d_folded))
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected), array
        assert np.abs(expected).max() > 0
    assert not np.any(d_folded.kernel[...])  # frozen


def test_without_an_update_the_kernels_are_the_bases(make_encoder):
    encoder = make_encoder(tasks=TASKS)
    for path, variable in variables(encoder).items():
        if path.startswith("layers.") and path.endswith(".b"):
            variable.set_value(jnp.zeros_like(variable.get_value()))
    encoder.dtype = jnp.dtype(jnp.bfloat16)
    folded = jax.jit(fold_layers, static_argnums=1)(encoder, 0)
    for name in DENSE:
        base = getattr(encoder.layers, name).kernel[...].astype(jnp.bfloat16)
        np.testing.assert_array_equal(getattr(folded.layers, name).kernel, base)


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
def test_bfloat16_sees_the_whole_update(size):
    """Slope of (ours minus base) on the exact update of the output; rounded to the nearest, the
    smallest is seen by 3 %."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(0.03 * rng.standard_normal((1024, 4096)), jnp.bfloat16).astype(jnp.float32)
    a = jnp.asarray(rng.uniform(-1 / 32, 1 / 32, (1024, 4)) / 4, jnp.float32)  # rank 4, alpha 1
    b = jnp.asarray(size * rng.choice([-1.0, 1.0], (4, 4096)), jnp.float32)
    x = rng.standard_normal((256, 1024))
    folded = np.asarray(folded_kernel(kernel, a, b, jnp.bfloat16), np.float64)
    update = (x @ np.asarray(a, np.float64)) @ np.asarray(b, np.float64)
    ours = x @ (folded - np.asarray(kernel, np.float64))
    slope = (ours * update).sum() / (update * update).sum()
    assert 0.95 < slope < 1.05

"""Gradients added up in place, against those that JAX makes of plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jina_jax.model import gradient_sums

X = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)), jnp.float32)


def in_turns(x, total):
    """Rows, single rows and all of x, in a loop of three iterations."""

    def turn(total, seed):
        some, total = gradient_sums.track_gather(x, total, jnp.array([[4, 0], [4, 2]]) * (seed % 2))
        one, total = gradient_sums.track_slice(x[seed], total, seed)
        all_of_it, total = gradient_sums.track(x, total)
        return total, jnp.sin(some).sum() + seed * jnp.cos(one).prod() + jnp.square(all_of_it).sum() * one[0]

    total, values = jax.lax.scan(turn, total, jnp.arange(3))
    return values.sum(), total


def plainly(x):
    turns = [(x[jnp.array([[4, 0], [4, 2]]) * (seed % 2)], x[seed]) for seed in range(3)]
    return sum(
        jnp.sin(some).sum() + seed * jnp.cos(one).prod() + jnp.square(x).sum() * one[0]
        for seed, (some, one) in enumerate(turns)
    )


@pytest.mark.parametrize("again", [False, True])
def test_the_sum_gets_the_gradient_of_plain_indexing(again):
    run = jax.checkpoint(in_turns) if again else in_turns
    value, gradient = jax.jit(jax.value_and_grad(lambda x: run(jax.lax.stop_gradient(x), x)[0]))(X)
    want, expected = jax.value_and_grad(plainly)(X)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_what_was_summed_before_is_kept():
    _, backward = jax.vjp(lambda total: in_turns(X, total), X)
    before = jnp.full(X.shape, 7.0)
    (got,), (alone,) = backward((jnp.ones(()), before)), backward((jnp.ones(()), jnp.zeros(X.shape)))
    np.testing.assert_allclose(got, alone + before, rtol=1e-5)


def test_the_parameter_itself_has_no_gradient():
    gradient = jax.grad(lambda x: in_turns(x, jax.lax.stop_gradient(X))[0])(X)
    np.testing.assert_array_equal(gradient, jnp.zeros(X.shape))

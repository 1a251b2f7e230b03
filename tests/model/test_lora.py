"""Adapted layers in all three forms of `adapter_ids`, against one matmul per token in float64."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jina_jax.model import matmul as products
from jina_jax.model.lora import AdaptedDense, AdaptedEmbed, AdapterParam, AdapterScale, AdapterSpec
from jina_jax.model.matmul import matmul

INPUTS, OUTPUTS, ENTRIES = 12, 5, 40
SPEC = AdapterSpec(tasks=3, rank=2, alpha=3.0)
LAYERS = ["plain", "shared", "separate"]
MIXED = np.array([[0, 0, 1, -1, 2, 2, 2], [-1, 2, 0, 1, 1, -1, 0]], np.int32)
X = np.random.default_rng(7).standard_normal((*MIXED.shape, INPUTS)).astype(np.float32)
TOKENS = np.random.default_rng(8).integers(0, ENTRIES, MIXED.shape).astype(np.int32)


def randomised(layer, seed: int = 0):
    """Every parameter random, and another scale for each task and each of q, k and v."""
    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(layer)
    state = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.4, 1.2, x.shape) * rng.choice([-1, 1], x.shape), x.dtype), state)
    return nnx.merge(graphdef, state)


def dense(kind: str, dtype=jnp.float32, *, adapters: AdapterSpec | None = SPEC, param_dtype=jnp.float32) -> AdaptedDense:
    """A plain layer, or the fused projection with one down-projection for q, k and v or three."""
    features = (OUTPUTS,) if kind == "plain" else (3, OUTPUTS)
    if adapters is not None:
        adapters = dataclasses.replace(adapters, separate_qkv=kind == "separate")
    rngs = nnx.Rngs(0)
    return AdaptedDense(INPUTS, features, adapters, stddev=0.1, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


def embed(adapters: AdapterSpec | None = SPEC) -> AdaptedEmbed:
    return AdaptedEmbed(ENTRIES, OUTPUTS, adapters, stddev=0.1, param_dtype=jnp.float32, rngs=nnx.Rngs(0))


def dense_twin(layer: AdaptedDense, x: np.ndarray, task: np.ndarray) -> np.ndarray:
    """x @ (W + scale a b) + bias, one token and one of q, k, v at a time, in float64."""
    kernel, bias, a, b, scale = (
        np.asarray(array[...], np.float64) for array in (layer.kernel, layer.bias, layer.a, layer.b, layer.scale)
    )
    if kernel.ndim == 2:
        return dense_twin_of_part(kernel, bias, a, b, scale, x, task)
    parts = []
    for part in range(3):
        own = part if a.shape[1] == 3 else 0
        arrays = kernel[:, part], bias[part], a[:, own], b[:, :, part], scale[own]
        parts.append(dense_twin_of_part(*arrays, x, task))
    return np.stack(parts, -2)


def dense_twin_of_part(kernel, bias, a, b, scale, x, task) -> np.ndarray:
    out = np.zeros((*task.shape, kernel.shape[1]))
    for place in np.ndindex(task.shape):
        k = task[place]
        weight = kernel if k < 0 else kernel + scale[k] * a[:, k] @ b[k]
        out[place] = x[place].astype(np.float64) @ weight + bias
    return out


def embed_twin(layer: AdaptedEmbed, tokens: np.ndarray, task: np.ndarray) -> np.ndarray:
    table, a, b, scale = (np.asarray(array[...], np.float64) for array in (layer.table, layer.a, layer.b, layer.scale))
    out = np.zeros((*task.shape, table.shape[1]))
    for place in np.ndindex(task.shape):
        k, token = task[place], tokens[place]
        out[place] = table[token] if k < 0 else table[token] + scale[k] * a[token, k] @ b[k]
    return out


# ---- the three forms of adapter_ids ----


@pytest.mark.parametrize("kind", LAYERS)
def test_a_dense_layer_serves_any_mix_of_tasks(kind):
    layer = randomised(dense(kind))
    np.testing.assert_allclose(layer(jnp.asarray(X), jnp.asarray(MIXED)), dense_twin(layer, X, MIXED), atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("task", [-1, 0, 1, 2])
def test_a_dense_layer_folds_one_task(kind, task):
    layer = randomised(dense(kind))
    want = dense_twin(layer, X, np.full_like(MIXED, task))
    np.testing.assert_allclose(layer(jnp.asarray(X), jnp.int32(task)), want, atol=1e-5)
    if task < 0:
        assert jnp.array_equal(layer(jnp.asarray(X), jnp.int32(task)), layer(jnp.asarray(X), None))


def test_an_embedding_serves_any_mix_of_tasks():
    layer = randomised(embed())
    want = embed_twin(layer, TOKENS, MIXED)
    np.testing.assert_allclose(layer(jnp.asarray(TOKENS), jnp.asarray(MIXED)), want, atol=1e-5)


@pytest.mark.parametrize("task", [None, -1, 0, 1, 2])
def test_an_embedding_serves_one_task(task):
    layer = randomised(embed())
    got = layer(jnp.asarray(TOKENS), None if task is None else jnp.int32(task))
    np.testing.assert_allclose(got, embed_twin(layer, TOKENS, np.full_like(MIXED, -1 if task is None else task)), atol=1e-5)


@pytest.mark.parametrize("layer", [*LAYERS, "embedding"])
def test_one_program_serves_every_task_and_every_mix(layer):
    module, inputs = (embed(), TOKENS) if layer == "embedding" else (dense(layer), X)
    call = jax.jit(lambda module, x, task: module(x, task))
    for task in (-1, 0, 2):
        call(module, inputs, np.int32(task))
    for mix in (MIXED, np.full_like(MIXED, 1), MIXED[::-1]):
        call(module, inputs, mix)
    assert call._cache_size() == 2  # one task, and any mix


@pytest.mark.parametrize("kind", LAYERS)
def test_without_adapters_a_task_means_nothing(kind):
    layer = randomised(dense(kind, adapters=None))
    assert layer.a is layer.b is layer.scale is None and len(jax.tree.leaves(layer)) == 2
    plain = layer(jnp.asarray(X))
    want = np.tensordot(X.astype(np.float64), np.asarray(layer.kernel[...], np.float64), 1) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(plain, want, atol=1e-5)
    assert all(jnp.array_equal(layer(jnp.asarray(X), task), plain) for task in (jnp.int32(1), jnp.asarray(MIXED)))
    assert layer.folded_kernel(jnp.int32(1)) is layer.kernel[...]
    table = embed(None)
    assert jnp.array_equal(table(jnp.asarray(TOKENS), jnp.asarray(MIXED)), table(jnp.asarray(TOKENS)))


# ---- the adapters themselves ----


@pytest.mark.parametrize("layer", [*LAYERS, "embedding"])
def test_a_fresh_adapter_changes_nothing(layer):
    module, inputs = (embed(), jnp.asarray(TOKENS)) if layer == "embedding" else (dense(layer), jnp.asarray(X))
    trained, idle = (module.b, module.a) if layer == "embedding" else (module.a, module.b)
    assert jnp.abs(trained[...]).min() > 0 and not idle[...].any()
    assert jnp.allclose(module.scale[...], SPEC.alpha / SPEC.rank)
    for task in (jnp.int32(1), jnp.asarray(MIXED)):
        np.testing.assert_allclose(module(inputs, task), module(inputs), atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_shapes_and_task_axes_are_as_documented(kind):
    layer = dense(kind)
    i, k, r = INPUTS, SPEC.tasks, SPEC.rank
    features = layer.bias.shape
    parts = {"plain": (), "shared": (1,), "separate": (3,)}[kind]
    shapes = (layer.kernel.shape, layer.a.shape, layer.b.shape, layer.scale.shape)
    assert shapes == ((i, *features), (i, *parts, k, r), (k, r, *features), (*parts, k))
    for variable in (layer.a, layer.b, layer.scale):
        assert variable.shape[variable.get_metadata("task_axis")] == k


def test_adapters_are_told_from_the_base_by_type():
    layer = dense("separate")
    base, adapters, scales, rest = nnx.split(layer, nnx.Param, AdapterParam, AdapterScale, ...)[1:]
    names = [sorted(str(path[-1]) for path, _ in nnx.to_flat_state(state)) for state in (base, adapters, scales, rest)]
    assert names == [["bias", "kernel"], ["a", "b"], ["scale"], []]


def test_separate_down_projections_reach_their_own_part_alone():
    layer = randomised(dense("separate"))
    before = layer(jnp.asarray(X), jnp.asarray(MIXED))
    layer.a.set_value(layer.a[...].at[:, 1].add(1.0))
    after = layer(jnp.asarray(X), jnp.asarray(MIXED))
    changed = np.asarray(before != after).any(-1)
    assert not changed[..., (0, 2)].any()
    np.testing.assert_array_equal(changed[..., 1], MIXED >= 0)


@pytest.mark.parametrize("layer", [*LAYERS, "embedding"])
@pytest.mark.parametrize("form", ["one task", "mixed"])
def test_gradients_reach_the_adapters_of_the_tasks_in_use_alone(layer, form):
    module, inputs = (embed(), TOKENS) if layer == "embedding" else (dense(layer), X)
    graphdef, adapters, rest = nnx.split(randomised(module), AdapterParam, ...)
    task = jnp.int32(1) if form == "one task" else jnp.where(MIXED == 1, 1, -1)

    def loss(adapters):
        return jnp.square(nnx.merge(graphdef, adapters, rest)(jnp.asarray(inputs), task)).sum()

    gradients = jax.grad(loss)(adapters)
    for path, variable in nnx.to_flat_state(gradients):
        by_task = jnp.moveaxis(variable[...], variable.get_metadata("task_axis"), 0)
        used = [bool(jnp.any(of_task != 0)) for of_task in by_task]
        assert used == [False, True, False], path


@pytest.mark.usefixtures("optimized")
def test_nothing_is_computed_for_the_gradient_of_a_frozen_kernel():
    layer = randomised(dense("plain"))
    x, task = jnp.ones((4, 32, INPUTS)), jnp.zeros((4, 32), jnp.int32)

    def operations(trained):
        graphdef, trained, rest = nnx.split(layer, trained, ...)
        loss = jax.grad(lambda trained: jnp.square(nnx.merge(graphdef, trained, rest)(x, task)).sum())
        return jax.jit(loss).lower(trained).compile().cost_analysis()["flops"]

    kernels = 2 * task.size * INPUTS * OUTPUTS
    assert operations((AdapterParam, nnx.Param)) - operations(AdapterParam) > 0.9 * kernels


# ---- numbers ----


@pytest.mark.parametrize("kind", LAYERS)
def test_bfloat16_products_are_close_and_come_out_in_bfloat16(kind):
    layer = randomised(dense(kind, jnp.bfloat16, param_dtype=jnp.bfloat16))
    x = jnp.asarray(X, jnp.bfloat16)
    want = dense_twin(layer, np.asarray(x, np.float32), MIXED)
    got = layer(x, jnp.asarray(MIXED))
    assert got.dtype == jnp.bfloat16 and layer.scale.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.02 * np.abs(want).max())


def test_a_folded_kernel_has_the_kernels_dtype_and_is_summed_in_float32():
    layer = randomised(dense("plain", param_dtype=jnp.bfloat16))
    kernel, a, b = (np.asarray(array[...], np.float32) for array in (layer.kernel, layer.a, layer.b))
    folded = layer.folded_kernel(jnp.int32(2))
    want = jnp.asarray(kernel + layer.scale[...][2] * (a[:, 2] @ b[2])).astype(jnp.bfloat16)
    assert folded.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(folded, np.float32), np.asarray(want, np.float32), rtol=2**-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_accumulate_in_float32(dtype):
    ones = jnp.ones((1, 4096), dtype)
    assert matmul(ones, jnp.ones((4096, 1), dtype)).dtype == jnp.float32
    assert matmul(ones, jnp.ones((4096, 1), dtype).at[0].set(2))[0, 0] == 4097  # bfloat16 has no 4097


@pytest.mark.parametrize("outputs", [(OUTPUTS,), (3, OUTPUTS)])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_a_products_gradients_are_those_of_the_plain_product(outputs, dtype, tolerance):
    rng = np.random.default_rng(0)
    x, kernel, d_y = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((2, 300, INPUTS), (INPUTS, *outputs), (2, 300, *outputs))
    )
    got, pull = jax.vjp(matmul, x.astype(dtype), kernel)
    want, plain_pull = jax.vjp(lambda x, kernel: jnp.tensordot(x, kernel, 1, precision="highest"), x, kernel)
    (d_x, d_kernel), plain = pull(d_y), plain_pull(d_y)
    assert (got.dtype, d_x.dtype, d_kernel.dtype) == (jnp.float32, dtype, jnp.float32)
    for mine, theirs in zip((got, d_x, d_kernel), (want, *plain), strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(mine.astype(jnp.float32) / scale, theirs / scale, atol=tolerance)


def test_a_kernels_gradient_is_accumulated_in_float32():
    """A sum that bfloat16 does not have, of a kernel that is kept in float32."""
    ones = jnp.ones((4097, 1), jnp.bfloat16)
    kernel = jnp.ones((1, 1), jnp.float32)
    assert jax.grad(lambda kernel: matmul(ones, kernel).sum())(kernel)[0, 0] == 4097


@pytest.mark.parametrize("task", [np.int32(1), MIXED])
def test_the_update_of_the_vocabulary_is_never_built(task):
    program = jax.jit(lambda layer, tokens, task: layer(tokens, task)).lower(embed(), TOKENS, task).as_text()
    results = re.findall(r" = .*tensor<([x\d]+)xf32>$", program, re.MULTILINE)
    assert f"{ENTRIES}x{OUTPUTS}" not in results and "2x7x5" in results


@pytest.mark.parametrize("tokens", [6, 40])
def test_few_tokens_and_many_have_the_same_product(monkeypatch, tokens):
    monkeypatch.setattr(products, "platform", lambda: "tpu")
    monkeypatch.setattr(products, "FEW_TOKENS", 20)
    x, z, kernel, rows = (
        np.random.default_rng(i).standard_normal(shape).astype(np.float32)
        for i, shape in enumerate([(2, tokens // 2, 16), (2, tokens // 2, 6), (16, 3, 8), (6, 3, 8)])
    )
    program = jax.jit(products.matmul_with_lora)  # one of its own: the choice is made while tracing
    assert str(jax.make_jaxpr(program)(x, z, kernel, rows)).count("dot_general") == (2 if tokens <= 20 else 1)
    expected = np.einsum("bti,ino->btno", x, kernel) + np.einsum("bti,ino->btno", z, rows)
    np.testing.assert_allclose(program(x, z, kernel, rows), expected, atol=1e-5)

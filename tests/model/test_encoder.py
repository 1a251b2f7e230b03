"""The encoder: a text embeds the same whatever surrounds it; every step is what its name says."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaEmbeddings

from jina_jax import Encoder, ModelConfig, pool
from jina_jax.embed.forward import text_embeddings, token_states
from jina_jax.model.encoder import absolute_positions, token_adapter_ids
from jina_jax.model.gradient_sums import GradientSums
from jina_jax.model.layers import DeferredLayerNorm, LayerNorm, gelu
from jina_jax.model.lora import AdapterParam, AdapterScale
from jina_jax.model.parameters import abstract_variables, from_arrays, unstack_layers, variables
from jina_jax.text import packing

LENGTHS = (9, 3, 30, 1, 16, 5)


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, 16_000, length).tolist() for length in LENGTHS]


def embedded(encoder: Encoder, texts, row_texts, row_length: int, tasks) -> np.ndarray:
    """Embeddings of texts laid out as given: `row_texts` lists the texts of each row."""
    rows = packing.lay_out(texts, packing.BatchPlan(row_texts, (len(row_texts), row_length)), pad_id=1)
    of_rows = np.where(rows.texts < 0, -1, np.asarray(tasks)[rows.texts]).astype(np.int32)
    pooled = np.asarray(text_embeddings(encoder, rows.tokens, rows.segment_ids, rows.positions, of_rows))
    out = np.zeros((len(texts), encoder.config.hidden_size), np.float32)
    packing.scatter(pooled, rows, out)
    return out / np.linalg.norm(out, axis=1, keepdims=True)


@pytest.mark.parametrize("tasks", [(-1,) * 6, (0, -1, 2, 1, 0, 2)], ids=["base", "mixed"])
@pytest.mark.parametrize(
    ("row_texts", "row_length"),
    [
        ([[0], [1], [2], [3], [4], [5]], 96),
        ([[0, 1, 2, 3, 4, 5]], 96),
        ([[5, 3, 1, 0, 4, 2]], 128),
        ([[2, 0], [], [1, 3, 4, 5]], 96),
    ],
    ids=["alone", "packed", "another order", "rows"],
)
def test_a_text_does_not_depend_on_its_row(make_encoder, texts, tasks, row_texts, row_length):
    for position in ({"position_type": "rope"}, {"position_type": "absolute", "max_position_embeddings": 64}):
        encoder = make_encoder(vocab_size=16_000, tasks=("a", "b", "c"), **position)
        alone = [embedded(encoder, [text], [[0]], 32, [task])[0] for text, task in zip(texts, tasks, strict=True)]
        np.testing.assert_allclose(embedded(encoder, texts, row_texts, row_length, tasks), alone, atol=1e-6)


def test_a_neighbours_task_changes_nothing(encoder, texts):
    tasks = [0] * len(texts)
    before = embedded(encoder, texts, [[0, 1, 2, 3, 4, 5]], 96, tasks)
    for neighbour in (-1, 1, 2):
        after = embedded(encoder, texts, [[0, 1, 2, 3, 4, 5]], 96, [0, neighbour, 0, neighbour, 0, 0])
        np.testing.assert_allclose(after[[0, 2, 4, 5]], before[[0, 2, 4, 5]], atol=1e-6)
        assert np.abs(after[[1, 3]] - before[[1, 3]]).max() > 1e-3


def test_one_task_for_the_batch_equals_the_same_task_for_each_text(encoder, texts):
    rows = packing.lay_out(texts, packing.BatchPlan([[0, 1, 2, 3, 4, 5]], (1, 96)), pad_id=1)
    for task in (-1, 0, 2):
        each = token_states(encoder, *rows[:3], np.full(rows.texts.shape, task, np.int32))
        whole = token_states(encoder, *rows[:3], np.int32(task))
        np.testing.assert_allclose(np.asarray(whole)[rows.segment_ids > 0], np.asarray(each)[rows.segment_ids > 0], atol=2e-5)


def test_no_tasks_argument_is_the_base_model(encoder, texts):
    rows = packing.lay_out(texts, packing.BatchPlan([[0, 1, 2, 3, 4, 5]], (1, 96)), pad_id=1)
    none = np.full(rows.texts.shape, -1, np.int32)
    got, want = (token_states(encoder, *rows[:3], tasks) for tasks in (None, none))
    np.testing.assert_allclose(np.asarray(got)[rows.segment_ids > 0], np.asarray(want)[rows.segment_ids > 0], atol=1e-5)


@given(st.lists(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), max_size=5), min_size=3, max_size=3))
def test_positions_of_packed_texts_that_spell_padding_are_pytorchs(rows):
    """Token 1 is the padding id, also of the slots behind the last text."""
    texts = [text for row in rows for text in row]
    numbers = iter(range(len(texts)))
    plan = packing.BatchPlan([[next(numbers) for _ in row] for row in rows], (len(rows), 96))
    batch = packing.lay_out(texts, plan, pad_id=1)
    inputs = [jnp.asarray(array) for array in (batch.tokens, batch.positions)]
    got = np.asarray(absolute_positions(*inputs, ModelConfig(position_type="absolute")))
    for row, slot in zip(*np.nonzero(batch.texts >= 0), strict=True):
        text = torch.tensor([texts[batch.texts[row, slot]]])
        expected = XLMRobertaEmbeddings.create_position_ids_from_input_ids(text, 1)[0]
        assert got[row][batch.segment_ids[row] == slot + 1].tolist() == expected.tolist()
    bert = absolute_positions(*inputs, ModelConfig(position_type="absolute", position_offset=0))
    np.testing.assert_array_equal(bert, batch.positions)


def test_tasks_of_tokens():
    got = token_adapter_ids(jnp.array([[4, -1, 2]]), jnp.array([[1, 1, 2, 3, 3, 0]]))
    assert got.tolist() == [[4, 4, -1, 2, 2, -1]]


@pytest.mark.parametrize(("mean", "tolerance"), [(0, 2e-6), (1, 5e-6), (10, 1e-4)])
def test_one_pass_layer_norm_equals_two_passes_on_wide_rows(mean, tolerance):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((64, 1024)) + mean).astype(np.float32)
    norm = LayerNorm(1024, epsilon=1e-5, param_dtype=jnp.float32)
    norm.scale.set_value(jnp.asarray(rng.uniform(0.5, 1.5, 1024), jnp.float32))
    norm.bias.set_value(jnp.asarray(rng.standard_normal(1024), jnp.float32))
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    scale, bias = np.asarray(norm.scale[...]), np.asarray(norm.bias[...])
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=tolerance)


def test_layer_norm_of_a_constant_row_is_its_bias():
    norm = LayerNorm(16, epsilon=1e-5, param_dtype=jnp.float32)
    np.testing.assert_allclose(norm(jnp.full((1, 16), 1000.1)), np.zeros((1, 16)), atol=1e-2)


@pytest.mark.parametrize(("read", "dtype"), [("once", "float32"), ("twice", "float32"), ("once", "bfloat16")])
def test_the_gradient_of_a_layer_norm_is_torchs(read, dtype):
    rng = np.random.default_rng(2)
    x, d_y = (jnp.asarray(rng.standard_normal((2, 3, 64)), dtype) for _ in range(2))
    scale, bias = rng.uniform(0.5, 1.5, 64).astype(np.float32), rng.standard_normal(64).astype(np.float32)
    weights = [torch.tensor(np.asarray(array, np.float32), requires_grad=True) for array in (x, scale, bias)]
    torch.nn.functional.layer_norm(weights[0], (64,), *weights[1:], 1e-5).backward(torch.tensor(np.asarray(d_y, np.float32)))

    def value(x, scale, bias):
        norm = LayerNorm(64, epsilon=1e-5, param_dtype=jnp.float32)
        norm.scale.set_value(scale)
        norm.bias.set_value(bias)
        normalised = norm.deferred(x)
        y = normalised.value() if read == "once" else 0.25 * normalised.value() + 0.75 * normalised.value()
        return y.astype(dtype)

    d_x, *others = jax.vjp(value, x, jnp.asarray(scale), jnp.asarray(bias))[1](d_y)
    assert d_x.dtype == dtype
    rounding = 2**-8 if dtype == "bfloat16" else 0
    np.testing.assert_allclose(d_x.astype(jnp.float32), weights[0].grad.numpy(), rtol=rounding, atol=1e-5)
    for got, want in zip(others, weights[1:], strict=True):
        np.testing.assert_allclose(got, want.grad.numpy(), atol=1e-5)


def test_what_is_taken_as_it_is_has_its_gradient_as_it_is():
    x, d_y = (jnp.asarray(np.random.default_rng(seed).standard_normal((2, 8)), jnp.float32) for seed in (0, 1))
    y, backward = jax.vjp(lambda x: DeferredLayerNorm.identity(x).value(), x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_allclose(backward(d_y)[0], d_y, rtol=1e-6)


def test_gelu_is_exact_and_never_goes_through_erfc():
    x = np.linspace(-8, 8, 401, dtype=np.float32)
    expected = [0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x.tolist()]
    np.testing.assert_allclose(gelu(jnp.asarray(x)), expected, atol=1e-6)
    lowered = jax.jit(gelu).lower(jnp.asarray(x)).as_text()
    assert "erf" in lowered and "erfc" not in lowered


def test_pool_is_the_mean_of_each_text():
    rng = np.random.default_rng(2)
    states = rng.standard_normal((2, 12, 8)).astype(np.float32)
    segment_ids = np.array([[1, 1, 1, 2, 3, 3, 3, 3, 3, 0, 0, 0], [0] * 12], np.int32)
    got = np.asarray(pool(jnp.asarray(states), jnp.asarray(segment_ids), 4))
    expected = np.zeros((2, 4, 8))
    for text in (1, 2, 3):
        expected[0, text - 1] = states[0, segment_ids[0] == text].astype(np.float64).mean(0)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_unrolled_equals_scanned(encoder, texts):
    rows = packing.lay_out(texts, packing.BatchPlan([[0, 1, 2, 3, 4, 5]], (1, 96)), pad_id=1)
    arrays = {path: variable.get_value() for path, variable in variables(encoder).items()}
    unrolled = from_arrays(replace(encoder.config, unroll=True), arrays, dtype=jnp.float32)
    got, want = (token_states(model, *rows[:3], None) for model in (unrolled, encoder))
    np.testing.assert_allclose(np.asarray(got)[rows.segment_ids > 0], np.asarray(want)[rows.segment_ids > 0], atol=1e-5)


@pytest.mark.parametrize("tasks", [None, np.int32(1), np.array([[0, -1, 2, 1, 0, 2]], np.int32)], ids=["base", "one", "mixed"])
def test_layers_apart_equal_the_stack(encoder, texts, tasks):
    rows = packing.lay_out(texts, packing.BatchPlan([[0, 1, 2, 3, 4, 5]], (1, 96)), pad_id=1)
    got, want = (token_states(model, *rows[:3], tasks) for model in (unstack_layers(encoder), encoder))
    np.testing.assert_allclose(np.asarray(got)[rows.segment_ids > 0], np.asarray(want)[rows.segment_ids > 0], atol=1e-5)


def test_layers_apart_lie_in_the_memory_of_the_stack(encoder):
    apart = unstack_layers(encoder)
    kernels, stack = [layer.up.kernel.get_value() for layer in apart.layers], encoder.layers.up.kernel.get_value()
    begin = stack.unsafe_buffer_pointer()
    assert [kernel.unsafe_buffer_pointer() - begin for kernel in kernels] == [i * kernels[0].nbytes for i in range(len(stack))]


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layers_apart_are_not_copied_before_their_products(make_encoder, dtype):
    encoder = make_encoder(vocab_size=300)
    arrays = {path: variable.get_value().astype(dtype) for path, variable in variables(encoder).items()}
    shape = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    apart = unstack_layers(from_arrays(encoder.config, arrays, dtype=dtype))
    used = text_embeddings.lower(apart, shape, shape, shape, None).compile().memory_analysis().temp_size_in_bytes
    assert used < apart.layers[0].up.kernel.get_value().nbytes


def test_layers_apart_have_no_sums_of_gradients(encoder):
    with pytest.raises(TypeError, match="gradients need them stacked"):
        GradientSums.start(unstack_layers(encoder))


def test_products_are_kept_in_the_compute_dtype_and_nothing_else(make_encoder):
    b, t, d, f = 2, 24, 32, 64
    encoder = make_encoder(hidden_size=d, num_heads=2, num_layers=1, mlp_size=f)
    arrays = {path: variable.get_value() for path, variable in variables(encoder).items()}
    encoder = from_arrays(encoder.config, arrays, dtype=jnp.bfloat16)
    layer, rows = jax.tree.map(lambda parameter: parameter[0], encoder.stacked_layers), jnp.ones((b, t), jnp.int32)

    def kept(remat: str) -> int:
        """Elements of the arrays in bfloat16 that a gradient keeps of a layer."""

        def last(x):
            return encoder.layer_function(rows, rows, None, None, remat)(layer, DeferredLayerNorm.identity(x)).x

        _, pull = jax.vjp(last, jnp.ones((b, t, d), jnp.bfloat16))
        return sum(x.size for x in jax.tree.leaves(pull) if x.ndim >= 3 and x.dtype == jnp.bfloat16)

    # x itself; q, k and v; what attention gives; the sum before the norm; what goes into GELU
    assert kept("except_products") == b * t * (d + 3 * d + d + d + f)
    assert kept("none") > kept("except_products") > kept("except_attention") > kept("full") == b * t * d


def test_gather_is_applied_to_every_layer(encoder, texts):
    rows = packing.lay_out(texts, packing.BatchPlan([[0]], (1, 16)), pad_id=1)
    inputs = [jnp.asarray(array) for array in rows[:3]]
    halved = jax.tree.map(lambda array: array / 2, encoder.layers)
    spread = from_arrays(
        encoder.config,
        {path: variable.get_value() for path, variable in variables(encoder).items()},
        dtype=jnp.float32,
    )
    spread.layers = halved
    got = spread(*inputs, gather=lambda layer: jax.tree.map(lambda array: array * 2, layer))
    np.testing.assert_allclose(np.asarray(got)[0, :9], np.asarray(encoder(*inputs))[0, :9], atol=1e-5)


def products(dtype, make_encoder) -> list[str]:
    """The dot_general operations of a forward pass, as lowered."""
    encoder = make_encoder(vocab_size=300, tasks=("a", "b"))
    arrays = {path: variable.get_value() for path, variable in variables(encoder).items()}
    encoder = from_arrays(encoder.config, arrays, dtype=dtype)
    shape = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    lowered = text_embeddings.lower(encoder, shape, shape, shape, jax.ShapeDtypeStruct((2, packing.max_texts(32)), jnp.int32))
    return [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]


def test_float32_means_float32(make_encoder):
    found = products(jnp.float32, make_encoder)
    assert len(found) > 8
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in found), found


def test_bfloat16_products_accumulate_in_float32(make_encoder):
    found = products(jnp.bfloat16, make_encoder)
    results = [re.search(r"-> tensor<[^>]*x(\w+)>", line) for line in found]
    assert len(found) > 8 and {match[1] for match in results if match} == {"f32"}


def test_bfloat16_agrees_with_float32_on_the_corpus(encoder, tokenizer, corpus):
    texts = tokenizer(corpus[:200:2], truncation=True, max_length=512)["input_ids"]
    arrays = {path: variable.get_value() for path, variable in variables(encoder).items()}
    half = from_arrays(encoder.config, arrays, dtype=jnp.bfloat16)
    for batch in packing.plan_batches([len(text) for text in texts], 8192):
        rows = packing.lay_out(texts, batch, pad_id=1)
        got, want = (np.asarray(text_embeddings(model, *rows[:3], np.int32(1))) for model in (half, encoder))
        held = rows.texts >= 0
        cosine = (got * want).sum(-1)[held] / (np.linalg.norm(got[held], axis=-1) * np.linalg.norm(want[held], axis=-1))
        assert cosine.min() >= 0.999


def test_parameters_of_the_published_size():
    def count(config: ModelConfig) -> int:
        found = abstract_variables(config).values()
        return sum(math.prod(variable.shape) for variable in found if not isinstance(variable, AdapterScale))

    assert count(ModelConfig(pooler=True)) == 559_364_096
    assert count(ModelConfig(pooler=True, tasks=tuple("abcde"))) == 572_310_396


def test_a_model_without_tasks_has_no_adapter_parameters():
    found = abstract_variables(ModelConfig(num_layers=2)).values()
    assert not any(isinstance(variable, AdapterParam | AdapterScale) for variable in found)


TREE_MODE = """
import jax
import jax.numpy as jnp
from flax import nnx
from jina_jax import Encoder, ModelConfig
from jina_jax.adapters import fold_adapter, merge_adapter
from jina_jax.embed.forward import text_embeddings
config = ModelConfig(vocab_size=50, hidden_size=32, num_layers=2, num_heads=2, mlp_size=64, tasks=("a", "b"), pooler=True)
encoder = jax.jit(lambda: Encoder(config, rngs=nnx.Rngs(0)))()
row = jnp.arange(32, dtype=jnp.int32)[None]
segments = row // 16 + 1
print(text_embeddings(encoder, row, segments, row % 16, jnp.array([[1, -1]]))[0, :, :4].tolist())
for model in (fold_adapter(encoder, "a"), merge_adapter(encoder, "a")):
    print(text_embeddings(model, row, segments, row % 16, jnp.int32(0))[0, :, :4].tolist())
"""


def test_nnx_tree_mode_gives_the_same():
    outputs = []
    for mode in ("true", "false"):
        environment = os.environ | {"NNX_GRAPH_MODE": mode, "NNX_GRAPH_UPDATES": mode, "PYTHONPATH": "."}
        done = subprocess.run([sys.executable, "-c", TREE_MODE], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] and len(outputs[0].splitlines()) == 3

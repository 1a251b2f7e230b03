"""Adding, dropping, extracting, merging and folding adapters of a finished model."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jina_jax import Encoder
from jina_jax.embed.forward import token_states
from jina_jax.model.adapters import add_adapter, base_arrays, drop_adapter, extract_adapter, fold_adapter, merge_adapter
from jina_jax.model.parameters import variables


def states(encoder: Encoder, task: int | None) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(4, encoder.config.vocab_size, (2, 16)).astype(np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
    tasks = None if task is None else np.full((2, 1), task, np.int32)
    return np.asarray(token_states(encoder, tokens, np.ones_like(tokens), positions, tasks))


@pytest.fixture(scope="module")
def model(make_encoder) -> Encoder:
    return make_encoder(tasks=("a", "b"), pooler=True)


@pytest.fixture(scope="module")
def separate(make_encoder) -> Encoder:
    return make_encoder(1, tasks=("x",), pooler=True, separate_qkv_adapters=True, lora_rank=6)


def test_a_fresh_adapter_changes_nothing(model):
    grown = add_adapter(model, "new", rank=7, rngs=nnx.Rngs(3), instruction="New: ")
    assert grown.config.tasks == ("a", "b", "new") and grown.config.prompt("new") == "New: "
    np.testing.assert_allclose(states(grown, 2), states(model, None), atol=1e-5)
    for task in (0, 1):
        np.testing.assert_allclose(states(grown, task), states(model, task), atol=1e-5)
    fresh = extract_adapter(grown, "new")
    assert np.abs(fresh["layers.up.a"]).max() > 0 and np.abs(fresh["layers.up.b"]).max() == 0


def test_an_adapter_has_the_scale_it_was_given(model):
    for alpha, scale in ((0.0, 0.0), (3.0, 0.75)):
        grown = add_adapter(model, "new", alpha=alpha, rngs=nnx.Rngs(0))
        np.testing.assert_allclose(extract_adapter(grown, "new")["layers.up.scale"], scale)


def test_no_operation_touches_the_model_it_is_given(model):
    before = {path: np.asarray(variable.get_value()) for path, variable in variables(model).items()}
    add_adapter(model, "new", rngs=nnx.Rngs(0))
    for operation in (drop_adapter, extract_adapter, merge_adapter, fold_adapter):
        operation(model, "a")
    after = variables(model)
    assert model.config.tasks == ("a", "b") and after.keys() == before.keys()
    for path, variable in after.items():
        np.testing.assert_array_equal(variable.get_value(), before[path])


def test_a_fresh_adapter_on_a_model_without_any(make_encoder):
    plain = make_encoder()
    grown = add_adapter(plain, "new", rngs=nnx.Rngs(0))
    np.testing.assert_allclose(states(grown, 0), states(plain, None), atol=1e-5)


def test_an_extracted_adapter_works_on_another_copy_of_its_base(model):
    bare = drop_adapter(drop_adapter(model, "a"), "b")
    assert bare.config.tasks == () and variables(bare).keys() == base_arrays(model).keys()
    again = add_adapter(add_adapter(bare, "b", extract_adapter(model, "b")), "a", extract_adapter(model, "a"))
    np.testing.assert_allclose(states(again, 0), states(model, 1), atol=1e-5)
    np.testing.assert_allclose(states(again, 1), states(model, 0), atol=1e-5)


def test_different_ranks_and_kinds_are_widened_exactly(model, separate):
    """Both orders: the smaller rank and the shared down-projection give way."""
    grown = add_adapter(model, "x", extract_adapter(separate, "x"))
    assert grown.config.lora_rank == 6 and grown.config.separate_qkv_adapters
    for task in (0, 1):
        np.testing.assert_allclose(states(grown, task), states(model, task), atol=1e-5)
    other = add_adapter(separate, "a", extract_adapter(model, "a"))
    np.testing.assert_allclose(states(other, 0), states(separate, 0), atol=1e-5)
    for path, array in extract_adapter(grown, "a").items():
        if path.endswith(".a"):
            assert not np.asarray(array)[..., 4:].any()


def test_dropping_keeps_the_others(model):
    np.testing.assert_allclose(states(drop_adapter(model, "a"), 0), states(model, 1), atol=1e-5)


@pytest.mark.parametrize("task", ["a", "b"])
def test_the_merged_base_is_the_model_with_the_task(model, task):
    merged = merge_adapter(model, task)
    assert merged.config.tasks == ()
    np.testing.assert_allclose(states(merged, None), states(model, model.config.task_index(task)), atol=2e-5)


def test_merging_separate_down_projections(separate):
    np.testing.assert_allclose(states(merge_adapter(separate, "x"), None), states(separate, 0), atol=2e-5)


def test_the_folded_model_is_the_model_with_the_task_and_shares_its_table(model):
    folded = fold_adapter(model, "b")
    np.testing.assert_allclose(states(folded, 0), states(model, 1), atol=2e-5)
    assert folded.tokens.table.get_value() is model.tokens.table.get_value()


def test_folding_in_bfloat16_rounds_once(make_encoder):
    """The update is added in float32.

    Folding differs from exact arithmetic by the rounding of the sum alone.
    """
    encoder = make_encoder(tasks=("a",))
    low = {path: v.get_value().astype(jnp.bfloat16) for path, v in variables(encoder).items() if v.get_value().ndim > 1}
    kernel, a, b = (np.asarray(low[f"layers.up.{name}"], np.float64) for name in ("kernel", "a", "b"))
    encoder.layers.up.kernel.set_value(low["layers.up.kernel"])
    encoder.layers.up.a.set_value(low["layers.up.a"])
    encoder.layers.up.b.set_value(low["layers.up.b"])
    scale = np.asarray(encoder.layers.up.scale[...], np.float64)
    exact = kernel + scale[:, 0, None, None] * np.einsum("lir,lro->lio", a[:, :, 0], b[:, 0])
    got = np.asarray(fold_adapter(encoder, "a").layers.up.kernel[...], np.float64)
    np.testing.assert_allclose(got, exact, rtol=2**-8, atol=1e-6)


def test_errors_say_what_is_valid(model, make_encoder):
    with pytest.raises(ValueError, match="has a task 'a' already"):
        add_adapter(model, "a", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="needs rngs"):
        add_adapter(model, "c")
    for operation in (drop_adapter, extract_adapter, merge_adapter, fold_adapter):
        with pytest.raises(ValueError, match=r"unknown task 'c'.*\['a', 'b'\]"):
            operation(model, "c")
    with pytest.raises(ValueError, match="not an adapter of this model.*pooler"):
        add_adapter(make_encoder(), "a", extract_adapter(model, "a"))
    for size in ({"rank": 0}, {"rank": -1}):
        with pytest.raises(ValueError, match="lora_rank must be at least 1"):
            add_adapter(model, "c", rngs=nnx.Rngs(0), **size)
    for bare in (model, make_encoder()):
        with pytest.raises(ValueError, match="not an adapter of this model.*layers.qkv.a"):
            add_adapter(bare, "c", {})
    with pytest.raises(ValueError, match="layers.(up|down)"):
        add_adapter(model, "c", extract_adapter(make_encoder(tasks=("c",), pooler=True, mlp_size=96), "c"))

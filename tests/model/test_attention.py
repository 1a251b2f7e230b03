"""Attention within segments: all forms of XLA against a float64 twin of one text at a time."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jina_jax.model.attention import LONGEST_PLAIN_ROW, attention, gpu_attention, plain_attention, rowwise_attention
from jina_jax.model.chunked_attention import KEYS_PER_BLOCK, blockwise_attention
from jina_jax.model.rotary import RotaryTables, rotary_tables, rotate

HEADS, HEAD_DIM = 2, 8
THETA = 20_000.0
FORMS = [plain_attention, rowwise_attention, blockwise_attention]


def chunked_elsewhere(qkv, segment_ids, tables, *, num_heads):
    """`blockwise_attention` on anything but a CPU: all rows and heads at the same time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jina_jax.model.attention.platform", lambda: "tpu")
        return blockwise_attention(qkv, segment_ids, tables, num_heads=num_heads)


LENGTHS = [1, 7, KEYS_PER_BLOCK // 2 + 1, KEYS_PER_BLOCK, 5 * KEYS_PER_BLOCK // 2 + 1]


def case(t: int, *, b: int = 2, texts: int = 5, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """qkv [3, b, t, d], segment_ids and positions [b, t] of rows of several texts and padding."""
    rng = np.random.default_rng(seed)
    segment_ids, positions = np.zeros((b, t), np.int32), np.zeros((b, t), np.int32)
    for row in range(b):
        cuts = np.sort(rng.integers(0, t + 1, texts))
        for text, (start, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=False)):
            segment_ids[row, start:end], positions[row, start:end] = text + 1, np.arange(end - start)
    qkv = rng.standard_normal((3, b, t, HEADS * HEAD_DIM)).astype(np.float32)
    return jnp.asarray(qkv), jnp.asarray(segment_ids), jnp.asarray(positions)


def rotated(x: np.ndarray, positions: np.ndarray, theta: float = THETA) -> np.ndarray:
    """Rotates [t, n, h]: each pair (i, i + h / 2), as a complex number, by p / theta^(2 i / h)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] / theta ** (np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], -1)


def twin(qkv: jax.Array, segment_ids: jax.Array, positions: jax.Array | None, theta: float = THETA) -> np.ndarray:
    """Attention in float64, one text and one head at a time. `positions=None`: without rotation."""
    q, k, v = np.asarray(qkv, np.float64).reshape(3, *segment_ids.shape, HEADS, HEAD_DIM)
    out = np.zeros_like(q)
    for row, ids in enumerate(np.asarray(segment_ids)):
        for text in np.unique(ids):
            own = ids == text
            if positions is None:
                q_own, k_own = q[row, own], k[row, own]
            else:
                where = np.asarray(positions)[row, own]
                q_own, k_own = rotated(q[row, own], where, theta), rotated(k[row, own], where, theta)
            for head in range(HEADS):
                scores = q_own[:, head] @ k_own[:, head].T / HEAD_DIM**0.5
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out[row, own, head] = weights / weights.sum(-1, keepdims=True) @ v[row, own, head]
    return out.reshape(qkv.shape[1:])


def tables_of(positions: jax.Array) -> RotaryTables:
    return rotary_tables(positions, HEAD_DIM, THETA)


@partial(jax.jit, static_argnums=0)
def computed(form, qkv, segment_ids, tables):
    return form(qkv, segment_ids, tables, num_heads=HEADS)


@partial(jax.jit, static_argnums=0)
def value_and_gradients(form, weights, qkv, segment_ids, tables):
    """The result of a form, and the gradients of its weighted sum by qkv and by the tables."""

    def weighted(qkv, tables):
        out = form(qkv, segment_ids, tables, num_heads=HEADS)
        return (out * weights).sum(), out

    gradients, out = jax.grad(weighted, (0, 1), has_aux=True)(qkv, tables)
    return out, *gradients


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("t", LENGTHS)
def test_attention_is_softmax_within_each_text(form, t):
    qkv, segment_ids, positions = case(t)
    got = computed(form, qkv, segment_ids, tables_of(positions))
    np.testing.assert_allclose(got, twin(qkv, segment_ids, positions), atol=1e-5)


@pytest.mark.parametrize(
    ("t", "texts"),
    [(5 * KEYS_PER_BLOCK // 2 + 1, texts) for texts in (1, 40, 300)]
    + [(1, 1), (KEYS_PER_BLOCK, 5), (6 * KEYS_PER_BLOCK + 1, 3)],  # the last: larger blocks of queries
)
@pytest.mark.parametrize("form", [rowwise_attention, blockwise_attention, chunked_elsewhere])
def test_every_form_equals_plain_forward_and_backward(form, t, texts):
    qkv, segment_ids, positions = case(t, texts=texts)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(qkv.shape[1:]), jnp.float32)
    plain, others = (
        jax.tree.leaves(value_and_gradients(each, weights, qkv, segment_ids, tables_of(positions)))
        for each in (plain_attention, form)
    )
    for got, want in zip(others, plain, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * max(1, float(jnp.abs(want).max())))


@pytest.mark.parametrize("form", FORMS)
def test_extreme_scores_stay_finite_and_right(form):
    qkv, segment_ids, _ = case(KEYS_PER_BLOCK + 40)
    q, k, v = qkv
    direction = jnp.where(jnp.arange(HEADS * HEAD_DIM) % HEAD_DIM == 0, 200.0 * HEAD_DIM**0.5, 0.0)
    signs = jnp.sign(k[..., :1])
    qkv = jnp.stack([jnp.broadcast_to(direction, q.shape), signs * jnp.ones_like(k), v])  # scores of +200 and -200

    out, gradient, _ = value_and_gradients(form, jnp.ones_like(q), qkv, segment_ids, None)
    np.testing.assert_allclose(out, twin(qkv, segment_ids, None), atol=1e-5)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_the_gradient_add_up_to_one_however_large_the_scores(form):
    qkv, segment_ids, _ = case(KEYS_PER_BLOCK + 40)
    q, k, v = qkv
    large = jnp.stack([300 + 0 * q, 300 + k / 300, v])  # scores of about 250,000: next to them float32 loses the log of a sum
    _, gradient, _ = value_and_gradients(form, jnp.ones_like(q), large, segment_ids, None)
    np.testing.assert_allclose(gradient[2].sum(1), KEYS_PER_BLOCK + 40, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("t", [5, KEYS_PER_BLOCK + 1])
def test_empty_rows_give_numbers_and_gradients(form, t):
    qkv, segment_ids, positions = case(t, texts=0)
    assert not segment_ids.any()
    results = value_and_gradients(form, jnp.ones_like(qkv[0]), qkv, segment_ids, tables_of(positions))
    assert all(jnp.isfinite(array).all() for array in jax.tree.leaves(results))


@pytest.mark.parametrize("form", FORMS)
def test_a_text_is_blind_to_its_neighbours_and_to_padding(form):
    qkv, segment_ids, positions = case(KEYS_PER_BLOCK + 100)
    own = (segment_ids == 2)[..., None]
    disturbed = jnp.where(own, qkv, 3 * qkv[..., ::-1] + 1)
    before, after = (computed(form, x, segment_ids, tables_of(positions)) for x in (qkv, disturbed))
    assert jnp.array_equal(jnp.where(own, before, 0), jnp.where(own, after, 0)) and own.any()


@pytest.mark.parametrize("form", [blockwise_attention, chunked_elsewhere, partial(gpu_attention, interpret=True)])
def test_blocks_without_a_text_in_common_are_not_even_read(form):
    segment_ids = jnp.repeat(jnp.array([[1, 2]]), KEYS_PER_BLOCK, axis=1)
    qkv = (
        jnp.ones((3, 1, 2 * KEYS_PER_BLOCK, HEADS * 16)).at[:, :, KEYS_PER_BLOCK:].set(jnp.nan)
    )  # no weight makes up for it: 0 * nan is nan
    out = form(qkv, segment_ids, None, num_heads=HEADS)
    assert (out[:, :KEYS_PER_BLOCK] == 1).all() and jnp.isnan(out[:, KEYS_PER_BLOCK:]).all()


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_close_and_stays_bfloat16(form):
    qkv, segment_ids, positions = case(KEYS_PER_BLOCK + 1)
    qkv = qkv.astype(jnp.bfloat16)
    out = computed(form, qkv, segment_ids, tables_of(positions))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), twin(qkv, segment_ids, positions), atol=0.03)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_close_whether_the_cpu_multiplies_it_or_not(native, monkeypatch):
    monkeypatch.setattr("jina_jax.model.chunked_attention.cpu_multiplies_bfloat16", lambda: native)
    qkv, segment_ids, positions = case(KEYS_PER_BLOCK + 1)
    qkv, tables = qkv.astype(jnp.bfloat16), tables_of(positions)
    program = jax.jit(partial(blockwise_attention, num_heads=HEADS)).lower(qkv, segment_ids, tables).as_text()
    operands = re.findall(r"dot_general.*: \(tensor<[\dx]+x(\w+)>, tensor<[\dx]+x(\w+)>\)", program)
    assert set(operands) == {("bf16", "bf16") if native else ("f32", "f32")}
    out = blockwise_attention(qkv, segment_ids, tables, num_heads=HEADS)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), twin(qkv, segment_ids, positions), atol=0.03)


@pytest.mark.parametrize("t", [LONGEST_PLAIN_ROW, LONGEST_PLAIN_ROW + 1])
def test_attention_is_the_same_on_both_sides_of_its_choice(t):
    qkv, segment_ids, positions = case(t, b=1, texts=9)
    got = computed(attention, qkv, segment_ids, tables_of(positions))
    np.testing.assert_allclose(got, twin(qkv, segment_ids, positions), atol=1e-5)


def test_a_cpu_computes_rows_with_many_scores_one_by_one(monkeypatch):
    qkv, segment_ids, positions = case(64)
    form = partial(attention, segment_ids=segment_ids, tables=tables_of(positions), num_heads=HEADS)
    assert "while" not in jax.jit(form).lower(qkv).as_text()
    monkeypatch.setattr("jina_jax.model.attention.MOST_PLAIN_SCORES", HEADS * 64**2 - 1)
    one_by_one = jax.jit(lambda qkv: form(qkv))
    assert "while" in one_by_one.lower(qkv).as_text()
    np.testing.assert_allclose(one_by_one(qkv), twin(qkv, segment_ids, positions), atol=1e-5)


def compiled(t: int, backward: bool):
    qkv, segment_ids, positions = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case(t, b=1))

    def forward(qkv, segment_ids, positions):
        return attention(qkv, segment_ids, tables_of(positions), num_heads=HEADS)

    def gradient(qkv, segment_ids, positions):
        return jax.grad(lambda qkv: jnp.square(forward(qkv, segment_ids, positions)).sum())(qkv)

    return jax.jit(gradient if backward else forward).lower(qkv, segment_ids, positions).compile()


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("backward", [False, True])
def test_memory_of_long_rows_is_linear(backward):
    t = 4 * LONGEST_PLAIN_ROW
    once, twice = compiled(t, backward), compiled(2 * t, backward)
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (once, twice)]
    assert 0 < sizes[1] < 2.2 * sizes[0]
    assert not re.search(rf"\b{2 * t},(\d+,)*{2 * t}\b", twice.as_text())


# ---- rotary positions ----


@pytest.mark.parametrize("theta", [10_000.0, 20_000.0])
def test_rotation_equals_complex_multiplication(theta):
    positions = np.array([[0, 1, 2, 255, 256, 257, 8193]], np.int32)
    x = np.random.default_rng(0).standard_normal((1, positions.size, HEADS, HEAD_DIM)).astype(np.float32)
    got = rotate(jnp.asarray(x), rotary_tables(jnp.asarray(positions), HEAD_DIM, theta))
    error = np.abs(np.asarray(got[0]) - rotated(x[0].astype(np.float64), positions[0], theta)).max((1, 2))
    assert (error < 1e-6 + 1e-6 * positions[0]).all(), error  # an angle in float32 is as exact as its position is small


def test_scores_depend_on_distance_alone():
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, HEAD_DIM)).astype(np.float32)

    def score(at: int, other: int) -> float:
        turned = [rotate(jnp.asarray(x), tables_of(jnp.full((1, 1), where, jnp.int32))) for x, where in ((q, at), (k, other))]
        return float((turned[0] * turned[1]).sum())

    assert score(3, 10) == pytest.approx(score(503, 510), abs=1e-3)
    assert score(3, 10) != pytest.approx(score(3, 11), abs=1e-3)


def test_without_tables_nothing_turns():
    x = jnp.ones((1, 2, HEADS, HEAD_DIM))
    assert rotate(x, None) is x


def test_bfloat16_still_tells_neighbouring_positions_apart():
    tables = tables_of(jnp.array([[256, 257]], jnp.int32))
    assert tables.cos.dtype == jnp.float32
    turned = rotate(jnp.ones((1, 2, HEADS, HEAD_DIM), jnp.bfloat16), tables)
    assert turned.dtype == jnp.bfloat16 and float(jnp.abs(turned[0, 0] - turned[0, 1]).max()) > 0.5

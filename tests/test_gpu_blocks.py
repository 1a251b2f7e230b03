"""The attention kernel for GPUs: interpreted, against the plain form; and lowered for CUDA, which needs no GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jina_jax.attention import gpu_attention
from jina_jax.kernels.blocks import visits
from jina_jax.kernels.gpu_blocks import KEYS, QUERIES
from kernel_cases import assert_as_plain, huge_in, projection, repeated, signed_logits, tables_of, texts, traced

kernel = partial(gpu_attention, interpret=True)

ROWS = {
    "several texts and padding": texts(100, 1, 130, 30, 20, t=400),
    "one text": texts(256, t=256),
    "texts of one token": texts(*[1] * 256, t=256),
    "padding alone": texts(t=128),
    "short and odd": texts(3, 20, t=31),
    "shorter than a product": texts(3, t=5),
    "alternating segments": repeated(1, 65, 129, t=256),
    "any int32": repeated(0, -1, 2**31 - 1, -(2**31), 2**30, 1, t=256),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_equal_the_plain_form(name):
    segments = ROWS[name]
    assert_as_plain(kernel, projection(*segments.shape), segments, tables_of(segments))


def test_every_row_and_every_head_is_its_own():
    segments = jnp.concatenate([texts(128, t=128), texts(t=128), texts(40, 1, 60, 7, t=128)])
    assert_as_plain(kernel, projection(3, 128, n=3), segments, tables_of(segments))


def test_bfloat16_without_rotation():
    segments = ROWS["several texts and padding"]
    assert_as_plain(kernel, projection(*segments.shape, dtype=jnp.bfloat16), segments, None, atol=0.02)


@pytest.mark.parametrize("size", [200.0, 3e4])
def test_logits_of_any_size(size):
    segments = texts(40, 1, 30, 30, t=128)
    out, gradient = assert_as_plain(kernel, signed_logits(segments, size), segments, None)
    assert jnp.isfinite(out).all() and jnp.isfinite(gradient).all()


def test_foreign_logits_do_not_leak_however_large():
    segments, qkv = texts(64, 64, t=128), projection(1, 128)
    before, after = (kernel(x, segments, None, num_heads=2) for x in (qkv, huge_in(2, qkv, segments)))
    assert jnp.array_equal(before[:, :64], after[:, :64])
    assert not jnp.array_equal(before[:, 64:], after[:, 64:])


def test_padding_without_an_incoming_gradient_gets_none():
    segments = ROWS["several texts and padding"]
    padding = (segments == 0)[..., None]
    d_out = jnp.where(padding, 0, projection(*segments.shape, seed=2)[0])
    _, gradient = assert_as_plain(kernel, projection(*segments.shape), segments, tables_of(segments), d_out=d_out)
    assert (jnp.where(padding[None], gradient, 0) == 0).all() and padding.any()


@pytest.mark.parametrize("name", [name for name, segments in ROWS.items() if segments.shape[1] % QUERIES == 0])
@pytest.mark.parametrize(("size", "others"), [(QUERIES, KEYS), (KEYS, KEYS)])
def test_no_block_with_a_text_in_common_is_left_out(name, size, others):
    first, stop = visits(ROWS[name], size, others)
    own, theirs = (np.asarray(ROWS[name]).reshape(-1, n) for n in (size, others))
    for i, block in enumerate(own):
        common = [j for j, other in enumerate(theirs) if np.intersect1d(block, other).size]
        assert first[0, i] <= min(common) and max(common) < stop[0, i]


def test_of_texts_in_order_only_blocks_with_a_text_in_common_are_visited():
    segments = texts(64, 64, 200, 40, t=512)  # blocks of 64: 1, 2, 3, 3, 3, 3 and 4 and padding, padding, padding
    first, stop = visits(segments, 64, 64)
    assert first[0].tolist() == [0, 1, 2, 2, 2, 2, 5, 5]
    assert stop[0].tolist() == [1, 2, 6, 6, 6, 8, 8, 8]


def test_gpu_programs_use_the_kernel_where_it_serves():
    half = projection(1, 128, dtype=jnp.bfloat16)
    assert traced("gpu", half, 2).count("name=attention_") == 3  # forward, and the gradients of queries and of keys
    assert "pallas_call" not in traced("gpu", projection(1, 128), 2)  # float32
    assert "pallas_call" not in traced("gpu", half, 16)  # heads of 8


def test_the_kernels_lower_for_cuda():
    qkv, segments = projection(2, 400, dtype=jnp.bfloat16), jnp.zeros((2, 400), jnp.int32)
    gradient = jax.grad(lambda qkv: gpu_attention(qkv, segments, None, num_heads=2).astype(jnp.float32).sum())
    lowered = jax.jit(gradient).trace(qkv).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("custom_call @__gpu$xla.gpu.triton") == 3

"""The TPU kernel of longer rows: interpreted, in small blocks, against the plain form.

It is compiled where libtpu is installed.
"""

from functools import partial

import jax.numpy as jnp
import pytest

from helpers.kernel_cases import (
    assert_as_plain,
    huge_in,
    kernels_compiled,
    needs_libtpu,
    projection,
    repeated,
    signed_logits,
    tables_of,
    texts,
    traced,
    value_and_gradient,
)
from jina_jax.model.attention import LONGEST_PLAIN_ROW
from jina_jax.model.kernels.tpu import HEAD_DIM
from jina_jax.model.kernels.tpu_long import tpu_flash_attention
from jina_jax.model.rotary import RotaryTables

T = 600
kernel = partial(tpu_flash_attention, block=128, interpret=True)  # 600 tokens are four blocks and most of a fifth

UNTURNED = RotaryTables(jnp.ones((1, T, HEAD_DIM // 2)), jnp.zeros((1, T, HEAD_DIM // 2)))
"""No rotation, in the program that all of the float32 tests share: it takes seconds to compile."""

ROWS = {
    "one text": texts(T, t=T),
    "several texts and padding": texts(100, 1, 27, 300, 1, t=T),
    "texts that begin and end with a block": texts(128, 256, 128, t=T),
    "texts of one token": texts(*[1] * T, t=T),
    "padding alone": texts(t=T),
    "alternating segments": repeated(1, 65, 129, t=T),
    "any int32": repeated(0, -1, 2**31 - 1, -(2**31), 2**30, 1, t=T),
    "a block of one segment between two of another": repeated(*[7] * 128, *[-7] * 128, t=T),
    "segments from high to low": -texts(*[50] * 12, t=T),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_equal_the_plain_form(name):
    segment_ids = ROWS[name]
    assert_as_plain(kernel, projection(1, T), segment_ids, tables_of(segment_ids))


def test_bfloat16_rows_and_heads_without_rotation():
    """Every row and every head is its own; here the number of blocks is even."""
    t = 400
    segment_ids = jnp.concatenate([texts(t, t=t), texts(t=t), texts(100, 1, 27, 200, t=t)])
    out, gradient = assert_as_plain(kernel, projection(3, t, n=4, dtype=jnp.bfloat16), segment_ids, None, atol=0.02)
    assert out.dtype == gradient.dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("t", [1, 128, 257, 512])
def test_rows_of_any_number_of_blocks(t):
    segment_ids = texts(t // 2, t // 3, t=t)
    for tables in (None, tables_of(segment_ids)):
        assert_as_plain(kernel, projection(1, t), segment_ids, tables)


@pytest.mark.parametrize("size", [200.0, 3e4])
def test_logits_of_any_size(size):
    """Keys of +size and -size in every text; in the third only -size, which take all weight."""
    segment_ids = texts(40, 1, 300, 150, t=T)
    out, gradient = assert_as_plain(kernel, signed_logits(segment_ids, size), segment_ids, UNTURNED)
    assert jnp.isfinite(out).all() and jnp.isfinite(gradient).all()


def test_the_largest_logit_comes_last():
    """Each block has a higher maximum than the one before, and all weight moves to it."""
    segment_ids = texts(T, t=T)
    q, k, v = signed_logits(segment_ids, 1.0)
    rising = jnp.arange(T, dtype=jnp.float32)[None, :, None] * jnp.abs(k)
    assert_as_plain(kernel, jnp.stack([q, rising, v]), segment_ids, UNTURNED)


def test_foreign_logits_do_not_leak_however_large():
    segment_ids, qkv = texts(200, 400, t=T), projection(1, T)
    before, _ = value_and_gradient(kernel, qkv, segment_ids, UNTURNED, qkv[0], 2)
    for segment, own in [(2, slice(0, 200)), (1, slice(200, T))]:  # foreign blocks behind, foreign blocks before
        after, _ = value_and_gradient(kernel, huge_in(segment, qkv, segment_ids), segment_ids, UNTURNED, qkv[0], 2)
        assert jnp.array_equal(before[:, own], after[:, own])
        assert not jnp.array_equal(before, after)


def test_padding_without_an_incoming_gradient_gets_none():
    segment_ids = ROWS["several texts and padding"]
    padding = (segment_ids == 0)[..., None]
    d_out = jnp.where(padding, 0, projection(1, T, seed=2)[0])
    _, gradient = assert_as_plain(kernel, projection(1, T), segment_ids, tables_of(segment_ids), d_out=d_out)
    assert (jnp.where(padding[None], gradient, 0) == 0).all() and padding.any()
    assert (jnp.where(padding[None], 1, gradient) != 0).any(-1).all()


@pytest.mark.slow
@pytest.mark.parametrize("t", [1025, 1280, 2048])  # of 384, 640 and 512
def test_blocks_of_their_own_size(t):
    segment_ids = texts(t // 2, 1, t // 3, t=t)
    assert_as_plain(partial(tpu_flash_attention, interpret=True), projection(1, t), segment_ids, tables_of(segment_ids))


def test_what_the_kernel_does_not_take_is_an_error():
    segment_ids = texts(5, t=32)
    for qkv, n in [(projection(1, 32), 4), (projection(1, 32, n=3), 3), (projection(1, 32, dtype=jnp.float16), 2)]:
        with pytest.raises(ValueError, match="even number of heads of 64"):
            tpu_flash_attention(qkv, segment_ids, None, num_heads=n)
    for dtype, longest in ((jnp.float32, 8192), (jnp.bfloat16, 16_384)):
        qkv, segment_ids = jnp.zeros((3, 1, longest + 1, 128), dtype), jnp.zeros((1, longest + 1), jnp.int32)
        with pytest.raises(ValueError, match="up to 16,384 tokens in bfloat16 or 8,192 in float32"):
            tpu_flash_attention(qkv, segment_ids, None, num_heads=2)


def test_tpu_programs_use_the_kernel_where_it_serves():
    t = LONGEST_PLAIN_ROW + 1
    program = traced("TPU v5 lite", projection(1, t), 2)
    assert program.count("pallas_call") == program.count("name=long_row_attention") == 2  # forward and backward
    assert "pallas_call" not in traced("TPU v5 lite", projection(1, t), 4)  # heads of 32
    assert "pallas_call" not in traced("TPU v5 lite", projection(1, 8193), 2)
    for kind in ("TPU v4", "cpu"):
        assert "pallas_call" not in traced(kind, projection(1, t), 2)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1", "tpu7x:2x2x1"])
def test_long_rows_compile_for_tpus(topology):
    rows = [("bfloat16", t) for t in (1025, 2048, 8192, 16_384)] + [("float32", 8192)]
    assert kernels_compiled(topology, rows) == dict.fromkeys(rows, 2)  # one forward, one backward

"""The TPU kernel of rows of up to 1,024 tokens: interpreted, against the plain form.

It is compiled where libtpu is installed.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Jaxpr, jaxprs_in_params

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
)
from jina_jax.model.attention import attention
from jina_jax.model.kernels.tpu_short import LONGEST_ROW, tpu_fused_attention

kernel = partial(tpu_fused_attention, interpret=True)

ROWS = {
    "several texts and padding": texts(40, 1, 60, 7, t=128),
    "one text": texts(128, t=128),
    "texts of one token": texts(*[1] * 128, t=128),
    "padding alone": texts(t=128),
    "short and odd": texts(3, 20, t=31),
    "alternating segments": repeated(1, 65, 129, t=128),
    "any int32": repeated(0, -1, 2**31 - 1, -(2**31), 2**30, 1, t=128),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_equal_the_plain_form(name):
    segment_ids = ROWS[name]
    assert_as_plain(kernel, projection(*segment_ids.shape), segment_ids, tables_of(segment_ids))


def test_three_hundred_texts_in_a_row():
    segment_ids = texts(*[3] * 300, t=1024)
    assert_as_plain(kernel, projection(*segment_ids.shape), segment_ids, tables_of(segment_ids))


def test_every_row_and_every_head_is_its_own():
    segment_ids = jnp.concatenate([ROWS["one text"], ROWS["padding alone"], ROWS["several texts and padding"]])
    assert_as_plain(kernel, projection(3, 128, n=6), segment_ids, tables_of(segment_ids))


def test_no_rotation():
    segment_ids = ROWS["several texts and padding"]
    assert_as_plain(kernel, projection(*segment_ids.shape), segment_ids, None)


def test_bfloat16():
    segment_ids = ROWS["several texts and padding"]
    qkv = projection(*segment_ids.shape, dtype=jnp.bfloat16)
    out, gradient = assert_as_plain(kernel, qkv, segment_ids, tables_of(segment_ids), atol=0.02)
    assert out.dtype == gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize("size", [200.0, 3e4])
def test_logits_of_any_size(size):
    """Keys of +size and -size in every text; in some texts only -size, which take all weight."""
    segment_ids = texts(40, 1, 30, 30, t=128)
    out, gradient = assert_as_plain(kernel, signed_logits(segment_ids, size), segment_ids, None)
    assert jnp.isfinite(out).all() and jnp.isfinite(gradient).all()


def test_foreign_logits_do_not_leak_however_large():
    segment_ids, qkv = texts(64, 64, t=128), projection(1, 128)
    before, after = (kernel(x, segment_ids, None, num_heads=2) for x in (qkv, huge_in(2, qkv, segment_ids)))
    assert jnp.array_equal(before[:, :64], after[:, :64])
    assert not jnp.array_equal(before[:, 64:], after[:, 64:])


def test_padding_without_an_incoming_gradient_gets_none():
    segment_ids = ROWS["several texts and padding"]
    padding = (segment_ids == 0)[..., None]
    d_out = jnp.where(padding, 0, projection(1, 128, seed=2)[0])
    _, gradient = assert_as_plain(kernel, projection(1, 128), segment_ids, tables_of(segment_ids), d_out=d_out)
    assert (jnp.where(padding[None], gradient, 0) == 0).all() and padding.any()
    assert (jnp.where(padding[None], 1, gradient) != 0).any(-1).all()


def test_what_the_kernel_does_not_take_is_an_error():
    segment_ids = texts(5, t=32)
    for qkv, n in [(projection(1, 32), 4), (projection(1, 32, n=3), 3), (projection(1, 32, dtype=jnp.float16), 2)]:
        with pytest.raises(ValueError, match="even number of heads of 64"):
            tpu_fused_attention(qkv, segment_ids, None, num_heads=n)
    with pytest.raises(ValueError, match="rows of up to 1024"):
        tpu_fused_attention(projection(1, LONGEST_ROW + 1), texts(5, t=LONGEST_ROW + 1), None, num_heads=2)


def test_tpu_programs_use_the_kernel_where_it_serves():
    program = traced("TPU v5 lite", projection(1, 128), 2)
    assert program.count("pallas_call") == program.count("name=row_attention") == 2  # forward and backward
    assert "pallas_call" not in traced("TPU v5 lite", projection(1, 128), 4)  # heads of 32


@pytest.mark.parametrize(("remat", "runs"), [("none", 1), ("except_products", 1), ("except_attention", 1), ("full", 2)])
def test_a_gradient_runs_the_kernel_again_only_when_nothing_of_a_layer_is_kept(remat, runs, make_encoder, monkeypatch):
    monkeypatch.setattr("jina_jax.model.attention.platform", lambda: "tpu")
    encoder = make_encoder(hidden_size=128, num_heads=2, num_layers=1)
    rows = jnp.ones((1, 128), jnp.int32)
    program = jax.make_jaxpr(jax.grad(lambda encoder: encoder(rows, rows, rows, remat=remat).sum()))(encoder)
    assert list(kernels_needed(program.jaxpr)).count("row_attention") == runs


def kernels_needed(program: Jaxpr) -> Iterator[str]:
    """Names of the kernels whose results the program uses; the compiler leaves out the others."""
    used = {id(x) for equation in program.eqns for x in equation.invars} | {id(x) for x in program.outvars}
    for equation in program.eqns:
        if equation.primitive.name == "pallas_call":
            yield from [equation.params["name"]] * any(id(x) in used for x in equation.outvars)
        else:
            for inner in jaxprs_in_params(equation.params):
                yield from kernels_needed(inner)


def test_cpu_programs_do_not():
    assert "pallas_call" not in traced("cpu", projection(1, 128), 2)
    program = jax.make_jaxpr(lambda qkv: attention(qkv, texts(5, t=128), None, num_heads=2))(projection(1, 128))
    assert "pallas_call" not in str(program)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_rows_compile_for_tpus(topology):
    rows = [("bfloat16", t) for t in (128, 256, 384, 512, 1024)]
    assert kernels_compiled(topology, rows) == dict.fromkeys(rows, 2)  # one forward, one backward

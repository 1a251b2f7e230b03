"""The Pallas kernels: interpreted, against the plain form; and compiled for TPUs where the TPU compiler is installed."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh

from jina_jax.attention import LONGEST_PLAIN_ROW, RotaryTables, attention, plain_attention, rotary_tables
from jina_jax.kernels.rows import HEAD_DIM, LONGEST_ROW, attend_rows

ROOT = Path(__file__).resolve().parents[1]
kernel = partial(attend_rows, interpret=True)


def projection(b: int, t: int, n: int = 2, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((3, b, t, n * HEAD_DIM)), dtype)


def texts(*lengths: int, t: int, first: int = 1) -> jax.Array:
    """Segments [1, t] of texts of these lengths, padding behind them."""
    segments = np.zeros((1, t), np.int32)
    segments[0, : sum(lengths)] = np.repeat(np.arange(first, first + len(lengths)), lengths)
    return jnp.asarray(segments)


def tables_of(segments: jax.Array) -> RotaryTables:
    t = segments.shape[1]
    return rotary_tables(jnp.broadcast_to(jnp.arange(t)[None], segments.shape), HEAD_DIM, 20_000.0)


@partial(jax.jit, static_argnums=(0, 5))
def value_and_gradient(form, qkv, segments, tables, d_out, n):
    """The result, and the gradient of qkv for a gradient `d_out` of the result."""
    out, backward = jax.vjp(lambda qkv: form(qkv, segments, tables, num_heads=n), qkv)
    return out, *backward(d_out.astype(out.dtype))


def assert_as_plain(qkv, segments, tables, *, d_out=None, atol=1e-5):
    if d_out is None:
        d_out = jnp.asarray(np.random.default_rng(1).standard_normal(qkv.shape[1:]), jnp.float32)
    n = qkv.shape[-1] // HEAD_DIM
    got, want = (value_and_gradient(form, qkv, segments, tables, d_out, n) for form in (kernel, plain_attention))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, atol=atol * max(1, np.abs(y).max()))
    return got


ROWS = {
    "several texts and padding": texts(40, 1, 60, 7, t=128),
    "one text": texts(128, t=128),
    "texts of one token": texts(*[1] * 128, t=128),
    "padding alone": texts(t=128),
    "short and odd": texts(3, 20, t=31),
    "alternating segments": jnp.asarray(np.resize([1, 65, 129], (1, 128)), jnp.int32),
    "any int32": jnp.asarray(np.resize([0, -1, 2**31 - 1, -(2**31), 2**30, 1], (1, 128)), jnp.int32),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_equal_the_plain_form(name):
    segments = ROWS[name]
    assert_as_plain(projection(*segments.shape), segments, tables_of(segments))


def test_three_hundred_texts_in_a_row():
    segments = texts(*[3] * 300, t=1024)
    assert_as_plain(projection(*segments.shape), segments, tables_of(segments))


def test_every_row_and_every_head_is_its_own():
    segments = jnp.concatenate([ROWS["one text"], ROWS["padding alone"], ROWS["several texts and padding"]])
    assert_as_plain(projection(3, 128, n=6), segments, tables_of(segments))


def test_no_rotation():
    segments = ROWS["several texts and padding"]
    assert_as_plain(projection(*segments.shape), segments, None)


def test_bfloat16():
    segments = ROWS["several texts and padding"]
    out, gradient = assert_as_plain(projection(*segments.shape, dtype=jnp.bfloat16), segments, tables_of(segments), atol=0.02)
    assert out.dtype == gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize("size", [200.0, 3e4])
def test_logits_of_any_size(size):
    """Keys of +size and -size in every text; in some texts only -size, with all the weight that there is."""
    segments = texts(40, 1, 30, 30, t=128)
    _, _, v = projection(*segments.shape)
    sign = jnp.where((jnp.arange(128) % 3 == 0) & (segments[0] != 3), 1.0, -1.0)
    axis = jnp.zeros(2 * HEAD_DIM).at[jnp.array([0, HEAD_DIM])].set(1.0)
    q = jnp.broadcast_to(axis * size * HEAD_DIM**0.5, v.shape)
    k = sign[None, :, None] * axis[None, None]
    out, gradient = assert_as_plain(jnp.stack([q, k, v]), segments, None)
    assert jnp.isfinite(out).all() and jnp.isfinite(gradient).all()


def test_foreign_logits_do_not_leak_however_large():
    segments = texts(64, 64, t=128)
    qkv = projection(1, 128)
    q, k, v = qkv
    second = (segments == 2)[..., None]
    huge = jnp.stack([q, jnp.where(second, 1e6 * k, k), jnp.where(second, 1e6 * v, v)])
    before, after = (kernel(x, segments, None, num_heads=2) for x in (qkv, huge))
    assert jnp.array_equal(before[:, :64], after[:, :64])
    assert not jnp.array_equal(before[:, 64:], after[:, 64:])


def test_padding_without_an_incoming_gradient_gets_none():
    segments = ROWS["several texts and padding"]
    padding = (segments == 0)[..., None]
    d_out = jnp.where(padding, 0, projection(1, 128, seed=2)[0])
    _, gradient = assert_as_plain(projection(1, 128), segments, tables_of(segments), d_out=d_out)
    assert (jnp.where(padding[None], gradient, 0) == 0).all() and padding.any()
    assert (jnp.where(padding[None], 1, gradient) != 0).any(-1).all()


def test_what_the_kernel_does_not_take_is_an_error():
    segments = texts(5, t=32)
    for qkv, n in [(projection(1, 32), 4), (projection(1, 32, n=3), 3), (projection(1, 32, dtype=jnp.float16), 2)]:
        with pytest.raises(ValueError, match="even number of heads of 64"):
            attend_rows(qkv, segments, None, num_heads=n)
    with pytest.raises(ValueError, match="rows of up to 1024"):
        attend_rows(projection(1, LONGEST_ROW + 1), texts(5, t=LONGEST_ROW + 1), None, num_heads=2)


# ---- the choice of a form


def traced(platform: str, qkv: jax.Array, n: int) -> str:
    """The program of `attention` and its gradient, traced for a mesh of such devices."""
    kind = {"tpu": "TPU v5 lite", "cpu": "cpu"}[platform]
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    mesh = AbstractMesh((1,), ("data",), abstract_device=device)
    segments = jnp.zeros(qkv.shape[1:3], jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        return str(jax.make_jaxpr(jax.grad(lambda qkv: attention(qkv, segments, None, num_heads=n).sum()))(qkv))


def test_tpu_programs_use_the_kernel_where_it_serves():
    assert traced("tpu", projection(1, 128), 2).count("pallas_call") == 2  # forward and backward
    assert "pallas_call" not in traced("tpu", projection(1, 128), 4)  # heads of 32
    assert "pallas_call" not in traced("tpu", projection(1, LONGEST_PLAIN_ROW + 1), 2)


@pytest.mark.parametrize(("remat", "runs"), [("none", 1), ("except_attention", 1), ("full", 2)])
def test_a_gradient_runs_the_kernel_again_only_when_nothing_of_a_layer_is_kept(remat, runs, make_encoder, monkeypatch):
    monkeypatch.setattr("jina_jax.attention.platform", lambda: "tpu")
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


# ---- the TPU compiler

COMPILE = """
import sys, jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jina_jax.attention import attention, rotary_tables

mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices)[:1], ("data",))
for t in map(int, sys.argv[2:]):

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    def gradient(qkv, segments):
        tables = rotary_tables(segments, 64, 20_000.0)
        return jax.grad(lambda qkv: attention(qkv, segments, tables, num_heads=16).astype(jnp.float32).sum())(qkv)

    shaped = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))
    text = gradient.lower(shaped((3, 2, t, 1024), jnp.bfloat16), shaped((2, t), jnp.int32)).compile().as_text()
    print(t, text.count('custom_call_target="tpu_custom_call"'))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_rows_compile_for_tpus(topology):
    lengths = [str(t) for t in (128, 256, 384, 512, 1024)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    command = [sys.executable, "-c", COMPILE, topology, *lengths]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{t} 2" for t in lengths]  # one kernel forward, one backward

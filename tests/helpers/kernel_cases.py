"""Cases that every attention kernel must pass, and the comparison with `plain_attention`."""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jina_jax.model.attention import attention, plain_attention
from jina_jax.model.kernels.tpu import HEAD_DIM
from jina_jax.model.rotary import RotaryTables, rotary_tables


def projection(b: int, t: int, n: int = 2, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((3, b, t, n * HEAD_DIM)), dtype)


def texts(*lengths: int, t: int, first: int = 1) -> jax.Array:
    """`segment_ids` [1, t] of texts of these lengths, followed by padding."""
    segment_ids = np.zeros((1, t), np.int32)
    segment_ids[0, : sum(lengths)] = np.repeat(np.arange(first, first + len(lengths)), lengths)
    return jnp.asarray(segment_ids)


def repeated(*ids: int, t: int) -> jax.Array:
    """`segment_ids` [1, t] that repeat these ids in turn."""
    return jnp.asarray(np.resize(np.array(ids, np.int64), (1, t)), jnp.int32)


def tables_of(segment_ids: jax.Array) -> RotaryTables:
    t = segment_ids.shape[1]
    return rotary_tables(jnp.broadcast_to(jnp.arange(t)[None], segment_ids.shape), HEAD_DIM, 20_000.0)


def signed_logits(segment_ids: jax.Array, size: float) -> jax.Array:
    """A projection [3, 1, t, 128] whose logits are +size and -size in every text.

    In the text of segment 3 they are -size alone.
    """
    t = segment_ids.shape[1]
    sign = jnp.where((jnp.arange(t) % 3 == 0) & (segment_ids[0] != 3), 1.0, -1.0)
    axis = jnp.zeros(2 * HEAD_DIM).at[jnp.array([0, HEAD_DIM])].set(1.0)
    v = projection(1, t)[2]
    q = jnp.broadcast_to(axis * size * HEAD_DIM**0.5, v.shape)
    return jnp.stack([q, sign[None, :, None] * axis[None, None], v])


def huge_in(segment: int, qkv: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The projection with the keys and values of one segment multiplied by a million."""
    return qkv.at[1:].mul(jnp.where(segment_ids == segment, 1e6, 1.0)[..., None])


# Without optimisation: these programs compile for longer than they run.
@partial(jax.jit, static_argnums=(0, 5), compiler_options={"xla_backend_optimization_level": 0})
def value_and_gradient(form, qkv, segment_ids, tables, d_out, n):
    """The result of `form`, and the gradient of qkv for a gradient `d_out` of the result."""
    out, backward = jax.vjp(lambda qkv: form(qkv, segment_ids, tables, num_heads=n), qkv)
    return out, *backward(d_out.astype(out.dtype))


def assert_as_plain(kernel, qkv, segment_ids, tables, *, d_out=None, atol=1e-5):
    """Compares result and gradient of a kernel with `plain_attention`'s; returns the kernel's."""
    if d_out is None:
        d_out = jnp.asarray(np.random.default_rng(1).standard_normal(qkv.shape[1:]), jnp.float32)
    n = qkv.shape[-1] // HEAD_DIM
    got, want = (value_and_gradient(form, qkv, segment_ids, tables, d_out, n) for form in (kernel, plain_attention))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, atol=atol * max(1, np.abs(y).max()))
    return got


def traced(kind: str, qkv: jax.Array, n: int) -> str:
    """The program of `attention` and its gradient, traced for a mesh of one device kind.

    Args:
        kind: device kind, such as "cpu" or "TPU v5 lite".
        qkv: the projection to trace with.
        n: heads.
    """
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=kind[:3].lower())
    mesh = AbstractMesh((1,), ("data",), abstract_device=device)
    segment_ids = jnp.zeros(qkv.shape[1:3], jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        return str(jax.make_jaxpr(jax.grad(lambda qkv: attention(qkv, segment_ids, None, num_heads=n).sum()))(qkv))


# ---- the TPU compiler

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler")

COMPILE = """
import sys, jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jina_jax.model.attention import attention
from jina_jax.model.rotary import rotary_tables

mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices)[:1], ("data",))
for dtype, t in (each.split(":") for each in sys.argv[2:]):

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    def gradient(qkv, segments):
        tables = rotary_tables(segments, 64, 20_000.0)
        return jax.grad(lambda qkv: attention(qkv, segments, tables, num_heads=16).astype(jnp.float32).sum())(qkv)

    shaped = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))
    text = gradient.lower(shaped((3, 2, int(t), 1024), dtype), shaped((2, int(t)), jnp.int32)).compile().as_text()
    print(dtype, t, text.count('custom_call_target="tpu_custom_call"'))
"""


def kernels_compiled(topology: str, rows: list[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """Counts of kernels in compiled gradients of `attention` with 16 heads, by (dtype, tokens)."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    command = [sys.executable, "-c", COMPILE, topology, *(f"{dtype}:{t}" for dtype, t in rows)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = (line.split() for line in done.stdout.splitlines())
    return {(dtype, int(t)): int(kernels) for dtype, t, kernels in found}

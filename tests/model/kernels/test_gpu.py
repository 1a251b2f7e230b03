"""The attention kernel for GPUs: interpreted, against the plain form, and lowered for CUDA.

It is compiled for an H100 where XLA's compiler for CUDA is installed. None of it needs a GPU.
"""

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

from helpers.kernel_cases import assert_as_plain, huge_in, projection, repeated, signed_logits, tables_of, texts, traced
from jina_jax.model.attention import gpu_attention
from jina_jax.model.kernels.block_mask import block_ranges
from jina_jax.model.kernels.gpu import KEYS, QUERIES

kernel = partial(gpu_attention, interpret=True)

ROWS = {
    "several texts and padding": texts(100, 1, 130, 30, 20, t=400),
    "one text": texts(256, t=256),
    "texts of one token": texts(*[1] * 256, t=256),
    "padding alone": texts(t=128),
    "short and odd": texts(3, 20, t=31),
    "shorter than a product": texts(3, t=5),
    "alternating segments": repeated(1, 65, 129, t=256),
    "any order": repeated(0, 2**31 - 1, 7, 2**30, 1, t=200),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_equal_the_plain_form(name):
    segment_ids = ROWS[name]
    assert_as_plain(kernel, projection(*segment_ids.shape), segment_ids, tables_of(segment_ids))


def test_every_row_and_every_head_is_its_own():
    segment_ids = jnp.concatenate([texts(128, t=128), texts(t=128), texts(40, 1, 60, 7, t=128)])
    assert_as_plain(kernel, projection(3, 128, n=3), segment_ids, tables_of(segment_ids))


def test_bfloat16_without_rotation():
    segment_ids = ROWS["several texts and padding"]
    assert_as_plain(kernel, projection(*segment_ids.shape, dtype=jnp.bfloat16), segment_ids, None, atol=0.02)


@pytest.mark.parametrize("size", [200.0, 3e4])
def test_logits_of_any_size(size):
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
    d_out = jnp.where(padding, 0, projection(*segment_ids.shape, seed=2)[0])
    _, gradient = assert_as_plain(kernel, projection(*segment_ids.shape), segment_ids, tables_of(segment_ids), d_out=d_out)
    assert (jnp.where(padding[None], gradient, 0) == 0).all() and padding.any()


@pytest.mark.parametrize("name", [name for name, segment_ids in ROWS.items() if segment_ids.shape[1] % QUERIES == 0])
@pytest.mark.parametrize(("size", "others"), [(QUERIES, KEYS), (KEYS, KEYS)])
def test_no_block_with_a_text_in_common_is_left_out(name, size, others):
    first, stop = block_ranges(ROWS[name], size, others)
    own, theirs = (np.asarray(ROWS[name]).reshape(-1, n) for n in (size, others))
    for i, block in enumerate(own):
        common = [j for j, other in enumerate(theirs) if np.intersect1d(block, other).size]
        assert first[0, i] <= min(common) and max(common) < stop[0, i]


def test_of_texts_in_order_only_blocks_with_a_text_in_common_are_visited():
    segment_ids = texts(64, 64, 200, 40, t=512)  # blocks of 64: 1, 2, 3, 3, 3, 3 and 4 and padding, padding, padding
    first, stop = block_ranges(segment_ids, 64, 64)
    assert first[0].tolist() == [0, 1, 2, 2, 2, 2, 5, 5]
    assert stop[0].tolist() == [1, 2, 6, 6, 6, 8, 8, 8]


def test_gpu_programs_use_the_kernel_where_it_serves():
    half = projection(1, 128, dtype=jnp.bfloat16)
    assert traced("gpu", half, 2).count("name=attention_") == 3  # forward, and the gradients of queries and of keys
    assert "pallas_call" not in traced("gpu", projection(1, 128), 2)  # float32
    assert "pallas_call" not in traced("gpu", half, 16)  # heads of 8


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="jax 0.11 lowers Triton kernels for GPUs that are there alone")
def test_the_kernels_lower_for_cuda():
    qkv, segment_ids = projection(2, 400, dtype=jnp.bfloat16), jnp.zeros((2, 400), jnp.int32)
    gradient = jax.grad(lambda qkv: gpu_attention(qkv, segment_ids, None, num_heads=2).astype(jnp.float32).sum())
    lowered = jax.jit(gradient).trace(qkv).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("custom_call @__gpu$xla.gpu.triton") == 3


# ---- the compiler for CUDA

COMPILE = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jina_jax.model.attention import attention
from jina_jax.model.rotary import rotary_tables

H100 = '''
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 85017755648
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  runtime_version: "12.8.0" driver_version: "13.0.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3"
'''
devices = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=H100).devices
mesh = Mesh(np.array(devices), ("data",))

@jax.jit
def gradient(qkv, segments):
    tables = rotary_tables(segments, 64, 20_000.0)
    return jax.grad(lambda qkv: attention(qkv, segments, tables, num_heads=16).astype(jnp.float32).sum())(qkv)

with jax.set_mesh(mesh):
    for t in map(int, sys.argv[1:]):
        shaped = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
        text = gradient.lower(shaped(3, 2, t, 1024, dtype="bfloat16"), shaped(2, t, dtype="int32")).compile().as_text()
        print(t, sum("custom-call(" in line and "pallas_call" in line.split("=")[0] for line in text.splitlines()))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs jax[cuda12]")
def test_rows_compile_for_an_h100():
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", COMPILE, "32", "512", "8320"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["32", "3", "512", "3", "8320", "3"]  # forward, and the gradients of queries and of keys

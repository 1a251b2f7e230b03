"""On eight simulated devices everything is as on one.

Whole runs on meshes are in tests/train/run/test_loop.py.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import ROOT
from helpers.training import free_address
from jina_jax import ModelConfig
from jina_jax.losses import masked_lm
from jina_jax.model.parameters import abstract_variables, from_local_arrays, variables
from jina_jax.parallel.fsdp import pad_vocabulary, unpad_vocabulary
from jina_jax.parallel.mesh import SPLIT, check_divides, make_mesh, specs


@pytest.mark.parametrize("program", ["sharded_losses", "embedder_on_meshes"])
def test_eight_devices_are_one_device(program):
    assert finished(started(8, program)) == "equal\n"


def test_the_device_holds_nothing_but_what_a_step_is_given(tmp_path):
    assert finished(started(2, "model_on_the_host", tmp_path)) == "equal\n"


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_a_restore_takes_little_more_memory_than_its_arrays(tmp_path):
    """From one device to eight, in one process and in two, and back.

    The program compares them bit for bit.
    """
    returned = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}  # glibc would keep what was freed, for later
    one, eight = tmp_path / "one", tmp_path / "eight"
    finished(started(1, "restored_memory", "save", one, 1))
    finished(started(8, "restored_memory", "save", eight, 8))
    job = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
    runs = [
        started(1, "restored_memory", "restore", eight, 1, **returned),
        started(8, "restored_memory", "restore", one, 8, **returned),
        *(started(4, "restored_memory", "restore", one, 8, **returned, **job, JAX_PROCESS_ID=number) for number in "01"),
    ]
    on_one, *split = [float(finished(run)) for run in runs]
    assert 1 < min(split) and max(split) < 1.5, split
    assert 1 < on_one < 1.9  # a device that reads the whole table at once has it three times for a while


def started(devices: int, program: str, *arguments: object, **environment: str) -> subprocess.Popen:
    """A program of tests/subprocesses on so many simulated devices."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    of_jax = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": paths}
    command = [sys.executable, str(ROOT / "tests" / "subprocesses" / f"{program}.py"), *map(str, arguments)]
    environment = os.environ | of_jax | environment
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


def finished(run: subprocess.Popen) -> str:
    """What it printed."""
    out, errors = run.communicate(timeout=500)
    assert run.returncode == 0, errors
    return out


def test_the_large_parameters_are_split_and_nothing_else():
    config = ModelConfig(mlm_head=True, pooler=True, tasks=("a", "b"))
    shapes = {path: variable.shape for path, variable in abstract_variables(config).items()}
    large = {path for path, shape in shapes.items() if np.prod(shape) > 10_000_000}
    assert large == set(SPLIT)
    for path, spec in specs(shapes | {path: 0 for path in shapes}).items():
        assert tuple(spec) == ((None,) * SPLIT[path] + ("fsdp",) if path in SPLIT else ()), path


def test_the_optimizers_state_is_split_as_the_parameters():
    tree = ({"layers.qkv.kernel": 0, "layers.qkv.bias": 0}, [{"tokens.table": 0}], 0)
    kernels, table, count = specs(tree)
    assert tuple(kernels["layers.qkv.kernel"]) == (None, "fsdp") and tuple(kernels["layers.qkv.bias"]) == ()
    assert tuple(table[0]["tokens.table"]) == ("fsdp",) and tuple(count) == ()


def test_a_padded_vocabulary_changes_neither_loss_nor_gradients(make_encoder):
    encoder = make_encoder(mlm_head=True)
    rng, d = np.random.default_rng(0), encoder.config.hidden_size
    states = jnp.asarray(rng.standard_normal((2, 9, d)), jnp.float32)
    labels = jnp.asarray(rng.integers(-1, 300, (2, 9)), jnp.int32)
    arrays = {path: variable.get_value() for path, variable in variables(encoder).items()}

    def loss(changed):
        head = from_local_arrays(encoder.config, arrays | changed, dtype=jnp.float32).mlm_head
        return masked_lm(states, labels, changed["tokens.table"], head, max_masked=18)

    plain = {path: arrays[path] for path in ("tokens.table", "mlm_head.bias")}
    padded = pad_vocabulary(plain)
    assert padded["tokens.table"].shape == (512, d) and padded["mlm_head.bias"].shape == (512,)
    (value, gradients), (want, want_gradients) = (jax.value_and_grad(loss)(given) for given in (padded, plain))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for path, gradient in unpad_vocabulary(gradients, encoder.config).items():
        np.testing.assert_allclose(gradient, want_gradients[path], rtol=1e-5, atol=1e-7, err_msg=path)
        assert not gradients[path][300:].any()
    restored = unpad_vocabulary(padded, encoder.config)
    assert all(np.array_equal(restored[path], x) for path, x in plain.items())


def test_sizes_that_do_not_divide_are_named(unchecked):
    class Six:
        shape = {"fsdp": 6}

    with pytest.raises(
        ValueError, match="fsdp = 6 .* does not divide hidden_size 1024, mlp_size 4096, the padded vocabulary 256"
    ):
        check_divides(ModelConfig(), Six())


def test_a_mesh_of_more_devices_than_there_are():
    with pytest.raises(ValueError, match="mesh 1 x 100 needs 100 devices; there are 1"):
        make_mesh(fsdp=100)

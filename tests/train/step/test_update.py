"""The optimizer and the compiled step, against torch's AdamW and transformers' schedule."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
import torch
from flax import nnx
from transformers import get_linear_schedule_with_warmup

from helpers.training import KINDS, assert_identical, compiled_once, stages, write_datasets
from jina_jax import Encoder
from jina_jax.config import ModelConfig
from jina_jax.model.parameters import from_local_arrays, variables
from jina_jax.parallel.mesh import from_process_local, make_mesh, shard_params
from train.aot.abstract_step import step_arguments
from train.config import DatasetConfig, Stage
from train.data.stream import batch_stream, open_datasets
from train.step import update
from train.step.chips import peak_flops
from train.step.flops import training_flops
from train.step.objectives import objective
from train.step.optimizer import clipped, learning_rate, optimizer
from train.step.trainable_split import ready_to_fold, split_trainable
from train.step.update import all_finite, initial_state, make_step

STAGES = stages({kind: DatasetConfig("not read", kind) for kind in KINDS}, steps=6, warmup_steps=2, weight_decay=0.3)
PLAIN = ("bias", "scale")


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


class Torch:
    """torch.optim.AdamW on a copy of some parameters, as one trains a transformer with it."""

    def __init__(self, stage: Stage, parameters: dict):
        self.stage = stage
        self.parameters = {path: torch.nn.Parameter(torch.tensor(np.asarray(x))) for path, x in parameters.items()}
        plain = [x for path, x in self.parameters.items() if path.endswith(PLAIN)]
        decayed = [x for path, x in self.parameters.items() if not path.endswith(PLAIN)]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": stage.weight_decay}]
        self.adam = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas, eps=stage.epsilon)
        self.schedule = get_linear_schedule_with_warmup(self.adam, stage.warmup_steps, stage.steps)
        self.adam.step()  # of nothing: the schedule begins at 0, which would lose an update
        self.schedule.step()

    def step(self, gradients: dict) -> float:
        """Returns the norm before clipping."""
        for path, x in self.parameters.items():
            x.grad = torch.tensor(np.asarray(gradients[path]))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.stage.clip_norm)
        self.adam.step()
        self.schedule.step()
        return norm.item()

    def assert_has(self, parameters: dict, tolerance: float = 1e-5) -> None:
        for path, x in self.parameters.items():
            want = x.detach().numpy()
            np.testing.assert_allclose(parameters[path], want, rtol=tolerance, atol=tolerance, err_msg=path)


def test_the_rate_rises_to_the_highest_and_falls_to_zero():
    stage = replace(STAGES["pairs"], steps=10, warmup_steps=4, learning_rate=1.0)
    rates = [float(learning_rate(stage)(step)) for step in range(10)]
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0], atol=1e-6)


@pytest.mark.parametrize("steps, want", [(1, [1]), (4, [1, 0.75, 0.5, 0.25])])
def test_without_warm_up_the_first_rate_is_the_highest(steps, want):
    stage = replace(STAGES["pairs"], steps=steps, warmup_steps=0, learning_rate=1.0)
    np.testing.assert_allclose([learning_rate(stage)(step) for step in range(steps)], want, atol=1e-6)


def test_a_run_that_is_all_warm_up_ends_at_the_highest_rate():
    stage = replace(STAGES["pairs"], steps=4, warmup_steps=4, learning_rate=1.0)
    np.testing.assert_allclose([learning_rate(stage)(step) for step in range(4)], [0.25, 0.5, 0.75, 1])


def test_updates_are_those_of_torch():
    stage, rng = STAGES["pairs"], np.random.default_rng(0)
    shapes = {"tokens.table": (7, 4), "layers.up.kernel": (2, 4, 6), "layers.up.bias": (2, 6), "embed_norm.scale": (4,)}
    shapes |= {"embed_norm.bias": (4,), "layers.up.a": (2, 4, 1, 3), "layers.up.b": (2, 1, 3, 6), "mlm_head.bias": (7,)}
    parameters = {path: jnp.asarray(rng.standard_normal(shape), jnp.float32) for path, shape in shapes.items()}
    reference, transform = Torch(stage, parameters), optimizer(stage)
    state = transform.init(parameters)
    for size in (1e-3, 10.0, 0.05, 1.0):  # clipped and not
        gradients = {path: jnp.asarray(size * rng.standard_normal(shape), jnp.float32) for path, shape in shapes.items()}
        norm = jnp.sqrt(sum(jnp.square(x).sum() for x in gradients.values()))
        updates, state = transform.update(clipped(gradients, norm, stage), state, parameters)
        parameters = {path: x + updates[path] for path, x in parameters.items()}
        reference.step(gradients)
        reference.assert_has(parameters)


@pytest.mark.parametrize("name", ["mlm", "classification"])
def test_decay_shrinks_matrices_and_leaves_biases_and_norms_alone(name, make_encoder):
    stage = STAGES[name]
    tasks = {"tasks": stage.adapters} if stage.adapters else {"mlm_head": True}
    parameters = split_trainable(make_encoder(**tasks), stage).trained
    transform = optimizer(stage)
    still = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = transform.update(still, transform.init(parameters), parameters)
    rate = stage.learning_rate / stage.warmup_steps
    for path, x in parameters.items():
        want = 0 if path.endswith(PLAIN) else -rate * stage.weight_decay * x
        np.testing.assert_allclose(updates[path], jnp.broadcast_to(want, x.shape), rtol=1e-5, err_msg=path)
    assert any(path.endswith(PLAIN) for path in parameters) == (name == "mlm")


@pytest.mark.parametrize("name, kind", [("pairs", "pair"), ("classification", "labelled_text")])
def test_a_step_is_torchs_update_by_the_gradient_of_the_loss(name, kind, make_encoder, tokenizer, tmp_path):
    # A large epsilon: otherwise a gradient that is nothing but rounding makes a whole step.
    stage = replace(
        stages(write_datasets(tmp_path), steps=6, warmup_steps=2, weight_decay=0.3, encode_chunk_rows=None, remat="full")[name],
        epsilon=1e-3,
    )
    encoder = make_encoder(vocab_size=16_000, hidden_size=32, num_layers=1, num_heads=2, mlp_size=64, tasks=stage.adapters)
    config, trained, frozen = split_trainable(encoder, stage)
    mesh = make_mesh(data=1)
    step = make_step(stage, kind, config, "float32", mesh)
    state, reference = initial_state(stage, trained, mesh), Torch(stage, trained)
    stream = batch_stream(stage, open_datasets(stage, tmp_path), encoder.config, tokenizer, seed=0)
    loss = objective(stage, kind)
    differentiated = jax.jit(
        jax.value_and_grad(lambda some, batch: loss(from_local_arrays(config, frozen | some, dtype=jnp.float32), batch))
    )
    for number in range(3):
        _, batch = stream[number]
        value, gradients = differentiated({path: jnp.array(x) for path, x in state.parameters.items()}, batch)
        state, metrics = step(state, shard_params(frozen, mesh), from_process_local(batch, mesh))
        norm = reference.step(gradients)
        np.testing.assert_allclose([metrics.loss, metrics.grad_norm], [value, norm], rtol=1e-5)
        reference.assert_has(state.parameters)
    assert not any(jnp.array_equal(x, trained[path]) for path, x in state.parameters.items())


@pytest.mark.parametrize("name, kind", [("retrieval", "triplet"), ("classification", "labelled_text")])
def test_kernels_that_are_cast_once_have_the_steps_of_those_that_each_step_casts(name, kind, make_encoder, tokenizer, tmp_path):
    stage = stages(write_datasets(tmp_path), encode_chunk_rows=None, remat="full", learning_rate=0.1)[name]
    encoder = make_encoder(vocab_size=16_000, hidden_size=32, num_layers=2, num_heads=2, mlp_size=64, tasks=stage.adapters)
    config, trained, frozen = split_trainable(encoder, stage)
    ready = ready_to_fold(frozen, stage, "bfloat16")
    assert {path for path, x in ready.items() if x.dtype == jnp.bfloat16} == {
        f"layers.{module}.kernel" for module in ("qkv", "out", "up", "down")
    }
    mesh = make_mesh(data=1)
    step = make_step(stage, kind, config, "bfloat16", mesh)
    stream = batch_stream(stage, open_datasets(stage, tmp_path), encoder.config, tokenizer, seed=0)
    states = [initial_state(stage, trained, mesh) for _ in range(2)]
    for number in range(3):
        batch = from_process_local(stream[number][1], mesh)
        made = [step(state, shard_params(base, mesh), batch) for state, base in zip(states, (frozen, ready), strict=True)]
        states = [state for state, _ in made]
        assert made[0][1].loss == made[1][1].loss
        assert_identical(*(state.parameters for state in states))


def test_a_step_is_compiled_with_the_options_for_its_devices(make_encoder, monkeypatch):
    stage, mesh = replace(STAGES["pairs"], encode_chunk_rows=None, remat="full"), make_mesh(data=1)
    split = split_trainable(make_encoder(), stage)
    monkeypatch.setattr(update, "compiler_options", lambda kind: {f"an_option_for_{kind}": "1"})
    step = make_step(stage, "pair", split.config, "float32", mesh)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'an_option_for_cpu'"):
        step.lower(*step_arguments(stage, "pair", split, mesh)).compile()


def test_float32_and_stages_of_the_base_cast_nothing(make_encoder):
    encoder = make_encoder(tasks=STAGES["classification"].adapters, mlm_head=True)
    for name, dtype in (("classification", "float32"), ("mlm", "bfloat16")):
        frozen = split_trainable(encoder, STAGES[name]).frozen
        assert {x.dtype for x in ready_to_fold(frozen, STAGES[name], dtype).values()} <= {jnp.dtype("float32")}


def test_a_pooler_is_not_trained(make_encoder):
    encoder = make_encoder(pooler=True, mlm_head=True)
    config, trained, frozen = split_trainable(encoder, STAGES["mlm"])
    assert config == encoder.config and set(frozen) == {"pooler.kernel", "pooler.bias"}
    assert trained.keys() | frozen.keys() == variables(encoder).keys()


def test_what_is_not_finite_is_noticed():
    tree = {"a": jnp.ones(3), "b": jnp.zeros((), jnp.int32)}
    assert all_finite(tree) and not all_finite(tree | {"a": jnp.array([1.0, jnp.nan, 2.0])})
    assert not all_finite(tree | {"c": jnp.array([-jnp.inf])})


def test_the_operations_counted_are_those_of_the_program():
    config = ModelConfig(vocab_size=50, hidden_size=256, num_layers=1, num_heads=4, mlp_size=1024)
    stage = replace(STAGES["pairs"], max_length=128, row_length=128)
    encoder = Encoder(config, rngs=nnx.Rngs(0))
    rows = jnp.ones((2, 128), jnp.int32)
    program = jax.jit(lambda encoder, rows: encoder(rows, rows, rows)).lower(encoder, rows)
    forward = program.cost_analysis()["flops"] / rows.size
    assert training_flops(config, stage) == pytest.approx(3 * forward, rel=0.05)
    assert training_flops(config, replace(STAGES["separation"], max_length=128, row_length=128)) == pytest.approx(
        2 * forward, rel=0.05
    )
    masked = training_flops(config, replace(STAGES["mlm"], max_length=128, row_length=128)) - training_flops(config, stage)
    assert masked == pytest.approx(3 * 0.3 * 2 * 256 * (50 + 256))


def test_the_peak_is_known_for_accelerators_alone():
    class Device:
        device_kind = "TPU v5 lite"

    assert peak_flops(Device(), 4) == 4 * 197e12
    assert peak_flops(jax.devices()[0], 1) is None

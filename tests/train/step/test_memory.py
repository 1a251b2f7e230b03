"""The choice of what a step recomputes, against the compiler's own account of its memory."""

from dataclasses import replace

import jax
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
from helpers.training import compiled_once, stages, write_datasets
from jina_jax import ModelConfig
from jina_jax.parallel.mesh import from_process_local, make_mesh, shard_params
from train.data.stream import batch_stream, open_datasets
from train.step import memory
from train.step.memory import (
    REMATS,
    DoesNotFit,
    Plan,
    first_fitting,
    fitted_step,
    kept_bytes,
    plans,
    shard_bytes,
    with_plan,
)
from train.step.trainable_split import split_trainable
from train.step.update import initial_state, make_step

SIZES = {"vocab_size": 16_000, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "mlp_size": 256}
CONFIG = ModelConfig(**SIZES)
ROOM = 2**40


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("datasets"))


def test_with_room_for_all_rows_nothing_is_recomputed_but_what_is_cheap(datasets):
    for stage in stages(datasets).values():
        assert plans(stage, [6], CONFIG, "bfloat16", ROOM, on_tpu=False)[0] == Plan(None, "except_products")


def test_a_layer_is_recomputed_before_chunks_are_made_except_for_mlm(datasets):
    of_objective = stages(datasets)
    chunked = [Plan(3, "except_products"), Plan(2, "except_products"), Plan(1, "full")]
    whole = [Plan(None, remat) for remat in REMATS]
    assert plans(of_objective["pairs"], [6], CONFIG, "bfloat16", ROOM, on_tpu=False) == [*whole, *chunked]
    assert plans(of_objective["retrieval"], [1, 6], CONFIG, "bfloat16", ROOM, on_tpu=False) == [*whole, *chunked]
    assert plans(of_objective["mlm"], [6], CONFIG, "bfloat16", ROOM, on_tpu=False) == [whole[0], *chunked]
    on_tpu = plans(of_objective["pairs"], [6], CONFIG, "bfloat16", ROOM, on_tpu=True)
    assert on_tpu[:3] == [*whole[1:], Plan(3, "except_attention")] and on_tpu[-1] == Plan(1, "full")


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 1000])
@pytest.mark.parametrize("name", ["pairs", "mlm"])
def test_the_chunks_get_smaller_down_to_a_row(rows, name, datasets):
    found = plans(stages(datasets)[name], [rows], CONFIG, "bfloat16", ROOM, on_tpu=False)
    sizes = [plan.encode_chunk_rows or rows for plan in found]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1 and len(set(found)) == len(found) < 20
    kept = [kept_bytes(plan, stages(datasets)[name], [rows], CONFIG, "bfloat16") for plan in found]
    assert kept[-1] == min(kept)


def test_what_the_stage_says_is_in_every_plan(datasets):
    stage = stages(datasets)["pairs"]
    rows_given = plans(replace(stage, encode_chunk_rows=4), [9], CONFIG, "float32", ROOM, on_tpu=False)
    assert rows_given == [Plan(4, remat) for remat in REMATS]
    remat_given = plans(replace(stage, remat="none"), [9], CONFIG, "float32", ROOM, on_tpu=False)
    assert {plan.remat for plan in remat_given} == {"none"} and remat_given[-1].encode_chunk_rows == 1
    both = replace(stage, encode_chunk_rows=None, remat="full")
    assert plans(both, [9], CONFIG, "float32", 0, on_tpu=False) == [Plan(None, "full")]


def test_without_room_only_the_smallest_is_left(datasets):
    assert plans(stages(datasets)["classification"], [9], CONFIG, "float32", 0, on_tpu=False) == [Plan(1, "full")]


class Case:
    """A stage of many rows, its model and a batch."""

    def __init__(self, name: str, datasets, make_encoder, tokenizer, tmp_path):
        self.mesh = make_mesh(data=1)
        self.stage = stages(datasets, batch_size=16, max_length=48, epsilon=1e-2)[name]
        tasks = {"tasks": self.stage.adapters} if self.stage.adapters else {"mlm_head": name == "mlm"}
        encoder = make_encoder(**SIZES, **tasks)
        self.config, self.trained, frozen = split_trainable(encoder, self.stage)
        self.frozen = shard_params(frozen, self.mesh)
        stream = batch_stream(self.stage, open_datasets(self.stage, tmp_path), encoder.config, tokenizer, seed=0)
        self.kind, batch = stream[0]
        self.batch = from_process_local(batch, self.mesh)
        self.rows = [part.tokens.shape[0] for part in self.batch.parts]

    def state(self):
        return initial_state(self.stage, self.trained, self.mesh)

    def arguments(self):
        return self.state(), self.frozen, self.batch

    def planned(self, plan: Plan):
        return make_step(with_plan(self.stage, plan), self.kind, self.config, "float32", self.mesh)

    def fitted(self):
        return fitted_step(self.stage, self.kind, self.config, "float32", self.mesh)


@pytest.fixture
def case(request, datasets, make_encoder, tokenizer, tmp_path):
    return Case(request.param, datasets, make_encoder, tokenizer, tmp_path)


@pytest.mark.parametrize("case", ["retrieval", "mlm"], indirect=True)
def test_each_plan_that_keeps_less_needs_less_memory_by_the_compiler(case):
    """And at least what is reckoned: a plan is left out only where it cannot fit."""
    candidates = plans(case.stage, case.rows, case.config, "float32", ROOM, on_tpu=False)
    stats = [case.planned(plan).lower(*case.arguments()).compile().memory_analysis() for plan in candidates]
    needed = [each.temp_size_in_bytes for each in stats]
    kept = [kept_bytes(plan, case.stage, case.rows, case.config, "float32") for plan in candidates]
    assert all(np.less(kept, needed)), (candidates, kept, needed)
    assert needed[-1] == min(needed) and needed[0] == max(needed)
    assert shard_bytes(case.arguments()) == pytest.approx(stats[0].argument_size_in_bytes, rel=1e-2)


@pytest.mark.parametrize("case", ["pairs"], indirect=True)
def test_a_step_in_less_memory_has_the_same_loss_and_update(case, monkeypatch, caplog):
    caplog.set_level("INFO", memory.__name__)
    candidates = plans(case.stage, case.rows, case.config, "float32", ROOM, on_tpu=False)
    stats = [case.planned(plan).lower(*case.arguments()).compile().memory_analysis() for plan in candidates]
    needed = [memory._needed_bytes(each, on_tpu=False) for each in stats]
    want, metrics = case.planned(candidates[0])(*case.arguments())
    for fraction in (0.6, 0.0):
        room = min(needed) + fraction * (max(needed) - min(needed)) + 1
        monkeypatch.setattr(memory, "device_memory", lambda mesh, room=room: 1 + room / memory.USABLE)
        first = next(plan for plan, size in zip(candidates, needed, strict=True) if size <= room)
        caplog.clear()
        step = case.fitted()
        got, again = step(*case.arguments())
        assert f"encodes {first.encode_chunk_rows or 'all'} at once, remat {first.remat}" in caplog.messages[-1]
        np.testing.assert_allclose([again.loss, again.grad_norm], [metrics.loss, metrics.grad_norm], rtol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4), got.parameters, want.parameters)
        messages = len(caplog.messages)
        step(got, case.frozen, case.batch)  # of the same shape: the same program
        assert len(caplog.messages) == messages


@pytest.mark.parametrize("case", ["pairs"], indirect=True)
def test_a_step_that_cannot_fit_says_what_would_help(case, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda mesh: 2**20)
    with pytest.raises(DoesNotFit, match=r"stage pairs: a step on \d+ rows of 48 needs 0.\d+ GiB of the 0.00 GiB.*batch_size"):
        case.fitted()(*case.arguments())


def test_errors_that_are_not_of_memory_are_not_taken_for_it():
    class Lowered:
        def __init__(self, message: str):
            self.message = message

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.message)

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        memory._compiled_within(Lowered("INTERNAL: a fault of the compiler"), 2**30, on_tpu=False)
    with pytest.raises(DoesNotFit, match="needs more of the 1.00 GiB"):
        memory._compiled_within(Lowered("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm"), 2**30, on_tpu=False)


def test_the_first_that_fits_is_taken_and_none_after_it_is_compiled():
    tried = []

    def compiled(plan: Plan) -> str:
        tried.append(plan)
        if plan.encode_chunk_rows is None:
            raise DoesNotFit("needs more")
        return "program"

    candidates = [Plan(None, "full"), Plan(2, "full"), Plan(1, "full")]
    assert first_fitting(candidates, compiled) == (Plan(2, "full"), "program") and tried == candidates[:2]
    with pytest.raises(DoesNotFit):
        first_fitting(candidates[:1], compiled)


def test_a_cpu_has_its_share_of_the_machine_or_the_container(monkeypatch, tmp_path):
    mesh, limit = make_mesh(data=1), tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CONTAINER_LIMIT", limit)
    machine = memory.device_memory(mesh)
    assert 2**28 < machine < 2**45
    limit.write_text("max\n")
    assert memory.device_memory(mesh) == machine
    limit.write_text(f"{2**30}\n")
    assert memory.device_memory(mesh) == 0.75 * 2**30
    limit.write_text(f"{2**60}\n")
    assert memory.device_memory(mesh) == machine

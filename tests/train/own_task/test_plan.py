"""Sizes of a planned run: by the records, the base and what the user gives."""

from pathlib import Path

import pytest

from jina_jax import Embedder
from jina_jax.config import ModelConfig
from train.config import from_dict, to_dict
from train.data.records import LabelledText, Pair, Record, Triplet
from train.own_task import plan
from train.own_task.plan import Sizes, adapter_names, plan_run, with_steps

SHORT, LONG = "a few words", "many more words than that " * 8


def labelled(count: int, text: str = SHORT) -> list[LabelledText]:
    return [LabelledText(text=f"{text} {i}", label=str(i % 2)) for i in range(count)]


@pytest.fixture
def planned(embedder: Embedder):
    def make(records: list, names: tuple[str, ...] = ("new",), **sizes):
        kind = {LabelledText: "labelled_text", Pair: "pair", Triplet: "triplet"}[type(records[0])]
        return plan_run(records, kind, Path("records.jsonl"), embedder, "base", names, Sizes(**sizes))

    return make


def test_a_plan_is_a_configuration_of_the_training_loop(planned, embedder):
    run = planned(labelled(200))
    assert from_dict(to_dict(run)) == run
    (stage,) = run.stages
    assert (stage.objective, stage.same_class, stage.adapters) == ("classification", "excluded", ("new",))
    assert stage.datasets[0].path == "records.jsonl" and run.start.source == "base"
    assert stage.dims == embedder.config.matryoshka_dims


def test_steps_and_batches_follow_the_number_of_records(planned):
    steps = [planned(labelled(count)).stages[0].steps for count in (40, 6_000, 60_000)]
    assert steps[0] == plan.LEAST_STEPS < steps[1] < steps[2] == plan.MOST_STEPS_ON_CPU
    assert [planned(labelled(count)).stages[0].batch_size for count in (10, 10_000)] == [10, plan.BATCH_SIZE]
    assert plan.LEAST_ON_CPU < planned(labelled(200, LONG)).stages[0].batch_size < plan.BATCH_SIZE
    assert planned(labelled(200, LONG * 9)).stages[0].batch_size == plan.LEAST_ON_CPU


def test_a_batch_is_split_evenly_over_the_devices(planned, monkeypatch):
    monkeypatch.setattr(plan.jax, "device_count", lambda: 8)
    assert planned(labelled(50)).stages[0].batch_size == 56
    with pytest.raises(ValueError, match="divisible by the 8 devices, not 20"):
        planned(labelled(50), batch_size=20)


def test_length_is_what_nearly_all_texts_have(planned, embedder):
    short, long = planned(labelled(200)).stages[0], planned([*labelled(100), *labelled(100, LONG)]).stages[0]
    few = planned([*labelled(1000), *labelled(1, LONG)]).stages[0]
    assert short.max_length == few.max_length == 16
    longest = len(embedder.tokenizer(f"{LONG} 99")["input_ids"])
    assert longest <= long.max_length < longest + 8
    assert short.row_length % plan.ROW_LENGTH == 0 and long.row_length >= long.max_length


def test_what_the_user_gives_is_taken(planned):
    run = planned(labelled(50), steps=7, batch_size=4, rank=3, max_length=24, learning_rate=1e-5, dims=(8, 64), seed=5)
    (stage,) = run.stages
    assert (stage.steps, stage.batch_size, stage.max_length, stage.learning_rate, stage.dims) == (7, 4, 24, 1e-5, (8, 64))
    assert (run.start.lora_rank, run.start.lora_alpha, run.seed) == (3, 3.0, 5)


@pytest.mark.parametrize(
    ("records", "objective", "negatives"),
    [
        ([Pair(anchor="a", positive="b")], "retrieval", 0),
        (
            [Triplet(anchor="a", positive="b", negatives=("c", "d")), Triplet(anchor="a", positive="e", negatives=("f",))],
            "retrieval",
            1,
        ),
        ([Triplet(anchor="a", positive="b", negatives=tuple("cdefgh"))], "retrieval", plan.MOST_NEGATIVES),
    ],
)
def test_pairs_are_trained_as_retrieval(planned, records: list[Record], objective, negatives):
    (stage,) = planned(records * 20, ("new.query", "new.passage")).stages
    assert (stage.objective, stage.num_negatives) == (objective, negatives)


def test_wide_bases_learn_slower():
    narrow, wide = (plan.learning_rate("pair", width) for width in (384, 1024))
    assert narrow == plan.LEARNING_RATES["pair"] > wide > narrow / 4


def test_names_are_the_published_ones_unless_another_is_given():
    config = ModelConfig(tasks=("separation",), prompts=(("separation", ""), ("query", "query: ")))
    assert adapter_names(None, "labelled_text", "m", config) == ("classification",)
    assert adapter_names(None, "triplet", "m", config) == ("retrieval.query", "retrieval.passage")
    assert adapter_names("legal", "pair", "m", config) == ("legal.query", "legal.passage")
    for taken in ("separation", "query"):
        with pytest.raises(ValueError, match=f"m has '{taken}' already; its tasks are .*another --name"):
            adapter_names(taken, "labelled_text", "m", config)
    for wrong in ("", "a b", "../x", "_x", "a\n"):
        with pytest.raises(ValueError, match="a name is up to 100 letters"):
            adapter_names(wrong, "labelled_text", "m", config)


def test_a_run_may_have_other_steps(planned):
    run = planned(labelled(200))
    (stage,) = with_steps(run, 2).stages
    assert (stage.steps, stage.warmup_steps) == (2, 2) and with_steps(run, run.steps) == run

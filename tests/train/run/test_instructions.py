"""What stands before the texts of a run, and what the trained model puts before a user's."""

import logging
from dataclasses import replace

import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
from helpers.training import KINDS, run_config, stages
from jina_jax import ModelConfig
from jina_jax.config import PUBLISHED_INSTRUCTIONS
from jina_jax.errors import ConfigError
from train.config import DatasetConfig, InitialModel
from train.run.instructions import prompts_after, task_instructions

STAGES = stages({kind: DatasetConfig("not read", kind) for kind in KINDS})
ADAPTERS = ("retrieval", "text_matching", "classification", "separation")
TASKS = ("retrieval.query", "retrieval.passage", "text-matching", "classification", "separation")
E5 = (("query", "query: "), ("document", "passage: "))


def instructions(*of_run, source: ModelConfig, **start) -> dict[str, str]:
    return task_instructions(run_config(*of_run, start=InitialModel(source="x", **start)), source)


def source(prompts=E5, **fields) -> ModelConfig:
    return ModelConfig(prompts=tuple(prompts), **fields)


FIVE = [STAGES[name] for name in ADAPTERS]
CARRIED = dict.fromkeys(TASKS, "query: ") | {"retrieval.passage": "passage: "}


@pytest.mark.parametrize("name", ["document", "passage", "corpus"])
def test_adapters_carry_the_prompts_of_their_base(name):
    model = source([("query", "query: "), (name, "passage: ")])
    assert instructions(*FIVE, source=model) == CARRIED
    other = replace(STAGES["classification"], adapters=("tickets",))
    assert instructions(other, source=model) == {"tickets": "query: "}


def test_a_base_with_a_prompt_on_one_side_has_none_on_the_other():
    queries = instructions(*FIVE, source=source([("query", "Instruct: ")]))
    assert queries == dict.fromkeys(TASKS, "Instruct: ") | {"retrieval.passage": ""}
    passages = instructions(*FIVE, source=source([("passage", "text: ")]))
    assert passages == dict.fromkeys(TASKS, "") | {"retrieval.passage": "text: "}


@pytest.mark.parametrize("prompts", [(), [("note", "Note: ")], [("query", ""), ("document", "")]])
def test_above_a_base_without_prompts_instructions_are_the_published_ones(prompts):
    assert instructions(*FIVE, source=source(prompts)) == PUBLISHED_INSTRUCTIONS
    other = replace(STAGES["classification"], adapters=("tickets",))
    assert instructions(other, source=source(prompts)) == {"tickets": ""}


def test_a_named_instruction_comes_first():
    named = (("classification", "Sort: "), ("separation", ""))
    got = instructions(*FIVE, source=source(), instructions=named)
    assert got == CARRIED | {"classification": "Sort: ", "separation": ""}


def test_tasks_of_the_source_keep_their_instructions():
    model = source([*PUBLISHED_INSTRUCTIONS.items(), *E5], tasks=TASKS)
    assert instructions(*FIVE, source=model) == PUBLISHED_INSTRUCTIONS
    assert instructions(STAGES["separation"], source=source((), tasks=("separation",))) == {"separation": ""}


def test_prompts_of_a_stage_are_the_instructions_of_its_new_tasks():
    prompted = [replace(stage, prompts=("find: ", "find: ")) for stage in FIVE]
    prompted[0] = replace(FIVE[0], prompts=("find: ", ""))
    assert instructions(*prompted, source=source()) == dict.fromkeys(TASKS, "find: ") | {"retrieval.passage": ""}
    same = (("retrieval.query", "find: "),)
    assert instructions(prompted[0], source=source(), instructions=same)["retrieval.query"] == "find: "
    kept = source([("separation", "find: ")], tasks=("separation",))
    assert instructions(prompted[3], source=kept) == {"separation": "find: "}


def test_prompts_beside_another_instruction_are_refused():
    stage = replace(STAGES["retrieval"], prompts=("find: ", "text: "))
    message = "stage retrieval: prompts has 'text: ' for retrieval.passage, whose instruction in start.instructions is 'T: '"
    with pytest.raises(ConfigError, match=message):
        instructions(stage, source=source(), instructions=(("retrieval.passage", "T: "),))
    published = source(PUBLISHED_INSTRUCTIONS.items(), tasks=TASKS)
    with pytest.raises(ConfigError, match=r"'find: ' for retrieval\.query, .* in start\.source is 'Represent the query"):
        instructions(stage, source=published)
    stage = replace(STAGES["separation"], prompts=("find: ", "find: "))
    with pytest.raises(ConfigError, match="'find: ' for separation, whose instruction in start.source is ''"):
        instructions(stage, source=published)


def test_a_base_keeps_the_prompts_that_it_was_trained_with():
    stage = replace(STAGES["pairs"], prompts=("find: ", "text: "))
    assert dict(prompts_after(stage, source(()))) == {"query": "find: ", "document": "text: "}
    before = source([("note", "Note: "), ("query", "query: "), ("passage", "passage: ")])
    after = {"note": "Note: ", "query": "find: ", "passage": "text: ", "document": "text: "}
    assert dict(prompts_after(stage, before)) == after


@pytest.mark.parametrize("name, lines", [("pairs", 1), ("mlm", 0)])
def test_prompts_that_a_stage_does_not_train_with_are_told(name, lines, caplog):
    with caplog.at_level(logging.WARNING):
        assert prompts_after(STAGES[name], source()) == E5
        assert prompts_after(STAGES[name], source(())) == ()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == lines and all("prompts=('query: ', 'passage: ')" in message for message in messages)

"""What stands before the texts of a run, and what the trained model keeps of it.

A model is served with what it was trained with: `encode_query` and `encode_document` put a base's
prompts before texts, a task its instruction.
"""

import logging

from jina_jax.config import DOCUMENT_PROMPTS, PUBLISHED_INSTRUCTIONS, ModelConfig
from jina_jax.errors import ConfigError

from ..config import Stage, TrainConfig

logger = logging.getLogger(__name__)


def task_instructions(config: TrainConfig, source: ModelConfig) -> dict[str, str]:
    """Returns the instruction of every task that the stages train.

    Args:
        config: of the run.
        source: of the model that it starts from. Its tasks keep their instructions.

    Raises:
        ConfigError: a stage's prompts contradict the instruction of a task.
    """
    instructions = {}
    for stage in config.stages:
        # One task has one prompt twice.
        for task, prompt in zip(stage.adapters, stage.prompts, strict=False):
            if task in source.tasks:
                given, place = source.prompt(task) or "", "in start.source"
            else:
                given, place = dict(config.start.instructions).get(task), "in start.instructions"
            prompted = any(stage.prompts)
            if prompted and given not in (None, prompt):
                raise ConfigError(
                    f"stage {stage.name}: prompts has {prompt!r} for {task}, whose instruction {place} is {given!r}; "
                    "leave the prompts out, or give the same"
                )
            if given is None:
                given = prompt if prompted else default_instruction(task, source)
            instructions[task] = given
    return instructions


def prompts_after(stage: Stage, source: ModelConfig) -> tuple[tuple[str, str], ...]:
    """Returns the prompts of a model whose base a stage has trained.

    Args:
        stage: its prompts take the place of those of queries and documents; without any, the model
            keeps its own.
        source: of the model before.
    """
    query, document = _side_prompts(source)
    if not any(stage.prompts):
        if stage.objective != "mlm" and (query or document):
            logger.warning(
                "stage %s has no prompts, and the model puts %r before queries and %r before documents; "
                "to train with them: prompts=(%r, %r)",
                *(stage.name, query, document, query, document),
            )
        return source.prompts
    names = ["document", *(name for name, _ in source.prompts if name in DOCUMENT_PROMPTS)]
    return tuple((dict(source.prompts) | {"query": stage.prompts[0]} | dict.fromkeys(names, stage.prompts[1])).items())


def default_instruction(task: str, source: ModelConfig) -> str:
    """Returns the instruction of a new task above a base, where a run names none."""
    query, document = _side_prompts(source)
    if query or document:
        return document if task == "retrieval.passage" else query
    return PUBLISHED_INSTRUCTIONS.get(task, "")


def _side_prompts(source: ModelConfig) -> tuple[str, str]:
    """Prompts that `encode_query` and `encode_document` put before texts; "" = none."""
    prompts = {None: ""} | dict(source.prompts)
    return prompts[source.side_prompt("query")], prompts[source.side_prompt("document")]

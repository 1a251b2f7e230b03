"""Plans the run of a task: a configuration whose sizes fit the records, the base and the
machine."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jina_jax import Embedder
from jina_jax.config import ModelConfig
from jina_jax.model.device import cpu_multiplies_bfloat16
from jina_jax.text.tokenizer import private_backend

from ..config import DatasetConfig, InitialModel, RecordKind, Stage, TrainConfig
from ..data.records import LabelledText, Pair, Record, Triplet
from ..run.instructions import default_instruction

DEFAULT_NAMES: dict[RecordKind, str] = {"labelled_text": "classification", "pair": "retrieval", "triplet": "retrieval"}

SIDES = ("query", "passage")
"""Ends of the names of the two adapters of pairs: `retrieval.query` and `retrieval.passage` are
those that `encode_query` and `encode_document` take."""

BATCH_SIZE, LEAST_ON_CPU, TOKENS_ON_CPU = 96, 32, 6000
"""Records of a step; on CPU as many as have these tokens, and not fewer than the second."""

PASSES = 1.0
"""Times that each record is an anchor, by default."""

LEAST_STEPS, MOST_STEPS_ON_CPU, MOST_STEPS = 40, 80, 2000
"""Bounds of the default number of steps."""

LEARNING_RATES: dict[RecordKind, float] = {"labelled_text": 3e-3, "pair": 1e-3, "triplet": 1e-3}
OF_WIDTH = 384
"""Peak learning rates above a base of this width; wider ones have less, in proportion."""

TEMPERATURE = 0.05
MOST_NEGATIVES = 3
"""Listed negatives that a step draws of each pair, by default."""

SAMPLED = 2000
"""Records whose texts are tokenised to learn how long they are."""

LEAST_LENGTH = 8

COVERED = 0.99
"""Share of the texts that the default length does not cut."""

LONGEST = 512
"""Tokens of a text at most, by default."""

ROW_LENGTH = 128
"""Multiple that rows of texts have: short rows cost least on CPU, and TPUs take no shorter ones."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run that the user may give; None = one that fits."""

    steps: int | None = None
    batch_size: int | None = None
    rank: int = 16
    max_length: int | None = None
    learning_rate: float | None = None
    dims: tuple[int, ...] = ()
    seed: int = 0


def adapter_names(name: str | None, kind: RecordKind, model: str, config: ModelConfig) -> tuple[str, ...]:
    """Returns the names of the adapters to train, which the base does not have yet.

    Args:
        name: one for labelled texts, and what those of pairs begin with; None = the published ones.
        kind: of the records.
        model: name of the base, for messages.
        config: of the base.

    Raises:
        ValueError: the name is no name, or the base has a task or prompt of it.
    """
    first = DEFAULT_NAMES[kind] if name is None else name
    if not re.fullmatch(r"[^\W_][\w.-]{0,99}", first):
        raise ValueError(
            f"--name {first!r}: a name is up to 100 letters, digits, '.', '-' and '_', and begins with one of the first two"
        )
    names = (first,) if kind == "labelled_text" else tuple(f"{first}.{side}" for side in SIDES)
    if taken := [each for each in names if each in config.tasks or config.prompt(each) is not None]:
        raise ValueError(
            f"{model} has {' and '.join(map(repr, taken))} already; its tasks are {list(config.tasks)}, its prompts "
            f"{[key for key, _ in config.prompts if key not in config.tasks]}: give the new adapter another --name"
        )
    return names


def plan_run(
    records: Sequence[Record], kind: RecordKind, file: Path, base: Embedder, source: str, names: tuple[str, ...], sizes: Sizes
) -> TrainConfig:
    """Returns the configuration of a run above a base.

    Args:
        records: those to train on.
        kind: of the records.
        file: that the run reads them from.
        base: the model.
        source: where a run loads it from.
        names: from `adapter_names`.
        sizes: those that the user gives.

    Raises:
        ValueError: a size does not fit the base or the machine.
    """
    config = base.config
    _check_sizes(sizes, len(records), base)
    lengths = _token_lengths(records, [default_instruction(name, config) for name in names], base)
    max_length = sizes.max_length or _max_length(lengths, base)
    num_negatives = _num_negatives(records, kind)
    tokens = (2 + num_negatives) * float(np.minimum(lengths, max_length).mean())
    batch_size = sizes.batch_size or _batch_size(len(records), tokens)
    steps = sizes.steps or _steps(len(records), batch_size)
    row_length = _multiple(max_length, ROW_LENGTH)
    stage = Stage(
        name=names[0],
        objective="classification" if kind == "labelled_text" else "retrieval",
        datasets=(DatasetConfig(str(file), kind),),
        steps=steps,
        warmup_steps=steps // 10,
        batch_size=batch_size,
        max_length=max_length,
        row_length=row_length,
        learning_rate=sizes.learning_rate or learning_rate(kind, config.hidden_size),
        adapters=names,
        temperature=TEMPERATURE,
        dims=sizes.dims or config.matryoshka_dims,
        num_negatives=num_negatives,
        same_class="excluded",
    )
    return TrainConfig(
        start=InitialModel(source=source, lora_rank=sizes.rank, lora_alpha=float(sizes.rank)),
        stages=(stage,),
        seed=sizes.seed,
        dtype=machine_dtype(),
        checkpoint_every=max(10, steps // 10),
        log_every=max(1, steps // 50),
    )


def with_steps(run: TrainConfig, steps: int) -> TrainConfig:
    """Returns a run of another number of steps."""
    (stage,) = run.stages
    return replace(run, stages=(replace(stage, steps=steps, warmup_steps=min(stage.warmup_steps, steps)),))


def learning_rate(kind: RecordKind, width: int) -> float:
    """Default peak learning rate on records of a kind, above a base of a width."""
    return float(f"{LEARNING_RATES[kind] * min(1, OF_WIDTH / width):.2g}")


def machine_dtype() -> Any:
    """Compute dtype that this machine is fastest in: bfloat16 where it multiplies it."""
    return "bfloat16" if jax.default_backend() != "cpu" or cpu_multiplies_bfloat16() else "float32"


def _max_length(lengths: Int[np.ndarray, " texts"], base: Embedder) -> int:
    """Tokens that nearly all texts have at most."""
    covering = _multiple(int(np.quantile(lengths, COVERED)), 8)
    return min(max(covering, 2 * LEAST_LENGTH), LONGEST, base.max_length)


def _token_lengths(records: Sequence[Record], prompts: Sequence[str], base: Embedder) -> Int[np.ndarray, " texts"]:
    """Tokens of the texts of some records, behind their prompts."""
    some = records[:: max(1, len(records) // SAMPLED)]
    texts = [prompt + text for record in some for text, prompt in _prompted(record, prompts)]
    encodings = private_backend(base.tokenizer).encode_batch_fast(texts)
    return np.array([len(encoding.ids) for encoding in encodings])


def _prompted(record: Record, prompts: Sequence[str]) -> list[tuple[str, str]]:
    if isinstance(record, LabelledText):
        return [(record.text, prompts[0])]
    assert isinstance(record, Pair)
    negatives = record.negatives if isinstance(record, Triplet) else ()
    return [(record.anchor, prompts[0]), *((text, prompts[1]) for text in (record.positive, *negatives))]


def _batch_size(records: int, tokens: float) -> int:
    """Default number of records of a step, a multiple of the devices; `tokens` is of a record."""
    fitting = BATCH_SIZE
    if jax.default_backend() == "cpu":
        fitting = min(BATCH_SIZE, max(LEAST_ON_CPU, int(TOKENS_ON_CPU / tokens)))
    return _multiple(min(fitting, records), jax.device_count())


def _steps(records: int, batch_size: int) -> int:
    most = MOST_STEPS_ON_CPU if jax.default_backend() == "cpu" else MOST_STEPS
    return min(max(LEAST_STEPS, math.ceil(PASSES * records / batch_size)), most)


def _num_negatives(records: Sequence[Record], kind: RecordKind) -> int:
    if kind == "triplet":
        return min(MOST_NEGATIVES, *(len(record.negatives) for record in records if isinstance(record, Triplet)))
    return 0  # the other records of a batch are negatives


def _check_sizes(sizes: Sizes, records: int, base: Embedder) -> None:
    width = base.config.hidden_size
    for option, given, most, what in (
        ("--batch-size", sizes.batch_size, records, "the records to train on"),
        ("--rank", sizes.rank, width, "the width of the base"),
        ("--max-length", sizes.max_length, base.max_length, "the tokens that the base takes"),
    ):
        least = LEAST_LENGTH if option == "--max-length" else 1
        if given is not None and not least <= given <= most:
            raise ValueError(f"{option} must be in {least}..{most}, {what}, not {given}")
    if sizes.batch_size is not None and sizes.batch_size % (devices := jax.device_count()):
        raise ValueError(f"--batch-size must be divisible by the {devices} devices, not {sizes.batch_size}")
    if sizes.learning_rate is not None and not 0 < sizes.learning_rate < math.inf:
        raise ValueError(f"--learning-rate must be above 0 and finite, not {sizes.learning_rate}")
    if wrong := [dim for dim in sizes.dims if not 1 <= dim <= width]:
        raise ValueError(f"--dims {wrong}: the base has {width} dimensions")


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of

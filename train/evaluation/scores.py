"""Results of an evaluation: one score for each system, task, subset, adapter and dimension."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from jina_jax.files import atomic_write

System = Literal["model", "untrained", "bm25"]


class Score(NamedTuple):
    """One measured number; higher is better, whatever the metric."""

    system: System
    task: str
    """One of retrieval, classification, clustering and similarity."""
    subset: str
    """Languages: `en`, or `de-en` for German queries over English documents."""
    adapter: str | None
    """Adapter's name; `none` for the base model; for retrieval, the adapters of queries and of
    passages joined by +. None for bm25."""
    dim: int | None
    """Leading dimensions of the embeddings that were kept. None for bm25."""
    metric: str
    value: float
    n: int
    """Queries, texts or pairs that the value is taken over."""


def write_scores(file: Path, scores: Sequence[Score]) -> None:
    """Writes `{"records": [...]}`, with a record of the fields of `Score` for each score."""
    if wrong := [score for score in scores if not math.isfinite(score.value)]:
        raise ValueError(f"a score is not finite: {wrong[0]}")
    records = {"records": [score._asdict() for score in scores]}
    with atomic_write(file) as target:
        target.write_text(json.dumps(records, indent=1) + "\n", "utf-8")

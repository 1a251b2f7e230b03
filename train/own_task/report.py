"""What a finished run tells: its scores before and after, and how to use and share the model."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jina_jax.checkpoints.peft import adapter_folder
from jina_jax.config import SIDE_TASKS

TITLES = {"accuracy": "accuracy", "ndcg@10": "nDCG@10", "recall@10": "recall@10"}


def score_texts(scores: Mapping[str, Any]) -> list[str]:
    """Returns each score in percent, behind its title."""
    return [f"{title} {100 * scores[name]:.2f}" for name, title in TITLES.items() if name in scores]


def score_lines(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yields a table of the scores before and after, in percent, and what they are of."""
    yield f"{'':<10} {'before':>7} {'after':>7}"
    for name, title in TITLES.items():
        if name in after:
            yield f"{title:<10} {100 * before[name]:>7.2f} {100 * after[name]:>7.2f}"
    yield f"{after['of'][0].upper()}{after['of'][1:]}."


def next_steps(model: Path, adapters: Sequence[str]) -> Iterator[str]:
    """Yields lines that say how to use a model with new adapters, and how to share them."""
    yield "Use it:"
    yield "  from jina_jax import Embedder"
    yield f'  model = Embedder.load("{model}")'
    if tuple(adapters) == tuple(SIDE_TASKS.values()):
        yield '  model.similarity(model.encode_query(["a query"]), model.encode_document(["a text", "another"]))'
    elif len(adapters) == 2:
        query, document = (f'model.encode(["{text}"], task="{task}")' for text, task in zip("qd", adapters, strict=True))
        yield f"  model.similarity({query}, {document})"
    else:
        yield f'  model.encode(["a text", "another"], task="{adapters[0]}")'
    shared = shlex.quote(str(model.with_name("shared")))
    folders = " and ".join(adapter_folder(task) for task in adapters)
    yield "Share it: as PEFT folders beside the base, or merged into it for sentence-transformers:"
    yield f"  python -m convert to_torch {shlex.quote(str(model))} {shared} --layout transformers   # {folders}"
    merged = shlex.quote(str(model.with_name("merged")))
    yield f"  python -m convert to_torch {shlex.quote(str(model))} {merged} --layout sentence-transformers --task {adapters[0]}"

"""From the results of packed batches to what a call of `Embedder.encode` returns."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Float

from ..errors import NotFiniteError
from ..text.packing import PackedBatch, scatter
from .inputs import Output
from .quantize import quantize
from .similarity import normalize

Result = tuple[PackedBatch, Array]
"""A batch, whose `texts` are indices in the call, and what was computed of it, perhaps still under
way."""


_NAMED = 32
"""Texts that an error names: as many as may share a row of 512 slots, and so its NaN, since 0 times
NaN is NaN in attention and in the mean."""


def one_ahead(results: Iterator[Result]) -> Iterator[Result]:
    """Starts each batch before the one before it is read, so that the device never waits for the
    host."""
    waiting = None
    for result in results:
        if waiting is not None:
            yield waiting
        waiting = result
    if waiting is not None:
        yield waiting


def collect_embeddings(
    results: Iterator[Result], texts: int, hidden_size: int, progress: Any
) -> tuple[Float[np.ndarray, "n d"], int]:
    """Returns the embeddings of all texts, in their order, and how many texts were cut."""
    out, truncated = np.zeros((texts, hidden_size), np.float32), 0
    for batch, pooled in results:
        scatter(np.asarray(pooled), batch, out)
        truncated += batch.truncated
        progress.update(int((batch.texts >= 0).sum()))
    check_finite(np.isfinite(out).all(axis=-1))
    return out, truncated


def collect_token_states(
    results: Iterator[Result], texts: int, hidden_size: int, progress: Any
) -> tuple[list[Float[np.ndarray, "t d"]], int]:
    """Returns the token states of each text, in their order, and how many texts were cut."""
    out, truncated = [np.zeros((0, hidden_size), np.float32)] * texts, 0
    for batch, states in results:
        host = np.asarray(states, np.float32)
        for row, index_in_row in zip(*np.nonzero(batch.texts >= 0), strict=True):
            out[batch.texts[row, index_in_row]] = host[row][batch.segment_ids[row] == index_in_row + 1]
        truncated += batch.truncated
        progress.update(int((batch.texts >= 0).sum()))
    check_finite(np.array([np.isfinite(states).all() for states in out], bool))
    return out, truncated


def check_finite(finite: Any) -> None:
    """Raises NotFiniteError if the result of a text is not finite; `finite` is [n] bool."""
    if wrong := np.flatnonzero(~finite).tolist():
        raise not_finite(wrong, f"{len(wrong)} of {len(finite)} texts, by index", wrong)


def not_finite(indices: list[int], of_texts: str, names: Sequence[Any]) -> NotFiniteError:
    """Returns the error for texts whose result is not finite, by the names that their user
    knows."""
    listed = f"{list(names[:_NAMED])}{' and others' if len(names) > _NAMED else ''}"
    return NotFiniteError(
        f"the model gives NaN or infinity for {of_texts} {listed}; texts of a row share it; "
        "if it computes in float16, which overflows above 65,504, load it with dtype bfloat16 or float32",
        indices,
    )


def finish(collected: Any, output: Output) -> Any:
    """Returns a call's result in the form asked for: truncated, then normalised, then quantised."""
    if output.token_embeddings:
        return collected[0] if output.single else collected
    embeddings = np.asarray(collected)[:, : output.dim]
    if output.normalize:
        embeddings = normalize(embeddings)
    embeddings = quantize(embeddings, output.precision, output.ranges)
    if output.single:
        return embeddings[0]
    return list(embeddings) if output.as_list else embeddings

"""Embeds texts in chunks: a row for each chunk, with its text, its number and its characters."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Num

from ..errors import NotFiniteError
from ..text.chunking import Chunker, by_sentences, by_tokens
from ..text.tokenizer import Tokenizer, without_limits
from .embedder import Embedder
from .results import not_finite


class ChunkRows(NamedTuple):
    """The chunks of several texts, in order; a text without any token has none."""

    texts: Int[np.ndarray, " n"]
    """Index of the text that each is of."""
    numbers: Int[np.ndarray, " n"]
    """Of the chunk in its text, from 0."""
    starts: Int[np.ndarray, " n"]
    """First character."""
    ends: Int[np.ndarray, " n"]
    """Last character, exclusive."""
    embeddings: Num[np.ndarray, "n _"]


def check_chunk_options(chunk_tokens: int | None, chunk_sentences: int | None, late_chunking: bool | None) -> None:
    """Raises ValueError if options of a command are not valid or exclude each other."""
    sizes = {"--chunk-tokens": chunk_tokens, "--chunk-sentences": chunk_sentences}
    given = {name: size for name, size in sizes.items() if size is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other")
    if not given and late_chunking is not None:
        raise ValueError("--late-chunking and --no-late-chunking: only with --chunk-tokens or --chunk-sentences")
    for name, size in given.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")


def chunker(tokenizer: Tokenizer, chunk_tokens: int | None, chunk_sentences: int | None) -> Chunker | None:
    """Returns what cuts a text into chunks of so many tokens or sentences; None = it is not cut."""
    if chunk_tokens is not None:
        return partial(by_tokens, tokens=chunk_tokens, tokenizer=without_limits(tokenizer))
    if chunk_sentences is not None:
        return partial(by_sentences, sentences=chunk_sentences, tokenizer=without_limits(tokenizer))
    return None


def embed_in_chunks(embedder: Embedder, texts: Sequence[str], cut: Chunker, **options: Any) -> ChunkRows:
    """Embeds the chunks of texts.

    Args:
        embedder: of the tokenizer that `cut` has.
        texts: of any length.
        cut: from `chunker`.
        options: of `Embedder.encode_chunks`.

    Raises:
        NotFiniteError: a chunk's embedding is not finite; the indices are those of texts.
    """
    chunks = [cut(text) for text in texts]
    counts = [len(each) for each in chunks]
    of_text = np.repeat(np.arange(len(texts)), counts)
    ends = np.array([end for each in chunks for end in accumulate(map(len, each))], np.int64)
    numbers = np.array([number for count in counts for number in range(count)], np.int64)
    try:
        embedded = embedder.encode_chunks([each for each in chunks if each], **options)
    except NotFiniteError as error:
        wrong = np.unique(of_text[error.indices]).tolist()
        raise not_finite(wrong, f"chunks of {len(wrong)} of {len(texts)} texts, by index", wrong) from error
    starts = np.where(numbers == 0, 0, np.roll(ends, 1))
    # Without a chunk there is still a width.
    embeddings = np.concatenate(embedded) if embedded else np.asarray(embedder.encode([], **_of_encode(options)))
    return ChunkRows(of_text, numbers, starts, ends, embeddings)


def _of_encode(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("late", "windows", "overlap", "separator")}

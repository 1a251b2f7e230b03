"""Late chunking of a request: its texts are the chunks of one document, read as a whole."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..config import ModelConfig
from ..embed.late_chunking import Window, parse_chunk_request, tokenize_documents
from ..text.packing import ROW_LENGTHS, max_texts
from .call import EmbedCall
from .errors import ApiError, invalid
from .texts import CHARACTERS_PER_TOKEN, TokenizedText

if TYPE_CHECKING:
    import tokenizers

_MOST_EMBEDDINGS = max_texts(ROW_LENGTHS[-1])
"""Chunks of the longest row; a window with more is computed once for each so many."""


class Chunks(NamedTuple):
    """The windows of a document, as the batcher takes them."""

    texts: list[TokenizedText]
    chunks: list[list[int]]
    """Chunks that the embeddings of each text are parts of."""
    counts: list[list[int]]
    """Tokens of those parts."""
    tokens: int
    """Of the document, each counted once."""


def tokenize_chunks(backend: "tokenizers.Tokenizer", call: EmbedCall, config: ModelConfig) -> Chunks:
    """Returns the document of a request in windows: one, if it is within the limit.

    Raises:
        ApiError: it is over the limit and truncation was not asked for, or a chunk has no token.
    """
    limit, most = call.limits.tokens, CHARACTERS_PER_TOKEN * call.limits.tokens
    if (characters := sum(map(len, call.texts))) > most:
        raise invalid("input", f"has {characters:,} characters in all; with late_chunking the limit is {most:,}", "too_large")
    prefix = call.task.prefix
    try:
        request = parse_chunk_request([call.texts], "", True, None, "framed", None, prefix, None, 1, limit, config, limit)
        windows, _ = tokenize_documents(backend, request)
    except ApiError:
        raise
    except ValueError as error:
        raise ApiError(400, f"input: {error}", param="input", code="no_chunk") from error
    tokens = sum(int((window.chunk_ids >= 0).sum()) for window in windows)
    if len(windows) > 1 and call.limits.truncate == "none":
        size = f"has {tokens:,} tokens in all, with its instruction and the special tokens"
        how = f"{call.limits.how} to have it read through windows that overlap"
        code = "INPUT_TOKEN_LIMIT_EXCEEDED"
        raise invalid("input", f"is too long: it {size}; the limit of late_chunking is {limit:,} tokens. {how}", code)
    parts = [part for window in windows for part in _parts(window, call.task.adapter)]
    return Chunks([text for text, *_ in parts], [chunks for _, chunks, _ in parts], [counts for *_, counts in parts], tokens)


def _parts(window: Window, adapter: int) -> list[tuple[TokenizedText, list[int], list[int]]]:
    """A window for each so many of its chunks."""
    chunks, counts = np.unique(window.chunk_ids[window.chunk_ids >= 0], return_counts=True)
    parts = []
    for start in range(0, len(chunks), _MOST_EMBEDDINGS):
        some = chunks[start : start + _MOST_EMBEDDINGS]
        held = np.isin(window.chunk_ids, some)
        pool_ids = np.where(held, np.searchsorted(some, window.chunk_ids) + 1, 0).astype(np.int32)
        text = TokenizedText(window.token_ids.tolist(), adapter, pool_ids, len(some))
        parts.append((text, some.tolist(), counts[start : start + _MOST_EMBEDDINGS].tolist()))
    return parts


def join_chunks(chunks: Chunks, results: Sequence[np.ndarray], texts: int) -> list[np.ndarray]:
    """Returns the mean of each chunk over all windows, from the means of their parts."""
    out = np.zeros((texts, results[0].shape[-1]), np.float32)
    totals = np.zeros(texts, np.int64)
    for held, counts in zip(chunks.chunks, chunks.counts, strict=True):
        np.add.at(totals, held, counts)
    for held, counts, means in zip(chunks.chunks, chunks.counts, results, strict=True):
        np.add.at(out, held, means * (np.array(counts) / totals[held]).astype(np.float32)[:, None])
    return [*out]

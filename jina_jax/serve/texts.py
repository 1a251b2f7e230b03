"""The texts of a request as tokens: behind their instruction, within the limit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from .errors import invalid
from .tasks import Task

if TYPE_CHECKING:
    import tokenizers

CHARACTERS_PER_TOKEN = 250
"""Characters that are tokenised for each token of the limit: a longer text is refused, or cut,
before that."""

Truncate = Literal["none", "start", "end"]
"""What becomes of a text that is too long: an error, or it loses its start or its end."""


class TokenizedText(NamedTuple):
    """A text as the model takes it."""

    token_ids: list[int]
    """With instruction and special tokens."""
    adapter: int
    pool_ids: Int[np.ndarray, " t"] | None = None
    """Which of several embeddings each token is averaged into, from 1; None = all into one."""
    embeddings: int = 1
    cut: bool = False
    """Whether it was longer than the limit."""


@dataclass(frozen=True)
class Limits:
    """Tokens of a text, and what becomes of a longer one."""

    tokens: int
    truncate: Truncate
    name: Callable[[int], str]
    """From the index of a text to what the request calls it, for messages."""
    how: str
    """How a request asks for truncation, for messages."""


def tokenize_texts(
    backend: "tokenizers.Tokenizer", texts: Sequence[str], first: int, task: Task, limits: Limits
) -> list[TokenizedText]:
    """Returns the tokens of some texts of a request.

    Args:
        backend: from `text.tokenizer.private_backend`.
        texts: to tokenise, valid Unicode.
        first: index of the first of them in the request.
        task: what they are embedded with.
        limits: of the request.

    Raises:
        ApiError: a text is too long, and truncation was not asked for.
    """
    most = CHARACTERS_PER_TOKEN * limits.tokens
    shortened = []
    for index, text in enumerate(texts, first):
        if len(text) > most and limits.truncate == "none":
            raise _too_long(limits, index, f"{len(text):,} characters")
        shortened.append(text[-most:] if limits.truncate == "start" else text[:most])
    encodings = backend.encode_batch_fast([task.prefix + text for text in shortened])
    tokenized = []
    for index, (text, short, encoding) in enumerate(zip(texts, shortened, encodings, strict=True), first):
        ids, cut = encoding.ids, len(short) < len(text)
        if len(ids) > limits.tokens:
            if limits.truncate == "none":
                raise _too_long(limits, index, f"{len(ids):,} tokens, with its instruction and the special tokens")
            ids, cut = _shorten(backend, short, ids, task.prefix, limits), True
        tokenized.append(TokenizedText(ids, task.adapter, cut=cut))
    return tokenized


def _shorten(backend: "tokenizers.Tokenizer", text: str, ids: list[int], prefix: str, limits: Limits) -> list[int]:
    """The first tokens, or the instruction and the last tokens, and the last special token."""
    kept = limits.tokens - 1
    if limits.truncate == "end":
        return ids[:kept] + ids[-1:]
    head = min(_tokens_before(backend.encode(prefix + text), len(prefix)), kept)
    return ids[:head] + ids[len(ids) - 1 - (kept - head) :]


def _tokens_before(encoding: Any, characters: int) -> int:
    """Special and instruction tokens at the start of a text."""
    parts = zip(encoding.special_tokens_mask, encoding.offsets, strict=True)
    of_text = (index for index, (special, (_, end)) in enumerate(parts) if not special and end > characters)
    return next(of_text, len(encoding.ids) - 1)


def _too_long(limits: Limits, index: int, size: str) -> Exception:
    return invalid(
        limits.name(index),
        f"is too long: it has {size}; the limit is {limits.tokens:,} tokens. {limits.how} to have it cut",
        "INPUT_TOKEN_LIMIT_EXCEEDED",
    )

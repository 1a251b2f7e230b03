"""Whole-word masking for masked language modelling (MLM; Devlin et al., 2019).

The tokens of a word are masked together or not at all.
"""

import math
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from jina_jax.text.tokenizer import Tokenizer

WORD_BOUNDARY = "▁"
"""Character that SentencePiece writes for the space before a word."""

UNSPACED_SCRIPTS = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Scripts written without spaces between words, as prefixes of the Unicode names of their
characters."""


def word_starts(tokenizer: Tokenizer) -> Bool[np.ndarray, " v"]:
    """Returns, for each token of the vocabulary, whether it begins a word.

    A word is the text between two spaces. In scripts without spaces that would be an entire
    sentence, so there every token is a separate word, together with letters and marks of other
    scripts that follow it without a space.

    Raises:
        ValueError: the vocabulary is not SentencePiece's: no token holds a space.
    """
    pieces = tokenizer.get_vocab()
    if not any(piece.startswith(WORD_BOUNDARY) for piece in pieces):
        raise ValueError(f"the tokenizer marks no words: none of its {len(pieces)} pieces starts with {WORD_BOUNDARY!r}")
    starts = np.zeros(max(pieces.values()) + 1, bool)
    for piece, token in pieces.items():
        starts[token] = piece.startswith(WORD_BOUNDARY) or unicodedata.name(piece[:1], "").startswith(UNSPACED_SCRIPTS)
    return starts


def max_masked(tokens: int, rate: float, texts: int = 1) -> int:
    """Maximum number of masked tokens in `texts` texts of `tokens` tokens together.

    For one text it is ceil(rate * tokens).
    """
    return math.ceil(round(rate * tokens, 9)) + texts - 1  # 0.07 * 100 is 7, not the next float


def mask_words(
    tokens: Int[np.ndarray, " n"],
    starts: Bool[np.ndarray, " v"],
    *,
    rate: float,
    mask_id: int,
    special_ids: Sequence[int],
    rng: np.random.Generator,
    mask_share: float = 0.8,
    random_share: float = 0.1,
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Masks words of one text in random order.

    Words are masked as long as they fit into `max_masked(ordinary tokens, rate)`. A word that does
    not fit any more is skipped, as in BERT. If no word fits, the first tokens of one word are
    masked up to that number, so that every text with an ordinary token has a masked one. No other
    word is masked incompletely.

    Args:
        tokens: ids of the text, with or without its special tokens.
        starts: from `word_starts`.
        rate: fraction of ordinary tokens to mask, in (0, 1].
        mask_id: token that replaces a masked one.
        special_ids: tokens that are never masked, belong to no word and replace no token, `<unk>`
            among them.
        rng: random generator; the same state gives the same masks.
        mask_share: probability that a masked token becomes `mask_id`; drawn for each token, as in
            BERT.
        random_share: probability that it becomes any ordinary token; with the remaining probability
            it stays unchanged.

    Returns:
        The token ids with masks, and labels: the original id where masked, -1 elsewhere; both
        int32.

    Raises:
        ValueError: a rate or probability out of its range, or a token id outside the vocabulary.
    """
    _check(tokens, starts, rate, mask_share, random_share)
    special = np.isin(tokens, special_ids)
    words = np.cumsum(starts[tokens] | special)
    ordinary = np.flatnonzero(~special)
    masked = ordinary[_drawn(words[ordinary], max_masked(len(ordinary), rate), rng)]

    inputs, labels = tokens.astype(np.int32), np.full(len(tokens), -1, np.int32)
    labels[masked] = tokens[masked]
    fate = rng.random(len(masked))
    inputs[masked[fate < mask_share]] = mask_id
    random = masked[(fate >= mask_share) & (fate < mask_share + random_share)]
    inputs[random] = _ordinary_tokens(len(random), len(starts), special_ids, rng)
    return inputs, labels


def _check(tokens: np.ndarray, starts: np.ndarray, rate: float, mask_share: float, random_share: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(f"rate must be in (0, 1], not {rate!r}")
    if not (0 <= mask_share and 0 <= random_share and mask_share + random_share <= 1):
        raise ValueError(f"mask_share {mask_share!r} and random_share {random_share!r} must be shares of at most 1 together")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(starts):
        raise ValueError(f"token ids must be in 0..{len(starts) - 1}, not {tokens.min()}..{tokens.max()}")


def _drawn(words: Int[np.ndarray, " n"], budget: int, rng: np.random.Generator) -> Int[np.ndarray, " m"]:
    """Draws at most `budget` indices of tokens to mask; `words` says which word a token is of."""
    _, words, sizes = np.unique(words, return_inverse=True, return_counts=True)
    order = rng.permutation(len(sizes))
    drawn, left = np.zeros(len(sizes), bool), budget
    for word, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if size <= left:
            drawn[word] = True
            left -= size
    if left == budget:
        return np.flatnonzero(words == order[:1])[:budget]
    return np.flatnonzero(drawn[words])


def _ordinary_tokens(count: int, vocab_size: int, special_ids: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Draws tokens uniformly from the vocabulary without the special ones."""
    special = np.unique(special_ids).astype(np.int64)
    drawn = rng.integers(vocab_size - len(special), size=count)
    # Moves each draw past the special tokens below it.
    return drawn + np.searchsorted(special - np.arange(len(special)), drawn, side="right")

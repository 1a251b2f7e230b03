"""Cuts a document into chunks of tokens or of sentences: slices that join to the text.

Every slice has a token that begins in it, so that late chunking has a vector for it; none is of
white space alone. A text without any token has no chunks.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from .tokenizer import Tokenizer, without_limits

if TYPE_CHECKING:
    import tokenizers

Chunker = Callable[[str], list[str]]


def by_tokens(text: str, tokens: int, tokenizer: "Tokenizer | tokenizers.Tokenizer") -> list[str]:
    """Returns slices of up to `tokens` tokens each.

    A slice has more only where one character has more.

    Args:
        text: of any length.
        tokens: at least 1, special tokens not counted.
        tokenizer: of the model that embeds the slices, transformers' or that of the Rust library;
            one that truncates or pads is copied first, each time.

    Raises:
        ValueError: `tokens` is not valid.
    """
    _check_count("tokens", tokens)
    cuts: list[int] = []
    filled = tokens  # the first piece begins a slice
    for first, size in _pieces(text, tokenizer):
        if filled + size > tokens:
            cuts.append(first)
            filled = 0
        filled += size
    return _slices(text, cuts)


def by_sentences(text: str, sentences: int, tokenizer: "Tokenizer | tokenizers.Tokenizer") -> list[str]:
    """Returns slices of `sentences` sentences each; the last may have fewer.

    Sentences end where Unicode's rules have them end (UAX 29): at full stops, question and
    exclamation marks of all scripts with the quotes and brackets that close behind them, and at
    line ends; other than there, an opening bracket is of the next sentence. An abbreviation before
    a capital letter ends one, too. A slice begins with a token: what holds none, such as an empty
    line, is of the sentence before.

    Args:
        text: of any length.
        sentences: at least 1.
        tokenizer: of the model that embeds the slices, transformers' or that of the Rust library;
            one that truncates or pads is copied first, each time.

    Raises:
        ValueError: `sentences` is not valid.
    """
    _check_count("sentences", sentences)
    ends = np.array([match.end() for match in _sentence_end().finditer(text)], np.int64)
    firsts = np.array([first for first, _ in _pieces(text, tokenizer)], np.int64)
    sentence_ids = np.searchsorted(ends, firsts, side="right")  # of each piece
    begins = firsts[np.diff(sentence_ids, prepend=-1) > 0]
    return _slices(text, begins[::sentences].tolist())


def first_characters(visible: np.ndarray) -> Int[np.ndarray, " n"]:
    """Returns for each place of a text, its end included, the first visible character from there
    on; the length of the text where there is none.

    Args:
        visible: [length of the text] bool.
    """
    n = len(visible)
    places = np.append(np.where(visible, np.arange(n), n), n)
    return np.minimum.accumulate(places[::-1])[::-1]


def not_white_space(text: str) -> np.ndarray:
    """Returns which characters of a text are no white space: [length] bool."""
    return ~np.fromiter(map(str.isspace, text), bool, len(text))


def _pieces(text: str, tokenizer: "Tokenizer | tokenizers.Tokenizer") -> Iterator[tuple[int, int]]:
    """Yields (first visible character, number of tokens) of each run of tokens that share
    characters; tokens of white space alone are of the piece before them."""
    encoding = without_limits(tokenizer).encode(text, add_special_tokens=False)
    following = first_characters(not_white_space(text))
    first, size, covered = None, 0, 0
    for start, end in encoding.offsets:
        begin = int(following[start])
        if begin < end and begin >= covered:
            if first is not None:
                yield first, size
                size = 0
            first = begin
        size += 1
        covered = max(covered, end)
    if first is not None:
        yield first, size


def _slices(text: str, cuts: list[int]) -> list[str]:
    """Slices that begin at the cuts; the first begins with the text."""
    if not cuts:
        return []
    bounds = [0, *cuts[1:], len(text)]
    return [text[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


@cache
def _sentence_end() -> Any:
    """Pattern of UAX 29's sentence ends; the numbers are those of its rules."""
    import regex

    skip = r"[\p{SB=Extend}\p{SB=Format}]*"  # SB5
    line_end = r"(?:\r\n|[\p{SB=CR}\p{SB=LF}\p{SB=Sep}])"  # SB3, SB4
    behind = rf"(?:(?!\p{{Ps}})\p{{SB=Close}}{skip}+)*+(?:\p{{SB=Sp}}{skip}+)*+"  # SB9, SB10
    no_letter = r"[^\p{SB=OLetter}\p{SB=Upper}\p{SB=Lower}\p{SB=Sep}\p{SB=CR}\p{SB=LF}\p{SB=STerm}\p{SB=ATerm}]"
    return regex.compile(
        rf"""
        (?: \p{{SB=ATerm}}{skip}+
            (?! \p{{SB=Numeric}} | (?<=[\p{{SB=Upper}}\p{{SB=Lower}}]{skip}\p{{SB=ATerm}}{skip})\p{{SB=Upper}} )  # SB6, SB7
            {behind}
            (?! {no_letter}*+\p{{SB=Lower}} )  # SB8
          | \p{{SB=STerm}}{skip}+{behind} )
        (?! [\p{{SB=SContinue}}\p{{SB=STerm}}\p{{SB=ATerm}}] )  # SB8a
        {line_end}?+  # SB11
        | {line_end}
        """,
        regex.VERBOSE,
    )


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")

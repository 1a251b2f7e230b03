"""The filter of pairs in the jina-embeddings-v3 paper: pairs that share nearly all words teach only to compare words."""

MIN_WORDS = 4
"""Fewer words than this are too few to call two texts alike."""

MAX_SHARE = 0.8
"""Share of the shorter text's words in the longer one from which on a pair is dropped."""


def overlaps(a: str, b: str) -> bool:
    """Whether at least 80 % of the words of the shorter text, and at least 4, occur in the longer text.

    Words are what stands between white space, repeated ones counted each time, compared without regard to case; they count
    where they occur inside other words, too. The shorter text is that of fewer words, at a tie that of fewer characters.
    The paper leaves these open.

    A text written without spaces, as in Japanese, is one word, so such a pair never overlaps.
    """
    shorter, longer = sorted((a.casefold(), b.casefold()), key=lambda text: (len(text.split()), len(text), text))
    words = shorter.split()
    shared = sum(word in longer for word in words)
    return shared >= MIN_WORDS and shared >= MAX_SHARE * len(words)

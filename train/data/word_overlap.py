"""Filter of pairs in the jina-embeddings-v3 paper.

Pairs that share nearly all words teach only to compare words.
"""

MIN_WORDS = 4
"""Shared words from which on two texts may be called alike; fewer are too few."""

MAX_SHARE = 0.8
"""Fraction of the shorter text's words in the longer one from which on a pair is dropped."""


def overlaps(a: str, b: str) -> bool:
    """Tells whether at least 80 % and at least 4 of the shorter text's words occur in the longer.

    Words are strings between white space, compared without regard to case. Repeated words count
    each time, and a word counts where it occurs inside another one, too. The shorter text is the
    one with fewer words, at a tie the one with fewer characters. The paper leaves these points
    open.

    A text written without spaces, as in Japanese, is one word, so such a pair never overlaps.
    """
    shorter, longer = sorted((a.casefold(), b.casefold()), key=lambda text: (len(text.split()), len(text), text))
    words = shorter.split()
    shared = sum(word in longer for word in words)
    return shared >= MIN_WORDS and shared >= MAX_SHARE * len(words)

"""Filter of pairs in the jina-embeddings-v3 paper.

Pairs that share nearly all words teach only to compare words.
"""

from collections import Counter, deque
from collections.abc import Collection

MIN_WORDS = 4
"""Shared words from which on two texts may be called alike; fewer are too few."""

MAX_SHARE = 0.8
"""Fraction of the shorter text's words in the longer one from which on a pair is dropped."""

FEW = 16
"""Words up to which each is searched for by itself, which is faster than all of them at once."""


def overlaps(a: str, b: str) -> bool:
    """Tells whether at least 80 % and at least 4 of the shorter text's words occur in the longer.

    Words are strings between white space, compared without regard to case. Repeated words count
    each time, and a word counts where it occurs inside another one, too. The shorter text is the
    one with fewer words, at a tie the one with fewer characters. The paper leaves these points
    open.

    A text written without spaces, as in Japanese, is one word, so such a pair never overlaps. The
    time is linear in the length of the texts.
    """
    shorter, longer = sorted((a.casefold(), b.casefold()), key=lambda text: (len(text.split()), len(text), text))
    counts, others = Counter(shorter.split()), set(longer.split())
    least = max(MIN_WORDS, MAX_SHARE * counts.total())
    shared = sum(count for word, count in counts.items() if word in others)
    if shared >= least or counts.total() < least:
        return shared >= least
    inside = found_inside(counts.keys() - others, others)
    return shared + sum(counts[word] for word in inside) >= least


def found_inside(words: Collection[str], texts: Collection[str]) -> set[str]:
    """Returns those of `words` that occur inside any of `texts`."""
    if len(words) <= FEW:
        joined = "\n".join(texts)
        return {word for word in words if word in joined}
    return _found_at_once(words, texts)


def _found_at_once(words: Collection[str], texts: Collection[str]) -> set[str]:
    """The same in one pass over the texts, by the automaton of Aho and Corasick (1975).

    A node is a prefix of words. Its link leads to the longest end of that prefix which is a node,
    too.
    """
    children: list[dict[str, int]] = [{}]
    ends = {}
    for word in words:
        node = 0
        for character in word:
            if character not in children[node]:
                children[node][character] = len(children)
                children.append({})
            node = children[node][character]
        ends[word] = node
    links, order, waiting = [0] * len(children), [], deque(children[0].values())
    while waiting:
        order.append(node := waiting.popleft())
        for character, child in children[node].items():
            links[child] = _step(links[node], character, children, links)
            waiting.append(child)
    reached = [False] * len(children)
    for text in texts:
        node = 0
        for character in text:
            node = _step(node, character, children, links)
            reached[node] = True
    for node in reversed(order):  # what ends a reached prefix was reached with it
        if reached[node]:
            reached[links[node]] = True
    return {word for word, node in ends.items() if reached[node]}


def _step(node: int, character: str, children: list[dict[str, int]], links: list[int]) -> int:
    """Returns the node of the longest known end of a prefix and one more character."""
    while node and character not in children[node]:
        node = links[node]
    return children[node].get(character, 0)

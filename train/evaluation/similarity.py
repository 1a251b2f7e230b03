"""Similarity: rank correlation of the cosines of packages' texts and the overlaps of their tags."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from scipy.stats import spearmanr

from ..data.corpus import SEED, Package, tag_overlap, title_and_body

PAIRS = {"en": 2000, "en-other": 1000}
"""Pairs of each subset: English with English, and English with another language."""

MIN_PAIRS = 10

DRAWS_PER_PAIR = 4
"""Draws for each pair that is asked for: a small corpus has fewer different pairs than that."""


@dataclass(frozen=True)
class Similarity:
    """Pairs of texts (left, right), and the Jaccard overlap of the tags of their packages."""

    subset: str
    left: Sequence[str]
    right: Sequence[str]
    overlaps: Float[np.ndarray, " p"]

    name: ClassVar[str] = "similarity"
    metric: ClassVar[str] = "spearman"

    @property
    def n(self) -> int:
        return len(self.left)

    def score(self, first: Float[np.ndarray, "p d"], second: Float[np.ndarray, "p d"]) -> float:
        """Spearman correlation of cosine and overlap; embeddings are normalised."""
        cosines = np.einsum("pd,pd->p", first, second)
        if np.ptp(cosines) == 0:
            return 0.0  # not defined: such a model cannot tell one pair from another
        return float(spearmanr(cosines, self.overlaps)[0])  # type: ignore[arg-type]


def similarity_tasks(english: Sequence[Package]) -> Iterator[Similarity]:
    """Yields both subsets, if they have enough pairs, and overlaps that differ.

    Half of the pairs are random, and half share a tag or the section, so that overlaps spread.
    """
    tagged = [package for package in english if package.tags]
    for subset, count in PAIRS.items():
        rng = np.random.default_rng(SEED)
        partners = tagged if subset == "en" else [package for package in tagged if len(package.text) > 1]
        pairs = _random_pairs(tagged, partners, count // 2, rng)
        pairs |= _related_pairs(tagged, partners, count // 2, rng)
        overlaps = np.array([tag_overlap(first, second) for first, second in pairs.values()])
        if len(pairs) >= MIN_PAIRS and np.ptp(overlaps) > 0:
            left = [title_and_body(first) for first, _ in pairs.values()]
            languages = [_language(second, subset, rng) for _, second in pairs.values()]
            right = [title_and_body(pair[1], language) for pair, language in zip(pairs.values(), languages, strict=True)]
            yield Similarity(subset, left, right, overlaps)


Pairs = dict[tuple[str, str], tuple[Package, Package]]
"""Pairs by both ids in alphabetical order, so that no pair is drawn twice."""


def _random_pairs(firsts: Sequence[Package], seconds: Sequence[Package], count: int, rng: np.random.Generator) -> Pairs:
    return _different_sources(((_any(firsts, rng), _any(seconds, rng)) for _ in range(_draws(firsts, seconds, count))), count)


def _related_pairs(firsts: Sequence[Package], seconds: Sequence[Package], count: int, rng: np.random.Generator) -> Pairs:
    """Pairs that share a tag or the section; the shared label is drawn from the first package's."""
    sharing: dict[str, list[Package]] = defaultdict(list)
    for package in seconds:
        for label in (package.section, *package.tags):
            sharing[label].append(package)

    def drawn() -> Iterator[tuple[Package, Package]]:
        for _ in range(_draws(firsts, seconds, count)):
            first = _any(firsts, rng)
            if partners := sharing.get(_any((first.section, *first.tags), rng)):
                yield first, _any(partners, rng)

    return _different_sources(drawn(), count)


def _draws(firsts: Sequence[Package], seconds: Sequence[Package], count: int) -> int:
    return DRAWS_PER_PAIR * count if firsts and seconds else 0


def _different_sources(drawn: Iterator[tuple[Package, Package]], count: int) -> Pairs:
    """The first `count` different pairs; packages of one source, near-duplicates, are left out."""
    pairs: Pairs = {}
    for first, second in drawn:
        if len(pairs) == count:
            break
        if first.source != second.source:
            pairs[min(first.id, second.id), max(first.id, second.id)] = first, second
    return pairs


def _any(items: Sequence, rng: np.random.Generator):
    return items[int(rng.integers(len(items)))]


def _language(package: Package, subset: str, rng: np.random.Generator) -> str:
    return "en" if subset == "en" else str(rng.choice(sorted(set(package.text) - {"en"})))

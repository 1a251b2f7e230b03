"""Retrieval of English bodies of packages by their titles, in English and in other languages."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int
from sklearn.metrics import ndcg_score

from ..data.corpus import Package

MIN_PACKAGES = 20
"""Packages that a language needs in the split to be a subset."""

QUERIES_AT_ONCE = 1024
"""Rows of the score matrix that are ranked at once; bounds memory."""


@dataclass(frozen=True)
class Retrieval:
    """Queries (left), candidates (right), and the index of each query's candidate.

    Query and candidate are of the same package.
    """

    subset: str
    left: Sequence[str]
    right: Sequence[str]
    relevant: Int[np.ndarray, " q"]

    name: ClassVar[str] = "retrieval"
    metric: ClassVar[str] = "ndcg@10"

    @property
    def n(self) -> int:
        return len(self.left)

    def score(self, queries: Float[np.ndarray, "q d"], candidates: Float[np.ndarray, "c d"]) -> float:
        """nDCG@10 of the ranking by cosine; embeddings are normalised."""
        return ndcg_at_10(lambda rows: queries[rows] @ candidates.T, self.relevant)


def retrieval_tasks(english: Sequence[Package]) -> Iterator[Retrieval]:
    """Yields titles over English bodies: English titles first, then those of other languages.

    Every other language with enough packages is a task, the largest first. Its titles over bodies
    in the same language are left out: these bodies are most of the corpus, and would take most of
    the time.
    """
    bodies = [package.text["en"].body for package in english]
    members: dict[str, list[int]] = defaultdict(list)
    for index, package in enumerate(english):
        for language in package.text:
            members[language].append(index)
    for language, indices in sorted(members.items(), key=lambda item: (item[0] != "en", -len(item[1]), item[0])):
        if language == "en" or len(indices) >= MIN_PACKAGES:
            titles = [english[index].text[language].title for index in indices]
            yield Retrieval("en" if language == "en" else f"{language}-en", titles, bodies, np.array(indices))


def ndcg_at_10(scores: Callable[[slice], Float[np.ndarray, "rows c"]], relevant: Int[np.ndarray, " q"]) -> float:
    """Mean nDCG@10 of queries with one relevant candidate each.

    A tie with the relevant candidate counts as the mean over all orders of the tie.

    Args:
        scores: returns the scores of all candidates for a slice of the queries.
        relevant: for each query the index of its relevant candidate.
    """
    total = 0.0
    for start in range(0, len(relevant), QUERIES_AT_ONCE):
        rows = slice(start, start + QUERIES_AT_ONCE)
        ranked, index = scores(rows), relevant[rows, None]
        relevance = np.zeros(ranked.shape)
        np.put_along_axis(relevance, index, 1, axis=1)
        # Without ties a faster computation is exact.
        tied = (ranked == np.take_along_axis(ranked, index, axis=1)).sum() > len(index)
        total += len(index) * float(ndcg_score(relevance, ranked, k=10, ignore_ties=not tied))
    return total / len(relevant)

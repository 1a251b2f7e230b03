"""Classification and clustering of English texts (title and body) by the section of the package."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import v_measure_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ..data.corpus import SEED, Package, title_and_body

FITTED_PER_SECTION = 16
"""Packages of each section that the classifier is fitted on.

A section with fewer in the train split is left out.
"""

CLUSTERING_RUNS = 5
"""Starts of k-means; the one with the least inertia counts."""


@dataclass(frozen=True)
class Classification:
    """Texts to fit a logistic regression on (left), and texts whose section it predicts (right)."""

    left: Sequence[str]
    left_sections: Sequence[str]
    right: Sequence[str]
    right_sections: Sequence[str]

    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"
    subset: ClassVar[str] = "en"

    @property
    def n(self) -> int:
        return len(self.right)

    def score(self, fitted: Float[np.ndarray, "m d"], measured: Float[np.ndarray, "n d"]) -> float:
        """Accuracy of the logistic regression.

        Features are standardised, so that the penalty weighs the same whatever their spread.
        """
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        classifier.fit(fitted, self.left_sections)
        return float(classifier.score(measured, self.right_sections))


@dataclass(frozen=True)
class Clustering:
    """Texts (left) and their sections."""

    left: Sequence[str]
    sections: Sequence[str]

    name: ClassVar[str] = "clustering"
    metric: ClassVar[str] = "v_measure"
    subset: ClassVar[str] = "en"
    right: ClassVar[Sequence[str]] = ()

    @property
    def n(self) -> int:
        return len(self.left)

    def score(self, embeddings: Float[np.ndarray, "n d"], _: Float[np.ndarray, "0 d"]) -> float:
        """V-measure between the sections and the clusters of k-means.

        There are as many clusters as sections.
        """
        distinct = len(np.unique(embeddings, axis=0))  # there cannot be more clusters than that
        clusters = min(len(set(self.sections)), distinct)
        means = KMeans(clusters, n_init=CLUSTERING_RUNS, random_state=SEED)  # type: ignore[arg-type]
        return float(v_measure_score(self.sections, means.fit(embeddings).labels_))


def classification_tasks(english: Sequence[Package], train: Sequence[Package]) -> Iterator[Classification]:
    """Yields the task that fits on a sample of each section of `train`.

    It measures the packages of these sections in `english` that it was not fitted on. A single
    section, or no package to measure, gives no task.
    """
    present = {package.section for package in english}
    members: dict[str, list[Package]] = defaultdict(list)
    for package in train:
        if package.section in present:
            members[package.section].append(package)
    rng, fitted = np.random.default_rng(SEED), []
    for _, candidates in sorted(members.items()):
        if len(candidates) >= FITTED_PER_SECTION:
            fitted += [candidates[index] for index in rng.permutation(len(candidates))[:FITTED_PER_SECTION]]
    sections, seen = {package.section for package in fitted}, {package.id for package in fitted}
    measured = [package for package in english if package.section in sections and package.id not in seen]
    if len(sections) > 1 and measured:
        yield Classification(_texts(fitted), _sections(fitted), _texts(measured), _sections(measured))


def clustering_tasks(english: Sequence[Package]) -> Iterator[Clustering]:
    """Yields the task of all texts, if they have more than one section."""
    sections = _sections(english)
    if len(set(sections)) > 1:
        yield Clustering(_texts(english), sections)


def _texts(packages: Sequence[Package]) -> list[str]:
    return [title_and_body(package) for package in packages]


def _sections(packages: Sequence[Package]) -> list[str]:
    return [package.section for package in packages]

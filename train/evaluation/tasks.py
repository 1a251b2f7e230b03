"""Evaluation tasks on the corpus: retrieval, classification, clustering and similarity.

Each task has two sides of texts, `left` and `right`, and `score` returns one number from the
embeddings of both. Samples are drawn with a fixed seed, so that every system and every run is
measured on the same texts.
"""

from collections.abc import Sequence

from ..data.corpus import Package
from .classification import Classification, Clustering, classification_tasks, clustering_tasks
from .retrieval import Retrieval, retrieval_tasks
from .similarity import Similarity, similarity_tasks

EvalTask = Retrieval | Classification | Clustering | Similarity


def corpus_tasks(packages: Sequence[Package], train_packages: Sequence[Package]) -> list[EvalTask]:
    """All tasks that the packages allow.

    There is no clustering of a single section, and no similarity without tags.

    Args:
        packages: those of the split to measure.
        train_packages: classifiers are fitted on a sample of these.

    Raises:
        ValueError: fewer than two packages have an English text.
    """
    english = [package for package in packages if "en" in package.text]
    if len(english) < 2:
        raise ValueError(f"at least 2 packages with an English text are needed to measure retrieval, not {len(english)}")
    return [
        *retrieval_tasks(english),
        *classification_tasks(english, [package for package in train_packages if "en" in package.text]),
        *clustering_tasks(english),
        *similarity_tasks(english),
    ]

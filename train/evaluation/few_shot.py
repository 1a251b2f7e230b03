"""MTEB's protocol for classification: classifiers fitted on a few texts of each class."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression

DRAWS, TEXTS_A_CLASS, SEED = 10, 8, 42

Encode = Callable[[Sequence[str]], Float[np.ndarray, "n d"]]


def few_shot_accuracies(
    encode: Encode, texts: Sequence[str], labels: Sequence[str], test_texts: Sequence[str], test_labels: Sequence[str]
) -> list[float]:
    """Accuracies on the test texts of logistic regressions, each fitted on another draw.

    Args:
        encode: embeds texts; each is embedded once.
        texts, labels: those to draw from.
        test_texts, test_labels: those to measure on.
    """
    draws = few_shot_draws(labels)
    used = sorted({row for rows in draws for row in rows})
    embedded = encode([*(texts[row] for row in used), *test_texts])
    embeddings, tested = dict(zip(used, embedded, strict=False)), embedded[len(used) :]
    accuracies = []
    for rows in draws:
        fitted = LogisticRegression(max_iter=100, random_state=SEED)
        fitted.fit(np.stack([embeddings[row] for row in rows]), [labels[row] for row in rows])
        accuracies.append(float(fitted.score(tested, test_labels)))
    return accuracies


def few_shot_draws(labels: Sequence[str]) -> list[list[int]]:
    """Rows of each draw: eight of each class, or all that it has.

    MTEB shuffles what it has shuffled before, by the same numbers.
    """
    order, draws = list(range(len(labels))), []
    for _ in range(DRAWS):
        np.random.RandomState(SEED).shuffle(order)
        counts, rows = defaultdict[str, int](int), []
        for row in order:
            if counts[labels[row]] < TEXTS_A_CLASS:
                counts[labels[row]] += 1
                rows.append(row)
        draws.append(rows)
    return draws

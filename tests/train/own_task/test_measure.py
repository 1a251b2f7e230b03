"""Scores of labels and of pairs, beside plain computations."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from train.data.records import LabelledText, Pair
from train.evaluation.few_shot import few_shot_draws
from train.own_task.measure import label_scores, pair_scores, rank_scores


def test_ranks_count_every_relevant_candidate():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((40, 30))
    relevant = [set(rng.choice(30, size=rng.integers(1, 15), replace=False).tolist()) for _ in scores]
    ndcg, recall = [], []
    for row, own in zip(scores, relevant, strict=True):
        found = [candidate in own for candidate in np.argsort(-row)[:10]]
        gains = 1 / np.log2(np.arange(2, 12))
        ndcg.append((gains * found).sum() / gains[: len(own)].sum())
        recall.append(sum(found) / len(own))
    got = rank_scores(lambda some: scores[some], relevant, 30)
    assert got["ndcg@10"] == pytest.approx(np.mean(ndcg)) and got["recall@10"] == pytest.approx(np.mean(recall))


def test_anchors_of_equal_text_are_one_query_with_several_positives():
    vectors = {"q": [1.0, 0], "r": [0, 1], "a": [1, 0], "b": [0.9, 0.1], "c": [0, 1]}
    encode = lambda texts: np.array([vectors[text] for text in texts], float)  # noqa: E731
    pairs = [Pair(anchor=q, positive=p) for q, p in [("q", "a"), ("q", "b"), ("r", "c"), ("q", "a")]]
    scores = pair_scores(encode, encode, pairs)
    assert scores["ndcg@10"] == scores["recall@10"] == 1
    assert scores["of"].startswith("2 anchors") and "3 positives" in scores["of"]


def test_accuracy_is_the_mean_over_draws_of_what_was_trained_on():
    rng = np.random.default_rng(0)
    texts, labels = [str(i) for i in range(60)], ["xyz"[i % 3] for i in range(60)]
    centres = {"x": [1, 0, 0], "y": [0, 1, 0], "z": [0, 0, 1]}
    vectors = np.array([centres[label] for label in labels]) + 0.8 * rng.standard_normal((60, 3))
    records = [LabelledText(text=text, label=label) for text, label in zip(texts, labels, strict=True)]
    got = label_scores(lambda some: vectors[[int(text) for text in some]], records[:45], records[45:])
    want = [
        LogisticRegression(random_state=42).fit(vectors[rows], np.array(labels)[rows]).score(vectors[45:], labels[45:])
        for rows in few_shot_draws(labels[:45])
    ]
    assert got["accuracy"] == pytest.approx(np.mean(want)) and got["std"] == pytest.approx(np.std(want)) and np.std(want) > 0
    assert "8 texts of each class" in got["of"] and "measured on 15 texts" in got["of"]

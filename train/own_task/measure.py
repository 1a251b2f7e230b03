"""Scores of a task on its held-out part: few-shot accuracy of labels, retrieval of pairs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.metrics import ndcg_score

from jina_jax import Embedder
from jina_jax.config import Side
from jina_jax.embed.sides import side_options

from ..data.records import LabelledText, Pair
from ..evaluation.few_shot import DRAWS, TEXTS_A_CLASS, Encode, few_shot_accuracies
from ..evaluation.retrieval import QUERIES_AT_ONCE

RANKS = 10
"""Best candidates that count in a ranking."""

CLASSIFICATION = "classification"
"""Published task for texts with labels."""

BATCH_SIZE = 64
"""Texts embedded at a time; bounds memory."""


def measure(
    embedder: Embedder, adapters: Sequence[str] | None, train: Sequence[Any], held_out: Sequence[Any], *, progress: bool
) -> dict[str, Any]:
    """Returns the scores of a model on a task, between 0 and 1, and `of`, what they are of.

    Args:
        embedder: the model.
        adapters: the one of labelled texts, or those of anchors and of positives; None = what
            `encode_query` and `encode_document` take; for labelled texts the published task of
            that kind, or where the model lacks it, what `encode_query` takes.
        train: records that were trained on.
        held_out: records to measure on.
        progress: show progress bars.
    """
    labelled = isinstance(held_out[0], LabelledText)
    query, document = (None, None) if adapters is None else (adapters[0], adapters[-1])
    if labelled and query is None and CLASSIFICATION in embedder.config.tasks:
        query = CLASSIFICATION
    anchors = _encoder(embedder, query, "query", progress)
    if labelled:
        return label_scores(anchors, train, held_out)
    return pair_scores(anchors, _encoder(embedder, document, "document", progress), held_out)


def label_scores(encode: Encode, train: Sequence[LabelledText], held_out: Sequence[LabelledText]) -> dict[str, Any]:
    """Accuracy by MTEB's protocol: mean and standard deviation over its draws of the records that
    were trained on."""
    accuracies = few_shot_accuracies(encode, *_columns(train), *_columns(held_out))
    of = (
        f"logistic regression on {TEXTS_A_CLASS} texts of each class, mean of {DRAWS} draws of the {len(train):,} trained on, "
        f"measured on {len(held_out):,} texts (MTEB's protocol)"
    )
    return {"accuracy": float(np.mean(accuracies)), "std": float(np.std(accuracies)), "of": of}


def pair_scores(query: Encode, document: Encode, held_out: Sequence[Pair]) -> dict[str, Any]:
    """nDCG@10 and recall@10 of the positives by their anchors.

    Candidates are all different positives of the held-out part. Anchors of equal text are one
    query, with several relevant candidates.
    """
    anchors = list(dict.fromkeys(pair.anchor for pair in held_out))
    candidates = list(dict.fromkeys(pair.positive for pair in held_out))
    rows, columns = ({text: index for index, text in enumerate(texts)} for texts in (anchors, candidates))
    queries, documents = query(anchors), document(candidates)
    relevant: list[set[int]] = [set() for _ in anchors]
    for pair in held_out:
        relevant[rows[pair.anchor]].add(columns[pair.positive])
    scores = rank_scores(lambda some: queries[some] @ documents.T, relevant, len(candidates))
    return scores | {"of": f"{len(anchors):,} anchors, each over {len(candidates):,} positives"}


def rank_scores(
    scores: Callable[[slice], Float[np.ndarray, "rows c"]], relevant: Sequence[set[int]], candidates: int
) -> dict[str, float]:
    """Mean nDCG@10 and recall@10 of queries with one or more relevant candidates.

    Args:
        scores: returns the scores of all candidates for a slice of the queries.
        relevant: for each query the indices of its relevant candidates.
        candidates: how many there are.
    """
    ndcg = recall = 0.0
    for start in range(0, len(relevant), QUERIES_AT_ONCE):
        some = slice(start, start + QUERIES_AT_ONCE)
        ranked, is_relevant = scores(some), np.zeros((len(relevant[some]), candidates))
        for row, own in enumerate(relevant[some]):
            is_relevant[row, list(own)] = 1
        ndcg += len(ranked) * float(ndcg_score(is_relevant, ranked, k=RANKS))
        best = np.argsort(-ranked, axis=1, kind="stable")[:, :RANKS]
        recall += float((np.take_along_axis(is_relevant, best, axis=1).sum(1) / is_relevant.sum(1)).sum())
    return {"ndcg@10": ndcg / len(relevant), "recall@10": recall / len(relevant)}


def _encoder(embedder: Embedder, task: str | None, side: Side, progress: bool) -> Encode:
    """Returns how texts are embedded: with a task, else as the base embeds a side."""
    options: dict[str, Any] = side_options(embedder.config, side) if task is None else {"task": task}
    return lambda texts: np.asarray(embedder.encode(texts, **options, batch_size=BATCH_SIZE, show_progress_bar=progress))


def _columns(records: Sequence[LabelledText]) -> tuple[list[str], list[str]]:
    return [record.text for record in records], [record.label for record in records]

"""Mining of hard negatives: texts that a search ranks high for an anchor to which they do not belong.

Ranks, scores and margins mean what they mean in sentence-transformers' `mine_hard_negatives`, and give the same negatives.
"""

import logging
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import regex
from jaxtyping import Bool, Float, Int

from jina_jax import Embedder

from .records import Pair, Triplet

SCORES_AT_ONCE = 2**24
"""Scores of anchors against all candidates that are held at a time."""

Scorer = Callable[[Sequence[str], Sequence[str]], Iterator[Float[np.ndarray, "b c"]]]
"""From anchors and candidates to blocks of scores: the first b anchors against all c candidates, then the next."""

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_TERMS = regex.compile(rf"(?V1)(?P<unspaced>[{_UNSPACED}]+)|[\w--[{_UNSPACED}]]+")


@dataclass(frozen=True)
class MiningConfig:
    """Which of the candidates that a search ranks best become negatives.

    Attributes:
        num_negatives: negatives of an anchor; an anchor with fewer gets none.
        range_min: best candidates to skip: they may be positives that nobody marked.
        range_max: rank of the last candidate to consider.
        max_score: highest score of a negative.
        min_score: lowest score of a negative.
        absolute_margin: how far below the positive's score a negative's is at least.
        relative_margin: the same as a fraction of the positive's score.
        sampling: the best candidates that are left, or random ones of them.

    Of several positives of an anchor, the one of the lowest score counts. Ranks are those of the candidates that scores and
    margins leave.

    Raises:
        ValueError: no candidate can meet the numbers.
    """

    num_negatives: int = 7
    range_min: int = 10
    range_max: int = 100
    max_score: float | None = None
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    sampling: Literal["top", "random"] = "top"

    def __post_init__(self):
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives must be at least 1, not {self.num_negatives}")
        if not 0 <= self.range_min < self.range_max:
            raise ValueError(f"range_min must be in 0..range_max - 1, not {self.range_min} with range_max {self.range_max}")
        if self.num_negatives > self.range_max - self.range_min:
            raise ValueError(
                f"range_min {self.range_min} and range_max {self.range_max} leave {self.range_max - self.range_min} "
                f"candidates, fewer than num_negatives {self.num_negatives}"
            )
        if self.sampling not in ("top", "random"):
            raise ValueError(f"unknown sampling {self.sampling!r}; valid are ['top', 'random']")
        for name in ("max_score", "min_score", "absolute_margin", "relative_margin"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} must be a number, not {value!r}")


def mine(
    pairs: Sequence[Pair],
    scorer: Scorer,
    config: MiningConfig,
    *,
    same_language: bool = False,
    seed: int = 0,
) -> list[Triplet]:
    """Finds negatives of each pair's anchor among the positives of all pairs.

    Never a negative of an anchor: its positives, a text equal to it, and texts of pairs of its `group`.

    Args:
        pairs: repeated ones count once.
        scorer: `bm25_scores`, `embedding_scores(...)`, or any other.
        config: which of the best candidates to take.
        same_language: take negatives from pairs of the anchor's language alone.
        seed: of random sampling.

    Returns:
        The pairs with their negatives, best first, in the order given (with `same_language` one language after the other);
        without the pairs whose anchor has too few negatives.

    Raises:
        ValueError: there are no pairs.
    """
    if not pairs:
        raise ValueError("there are no pairs to mine negatives for")
    rng = np.random.default_rng(seed)
    parts: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        parts[pair.language if same_language else ""].append(pair)
    return [triplet for part in parts.values() for triplet in _mine_part(part, scorer, config, rng)]


def _mine_part(pairs: list[Pair], scorer: Scorer, config: MiningConfig, rng: np.random.Generator) -> Iterator[Triplet]:
    relations = _Relations(pairs)
    pool = config.range_max + max(map(len, relations.positives))  # leaves room for positives, as sentence-transformers does
    blocks, first = [], 0
    for scores in scorer(relations.anchors, relations.candidates):
        own = range(first, first + len(scores))
        positives, excluded = [relations.positives[i] for i in own], [relations.excluded(i) for i in own]
        blocks.append(pick_negatives(scores, positives, excluded, pool, config, rng))
        first += len(scores)
    negatives = dict(zip(relations.anchors, np.concatenate(blocks), strict=True))
    for pair in distinct(pairs):
        found = negatives[pair.anchor]
        if (found >= 0).all():
            texts = tuple(relations.candidates[i] for i in found)
            yield Triplet(**pair.model_dump(include=set(Pair.model_fields)), negatives=texts)


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """The first pair of every anchor and positive."""
    first: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        first.setdefault((pair.anchor, pair.positive), pair)
    return list(first.values())


class _Relations:
    """Which candidates belong to which anchor.

    Attributes:
        anchors: each once.
        candidates: all positives, each once.
        positives: the indices of each anchor's positives.
    """

    def __init__(self, pairs: Sequence[Pair]):
        self.anchors = list(dict.fromkeys(pair.anchor for pair in pairs))
        self.candidates = list(dict.fromkeys(pair.positive for pair in pairs))
        self._index = {text: i for i, text in enumerate(self.candidates)}
        positives, self._groups = defaultdict(set), defaultdict(set)
        members = defaultdict(set)
        for pair in pairs:
            positives[pair.anchor].add(self._index[pair.positive])
            if pair.group:
                self._groups[pair.anchor].add(pair.group)
                members[pair.group].add(self._index[pair.positive])
        self.positives = [_indices(positives[anchor]) for anchor in self.anchors]
        self._members = {group: _indices(texts) for group, texts in members.items()}

    def excluded(self, anchor: int) -> Int[np.ndarray, " n"]:
        """Candidates beside its positives that are no negatives of an anchor: a text equal to it, and those of its groups."""
        text = self.anchors[anchor]
        equal = _indices([self._index[text]] if text in self._index else [])
        group_members = [self._members[group] for group in self._groups.get(text, ())]
        return np.setdiff1d(np.concatenate([equal, *group_members]), self.positives[anchor])


def pick_negatives(
    scores: Float[np.ndarray, "b c"],
    positives: Sequence[Int[np.ndarray, " p"]],
    excluded: Sequence[Int[np.ndarray, " n"]],
    pool: int,
    config: MiningConfig,
    rng: np.random.Generator,
) -> Int[np.ndarray, "b m"]:
    """Negatives of a block of anchors, as `select` gives them, from the `pool` best of all candidates.

    Args:
        scores: of each anchor with each candidate.
        positives: each anchor's positives, at least one.
        excluded: other candidates of which each anchor's search knows nothing.
        pool: candidates to rank, positives included.
    """
    scores = scores.copy()
    lowest = np.array([scores[row, own].min() for row, own in enumerate(positives)])
    for row, others in enumerate(excluded):
        scores[row, others] = -np.inf
    best, indices = top(scores, pool)
    is_positive = np.stack([np.isin(indices[row], own) for row, own in enumerate(positives)])
    return select(best, indices, is_positive, lowest, config, rng)


def top(scores: Float[np.ndarray, "b c"], k: int) -> tuple[Float[np.ndarray, "b k"], Int[np.ndarray, "b k"]]:
    """The k best scores of each row, best first, and where they are; all of them where there are fewer."""
    if k < scores.shape[1]:
        indices = np.argpartition(scores, -k, axis=1)[:, -k:]
    else:
        indices = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    best = np.take_along_axis(scores, indices, axis=1)
    order = np.lexsort((indices, -best))
    return np.take_along_axis(best, order, axis=1), np.take_along_axis(indices, order, axis=1)


def select(
    scores: Float[np.ndarray, "b k"],
    indices: Int[np.ndarray, "b k"],
    is_positive: Bool[np.ndarray, "b k"],
    positive_scores: Float[np.ndarray, " b"],
    config: MiningConfig,
    rng: np.random.Generator,
) -> Int[np.ndarray, "b m"]:
    """The negatives of each anchor among its best candidates, best first; -1 where there are too few.

    Args:
        scores: of each anchor's candidates, best first; -inf = no candidate.
        indices: of the candidates.
        is_positive: which of them are positives of the anchor.
        positive_scores: the lowest score of a positive of each anchor.
    """
    out_of_reach = is_positive | _beyond_limits(scores, positive_scores[:, None], config)
    order = np.argsort(out_of_reach, axis=1, kind="stable")[:, config.range_min : config.range_max]
    indices = np.take_along_axis(np.where(out_of_reach, -1, indices), order, axis=1)
    if config.sampling == "random":
        indices = np.stack([_sample(row, config.num_negatives, rng) for row in indices])
    negatives = np.full((len(scores), config.num_negatives), -1, np.int64)
    found = indices[:, : config.num_negatives]
    negatives[:, : found.shape[1]] = found
    return negatives


def _beyond_limits(scores: np.ndarray, positive: np.ndarray, config: MiningConfig) -> Bool[np.ndarray, "b k"]:
    """Scores that miss a margin or a limit."""
    positive = np.maximum(positive, np.finfo(np.float32).min).astype(np.float64)  # an infinite one times 0 is no number
    excluded = scores == -np.inf
    if config.absolute_margin is not None:
        excluded |= scores + config.absolute_margin > positive
    if config.relative_margin is not None:
        excluded |= scores > positive - np.abs(positive) * config.relative_margin
    if config.max_score is not None:
        excluded |= scores > config.max_score
    if config.min_score is not None:
        excluded |= scores < config.min_score
    return excluded


def _sample(indices: Int[np.ndarray, " w"], count: int, rng: np.random.Generator) -> Int[np.ndarray, " m"]:
    """So many of the candidates in their order, or as many as there are."""
    options = indices[indices >= 0]
    chosen = np.sort(rng.permutation(len(options))[:count])
    return np.concatenate([options[chosen], np.full(count - len(chosen), -1)])


def bm25_scores(anchors: Sequence[str], candidates: Sequence[str]) -> Iterator[Float[np.ndarray, "b c"]]:
    """Okapi BM25 (a Scorer); a candidate that shares no term with the anchor is not found: -inf."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for its own debug messages when imported
    index = bm25s.BM25()
    index.index([bm25_terms(text) or [""] for text in candidates], show_progress=False)
    nothing = np.zeros(len(candidates), np.float32)
    for block in _blocks([bm25_terms(text) for text in anchors], len(candidates)):
        scores = np.stack([index.get_scores(query) if query else nothing for query in block])
        yield np.where(scores > 0, scores, np.float32(-np.inf))


def bm25_terms(text: str) -> list[str]:
    """Words without regard to case; two characters at a time of scripts that put no spaces between words."""
    found = []
    for match in _TERMS.finditer(unicodedata.normalize("NFKC", text).casefold()):
        word = match.group()
        found += [word[i : i + 2] for i in range(max(1, len(word) - 1))] if match["unspaced"] else [word]
    return found


def embedding_scores(
    embedder: Embedder, *, query_task: str | None = None, document_task: str | None = None, **options: Any
) -> Scorer:
    """A Scorer: cosine similarities of embeddings.

    Args:
        embedder: embeds all anchors with `encode_query` and all candidates with `encode_document`.
        query_task: the anchors' adapter; None = what `encode_query` chooses.
        document_task: the same for the candidates.
        options: further arguments of `encode`.

    Raises:
        ValueError: the model has no such task.
    """
    for task in (query_task, document_task):
        if task is not None:
            embedder.config.task_index(task)
    query_options, document_options = ({} if task is None else {"task": task} for task in (query_task, document_task))

    def score(anchors: Sequence[str], candidates: Sequence[str]) -> Iterator[Float[np.ndarray, "b c"]]:
        documents = embedder.encode_document(candidates, **document_options, **options)
        queries = embedder.encode_query(anchors, **query_options, **options)
        for block in _blocks(queries, len(candidates)):
            yield block @ documents.T

    return score


def _blocks(rows: Any, candidates: int) -> Iterator[Any]:
    size = max(1, SCORES_AT_ONCE // candidates)
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def _indices(values: Iterable[int]) -> Int[np.ndarray, " n"]:
    return np.array(sorted(values), np.int64)

"""Mining of hard negatives: texts that a search ranks high for an anchor they do not belong to.

Ranks, scores and margins have the meaning that they have in sentence-transformers'
`mine_hard_negatives`, and give the same negatives.
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
"""Scores of anchors against all candidates that are in memory at a time."""

Scorer = Callable[[Sequence[str], Sequence[str]], Iterator[Float[np.ndarray, "b c"]]]
"""Function from anchors and candidates to blocks of scores: the first b anchors against all c
candidates, then the next."""

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_TERMS = regex.compile(rf"(?V1)(?P<unspaced>[{_UNSPACED}]+)|[\w--[{_UNSPACED}]]+")


@dataclass(frozen=True)
class MiningConfig:
    """Rules that select negatives from the candidates that a search ranks best.

    Attributes:
        num_negatives: negatives per anchor; an anchor with fewer gets none.
        range_min: best candidates to skip: they may be positives that nobody marked.
        range_max: rank of the last candidate to consider.
        max_score: highest score of a negative.
        min_score: lowest score of a negative.
        absolute_margin: least distance of a negative's score below the positive's.
        relative_margin: the same as a fraction of the positive's score.
        sampling: "top" takes the best of the candidates that are left, "random" takes random ones.

    If an anchor has several positives, the one with the lowest score counts. Ranks are those of the
    candidates that scores and margins leave.

    Raises:
        ValueError: a value is out of range, or no candidate can meet the values.
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

    An anchor's negatives never include its positives, a text equal to it, or texts of pairs of its
    `group`. Each negative keeps the `group` of its pair.

    Args:
        pairs: repeated pairs count once.
        scorer: `bm25_scores`, `embedding_scores(...)`, or any other.
        config: selects among the best candidates.
        same_language: take negatives only from pairs of the anchor's language.
        seed: seed of random sampling.

    Returns:
        The pairs with their negatives, best first, in the order given (with `same_language` one
        language after the other); without the pairs whose anchor has too few negatives.

    Raises:
        ValueError: there are no pairs.
    """
    if not pairs:
        raise ValueError("there are no pairs to mine negatives for")
    rng = np.random.default_rng(seed)
    parts: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        parts[pair.language if same_language else ""].append(pair)
    return [triplet for part in parts.values() for triplet in _mine_part(part, pairs, scorer, config, rng)]


def _mine_part(
    pairs: list[Pair], known: Sequence[Pair], scorer: Scorer, config: MiningConfig, rng: np.random.Generator
) -> Iterator[Triplet]:
    relations = _Relations(pairs, known)
    # Leaves room for positives, as sentence-transformers does.
    pool = config.range_max + max(map(len, relations.positives))
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
            texts, groups = (tuple(names[i] for i in found) for names in (relations.candidates, relations.groups))
            yield Triplet(
                **pair.model_dump(include=set(Pair.model_fields)),
                negatives=texts,
                negative_groups=groups if any(groups) else (),
            )


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """Returns the first pair of every anchor and positive."""
    first: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        first.setdefault((pair.anchor, pair.positive), pair)
    return list(first.values())


class _Relations:
    """Relations between anchors and candidates.

    Attributes:
        anchors: all anchors, each once.
        candidates: all positives, each once.
        groups: group of each candidate, of the first pair that gives it one; "" = none.
        positives: indices of each anchor's positives.
    """

    def __init__(self, pairs: Sequence[Pair], known: Sequence[Pair]):
        """Takes anchors and candidates from `pairs`, and their relations from all `known` pairs."""
        self.anchors = list(dict.fromkeys(pair.anchor for pair in pairs))
        self.candidates = list(dict.fromkeys(pair.positive for pair in pairs))
        self._index = {text: i for i, text in enumerate(self.candidates)}
        groups: dict[str, str] = {}
        positives, self._groups = defaultdict(set), defaultdict(set)
        members = defaultdict(set)
        for pair in known:
            if pair.group:
                self._groups[pair.anchor].add(pair.group)
            if pair.positive not in self._index:
                continue
            positives[pair.anchor].add(self._index[pair.positive])
            if pair.group:
                members[pair.group].add(self._index[pair.positive])
                groups.setdefault(pair.positive, pair.group)
        self.groups = [groups.get(text, "") for text in self.candidates]
        self.positives = [_indices(positives[anchor]) for anchor in self.anchors]
        self._members = {group: _indices(texts) for group, texts in members.items()}

    def excluded(self, anchor: int) -> Int[np.ndarray, " n"]:
        """Candidates, other than its positives, that must not be negatives of an anchor.

        They are a text equal to it, and the texts of its groups.
        """
        text = self.anchors[anchor]
        equal = _indices([self._index[text]] if text in self._index else [])
        groups = self._groups.get(text, ())
        group_members = [self._members[group] for group in groups if group in self._members]
        return np.setdiff1d(np.concatenate([equal, *group_members]), self.positives[anchor])


def pick_negatives(
    scores: Float[np.ndarray, "b c"],
    positives: Sequence[Int[np.ndarray, " p"]],
    excluded: Sequence[Int[np.ndarray, " n"]],
    pool: int,
    config: MiningConfig,
    rng: np.random.Generator,
) -> Int[np.ndarray, "b m"]:
    """Selects, by `select`, the negatives of a block of anchors from the `pool` best candidates.

    Args:
        scores: score of each anchor with each candidate.
        positives: each anchor's positives, at least one.
        excluded: other candidates, hidden from each anchor's search.
        pool: number of candidates to rank, positives included.
    """
    scores = scores.copy()
    lowest = np.array([scores[row, own].min() for row, own in enumerate(positives)])
    for row, others in enumerate(excluded):
        scores[row, others] = -np.inf
    best, indices = top(scores, pool)
    is_positive = np.stack([np.isin(indices[row], own) for row, own in enumerate(positives)])
    return select(best, indices, is_positive, lowest, config, rng)


def top(scores: Float[np.ndarray, "b c"], k: int) -> tuple[Float[np.ndarray, "b k"], Int[np.ndarray, "b k"]]:
    """Returns the k best scores of each row, best first, and their indices; all if fewer than k."""
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
    """Selects each anchor's negatives among its best candidates, best first; -1 if too few.

    Args:
        scores: scores of each anchor's candidates, best first; -inf = no candidate.
        indices: indices of the candidates.
        is_positive: True for candidates that are positives of the anchor.
        positive_scores: lowest score of each anchor's positives.
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
    """Marks scores that miss a margin or a limit, and those of no candidate."""
    # An infinite score times 0 would be NaN.
    positive = np.maximum(positive, np.finfo(np.float32).min).astype(np.float64)
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
    """Samples `count` of the candidates, in their order; pads with -1 if there are fewer."""
    options = indices[indices >= 0]
    chosen = np.sort(rng.permutation(len(options))[:count])
    return np.concatenate([options[chosen], np.full(count - len(chosen), -1)])


def bm25_scores(anchors: Sequence[str], candidates: Sequence[str]) -> Iterator[Float[np.ndarray, "b c"]]:
    """Okapi BM25 (a Scorer); a candidate that shares no term with the anchor is not found: -inf."""
    import bm25s

    # The import of bm25s turns its debug messages on.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    index = bm25s.BM25()
    index.index([bm25_terms(text) or [""] for text in candidates], show_progress=False)
    nothing = np.zeros(len(candidates), np.float32)
    for block in _blocks([bm25_terms(text) for text in anchors], len(candidates)):
        scores = np.stack([index.get_scores(query) if query else nothing for query in block])
        yield np.where(scores > 0, scores, np.float32(-np.inf))


def bm25_terms(text: str) -> list[str]:
    """Splits a text into words, without regard to case.

    Scripts without spaces between words give two characters at a time.
    """
    found = []
    for match in _TERMS.finditer(unicodedata.normalize("NFKC", text).casefold()):
        word = match.group()
        found += [word[i : i + 2] for i in range(max(1, len(word) - 1))] if match["unspaced"] else [word]
    return found


def embedding_scores(
    embedder: Embedder, *, query_task: str | None = None, document_task: str | None = None, **options: Any
) -> Scorer:
    """Returns a Scorer: cosine similarities of embeddings.

    Args:
        embedder: embeds all anchors with `encode_query` and all candidates with `encode_document`.
        query_task: adapter of the anchors; None = the choice of `encode_query`.
        document_task: adapter of the candidates; None = the choice of `encode_document`.
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

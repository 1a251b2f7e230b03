"""BM25, the system without a model: it retrieves by words in common alone."""

import logging
from collections.abc import Sequence

import bm25s
import numpy as np
import Stemmer
from jaxtyping import Float

from .retrieval import Retrieval, ndcg_at_10
from .scores import Score

# The library sets DEBUG, and writes a line for each index.
logging.getLogger("bm25s").setLevel(logging.INFO)


def bm25_score(task: Retrieval) -> Score:
    """Score of BM25 in Lucene's form (k1 = 1.5, b = 0.75), with words by the library's pattern.

    English queries have English stop words and stemming. Queries of other languages share names and
    loanwords with the English candidates; they have no stop words and no stemming.
    """
    options = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english")} if task.subset == "en" else {"stopwords": []}

    def words(texts: Sequence[str]) -> list[list[str]]:
        return bm25s.tokenize(list(texts), return_ids=False, show_progress=False, **options)  # type: ignore[return-value]

    index = bm25s.BM25()
    index.index(words(task.right), show_progress=False)
    queries = words(task.left)

    def scores(rows: slice) -> Float[np.ndarray, "rows c"]:
        nothing = np.zeros(len(task.right), np.float32)  # for a query without words
        return np.stack([index.get_scores(query) if query else nothing for query in queries[rows]])

    value = ndcg_at_10(scores, task.relevant)
    return Score("bm25", task.name, task.subset, None, None, task.metric, value, task.n)

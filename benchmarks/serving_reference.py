"""What `benchmarks.serving` compares with: the texts, their vectors by `Embedder.encode`, and how
long that takes without a server."""

import random
import statistics
import time
from pathlib import Path

import numpy as np

from jina_jax import Embedder
from train.data.corpus import BUNDLED, read_corpus

TEXTS = 256


class Reference:
    """Titles as queries and bodies as passages, each with its vector."""

    def __init__(self, model: Path, bulk: int):
        """Embeds all texts; `texts_per_second` embeds `bulk` of them at once."""
        self._embedder, self._bulk = Embedder.load(model), bulk
        records = [text for package in read_corpus(BUNDLED, "test") for text in package.text.values()]
        records = random.Random(0).sample(records, TEXTS)
        self._queries, self._documents = [record.title for record in records], [record.body for record in records]
        vectors = self._embedder.encode_query(self._queries), self._embedder.encode_document(self._documents)
        self._by_kind = {"query": [*zip(self._queries, vectors[0], strict=True)]}
        self._by_kind["passage"] = [*zip(self._documents, vectors[1], strict=True)]
        self._embedder.encode_query(self._queries[0])
        self._embedder.encode_document(self._documents[:bulk])

    def some(self, kind: str, count: int, rng: random.Random) -> tuple[list[str], np.ndarray]:
        """Returns random texts of a kind and their vectors, [count, d]."""
        chosen = rng.choices(self._by_kind[kind], k=count)
        return [text for text, _ in chosen], np.stack([vector for _, vector in chosen])

    def lone_ms(self, seconds: float) -> float:
        """Returns the median milliseconds of one query after the other."""
        times, ends = [], time.perf_counter() + seconds
        while (began := time.perf_counter()) < ends:
            self._embedder.encode_query(random.choice(self._queries))
            times.append(time.perf_counter() - began)
        return 1000 * statistics.median(times)

    def texts_per_second(self, seconds: float) -> float:
        """Returns how many passages a second are embedded."""
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            self._embedder.encode_document(random.choices(self._documents, k=self._bulk))
            done += self._bulk
        return done / (time.perf_counter() - began)

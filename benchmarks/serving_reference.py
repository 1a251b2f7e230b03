"""What `benchmarks.serving` compares with: the texts, their vectors by `Embedder.encode`, and how
long that takes in a process of its own."""

import json
import random
import statistics
import sys
import time
from pathlib import Path

from jina_jax import Embedder
from jina_jax.command import use_compilation_cache
from train.data.corpus import BUNDLED, read_corpus

TEXTS = 256
SECONDS = 6


def main() -> None:
    """Print texts, vectors and times as JSON."""
    use_compilation_cache()
    embedder, size = Embedder.load(Path(sys.argv[1])), int(sys.argv[2])
    records = [text for package in read_corpus(BUNDLED, "test") for text in package.text.values()]
    records = random.Random(0).sample(records, TEXTS)
    queries, documents = [record.title for record in records], [record.body for record in records]
    vectors = embedder.encode_query(queries), embedder.encode_document(documents)
    embedder.encode_query(queries[0])
    embedder.encode_document(documents[: 4 * size])
    times, ends = [], time.perf_counter() + SECONDS / 2
    while (began := time.perf_counter()) < ends:
        embedder.encode_query(random.choice(queries))
        times.append(time.perf_counter() - began)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        embedder.encode_document(random.choices(documents, k=4 * size))
        done += 4 * size
    found = {
        "lone_p50_ms": round(1000 * statistics.median(times), 1),
        "texts_per_second": round(done / (time.perf_counter() - began), 1),
        "queries": [*zip(queries, vectors[0].tolist(), strict=True)],
        "documents": [*zip(documents, vectors[1].tolist(), strict=True)],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Scores of BM25, an untrained model and a model on the corpus."""

from collections.abc import Sequence

from flax import nnx

from jina_jax import Embedder, Encoder

from ..data.corpus import Package
from .bm25 import bm25_score
from .model_scores import model_scores
from .scores import Score
from .tasks import Retrieval, corpus_tasks


def evaluate(
    embedder: Embedder,
    untrained: Embedder | None,
    packages: Sequence[Package],
    train_packages: Sequence[Package],
    *,
    every_adapter: bool = False,
    batch_size: int = 32,
    progress: bool = False,
) -> list[Score]:
    """Scores of BM25, the untrained model and the model.

    Args:
        untrained: measured without adapters, since fresh ones change nothing; None = not measured.
        packages: those of the split to measure.
        train_packages: classifiers are fitted on a sample of these.
        every_adapter: also measure adapters on the tasks that they were not trained for, at full
            dimension.
        batch_size: as in `Embedder.encode`.
        progress: shows progress bars.

    Raises:
        ValueError: too few packages, or embeddings that are not finite.
    """
    tasks = corpus_tasks(packages, train_packages)
    scores = [bm25_score(task) for task in tasks if isinstance(task, Retrieval)]
    if untrained is not None:
        scores += model_scores("untrained", untrained, tasks, (), batch_size=batch_size, progress=progress)
    scores += model_scores(
        "model",
        embedder,
        tasks,
        embedder.config.tasks,
        every_adapter=every_adapter,
        batch_size=batch_size,
        progress=progress,
    )
    return scores


def untrained(embedder: Embedder, seed: int = 0) -> Embedder:
    """A model of the same configuration and tokenizer before training: its weights are random."""
    encoder = embedder.encoder
    fresh = Encoder(encoder.config, dtype=encoder.dtype, rngs=nnx.Rngs(seed))
    return Embedder(fresh, embedder.config, embedder.tokenizer)

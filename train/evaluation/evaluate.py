"""Scores of BM25, an untrained model and a model on the corpus."""

from collections.abc import Sequence

from flax import nnx

from jina_jax import Embedder, Encoder
from jina_jax.embed.inputs import resolve_max_length

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
    max_length: int | None = None,
    progress: bool = False,
) -> list[Score]:
    """Scores of BM25, the untrained model and the model.

    Args:
        untrained: measured without adapters, since fresh ones change nothing; None = not measured.
        packages: those of the split to measure.
        train_packages: classifiers are fitted on a sample of these.
        every_adapter: also measure adapters on the tasks that they were not trained for, at full
            dimension.
        batch_size, max_length: as in `Embedder.encode`.
        progress: shows progress bars.

    Raises:
        ValueError: too few packages, a limit above the model's, or embeddings that are not finite.
    """
    resolve_max_length(max_length, embedder.max_length)
    tasks = corpus_tasks(packages, train_packages)
    scores = [bm25_score(task) for task in tasks if isinstance(task, Retrieval)]
    if untrained is not None:
        scores += model_scores(
            "untrained", untrained, tasks, (), batch_size=batch_size, max_length=max_length, progress=progress
        )
    scores += model_scores(
        "model",
        embedder,
        tasks,
        embedder.config.tasks,
        every_adapter=every_adapter,
        batch_size=batch_size,
        max_length=max_length,
        progress=progress,
    )
    return scores


def untrained(embedder: Embedder, seed: int = 0) -> Embedder:
    """A model of the same configuration and tokenizer before training: its weights are random."""
    encoder = embedder.encoder
    fresh = Encoder(encoder.config, dtype=encoder.dtype, rngs=nnx.Rngs(seed))
    return Embedder(fresh, embedder.config, embedder.tokenizer)

"""`MTEBEncoder`: an `Embedder` as MTEB (mteb 2, extra `mteb`) calls a model.

    import mteb
    from jina_jax import Embedder
    from jina_jax.mteb import MTEBEncoder

    model = MTEBEncoder(Embedder.load("jinaai/jina-embeddings-v3"))
    mteb.evaluate(model, mteb.get_tasks(["STSBenchmark"]))

Tasks from files, variants and the leaderboard's table: `python -m train.evaluate MODEL --mteb ...`.
"""

import re
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from .config import ModelConfig, Side
from .embed.embedder import Embedder
from .embed.inputs import check_one_of, resolve_truncate_dim
from .embed.quantize import dequantize, quantize
from .embed.sides import side_options
from .embed.similarity import cosine_similarity, normalize, pairwise_cosine_similarity
from .errors import how_to_install
from .model.parameters import variables

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta

Precision = Literal["float32", "int8", "binary"]

ADAPTERS = {
    "Clustering": "separation",
    "Reranking": "separation",
    "Classification": "classification",
    "MultilabelClassification": "classification",
    "PairClassification": "classification",
    "STS": "text-matching",
    "BitextMining": "text-matching",
    "Summarization": "text-matching",
}
"""Adapter of both sides by MTEB's task type, as its own entry for jina-embeddings-v3 has it.

Retrieval has the adapters of queries and of documents, and any other type none.
"""

SYMMETRIC_RETRIEVAL = re.compile("ArguAna|Quora|CQADupstack")
"""Names of retrieval tasks whose queries and documents are alike."""


class MTEBEncoder:
    """An `Embedder` with the methods that MTEB calls a model by.

    A task's type chooses the adapter. Where the model has none for it, the base embeds, with the
    prompts for queries and documents if the model has any; both sides of a task whose sides are
    alike have that of queries, as the authors of E5 use it.

    Attributes:
        embedder: the model.
        truncate_dim: leading dimensions that are kept; None = as many as `Embedder.encode` keeps.
        precision: what embeddings are quantised to. They are read back to float32, so that all
            of MTEB's metrics hold for them.
    """

    def __init__(
        self,
        embedder: Embedder,
        symmetric_retrieval: bool = False,
        *,
        truncate_dim: int | None = None,
        precision: Precision = "float32",
        max_length: int | None = None,
        name: str = "jina-jax/model",
        revision: str | None = None,
        encode: Callable[..., np.ndarray] | None = None,
    ):
        """Wraps an embedder.

        Args:
            embedder: the model.
            symmetric_retrieval: embeds both sides of ArguAna, Quora and CQADupstack alike, by the
                adapter text-matching, as the paper of jina-embeddings-v3 does and MTEB's entry for
                it does not.
            truncate_dim, precision: see the attributes; results of other than the default ones are
                kept apart by MTEB, as experiments.
            max_length: as in `Embedder.encode`.
            name, revision: what MTEB files the results under; a name is ORGANISATION/MODEL.
            encode: called in place of `embedder.encode`, such as one that remembers.

        Raises:
            ValueError: an unknown precision, a dimension that the model does not have, or a name
                without organisation.
        """
        check_one_of("precision", precision, get_args(Precision))
        if name.count("/") != 1:
            raise ValueError(f"a name in MTEB is ORGANISATION/MODEL, not {name!r}")
        self.embedder = embedder
        self.truncate_dim = truncate_dim
        self.precision: Precision = precision
        self._dim = resolve_truncate_dim(truncate_dim, embedder.config)
        self._symmetric_retrieval = symmetric_retrieval
        self._max_length = max_length
        self._name, self._revision = name, revision
        self._encode: Callable[..., Any] = encode or embedder.encode

    def encode(
        self,
        inputs: Iterable[Any],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        batch_size: int = 32,
        precision: Precision | None = None,
        show_progress_bar: bool = False,
        **_: Any,
    ) -> Float[np.ndarray, "n d"]:
        """Embeds the texts of MTEB's batches, in their order, without white space at their ends.

        The published scores were measured so: sentence-transformers used to strip every text, and
        some tasks have a line end behind each, which is a token of its own.

        Args:
            inputs: batches, each with its texts under "text".
            task_metadata: its `type` and `name` choose the adapter or the prompt.
            hf_split: makes no difference.
            hf_subset: makes no difference.
            prompt_type: "query" or "document" where a task has these sides, else None.
            batch_size: as in `Embedder.encode`.
            show_progress_bar: as in `Embedder.encode`.
            precision: in place of the encoder's.
        """
        texts = [text.strip() for batch in inputs for text in batch["text"]]
        side: Side = "document" if prompt_type is not None and prompt_type == "document" else "query"
        options = task_options(
            self.embedder.config, task_metadata.type, task_metadata.name, side, symmetric_retrieval=self._symmetric_retrieval
        )
        embeddings = self._encode(
            texts,
            truncate_dim=self.embedder.config.hidden_size,
            batch_size=batch_size,
            max_length=self._max_length,
            show_progress_bar=show_progress_bar,
            **options,
        )
        return compressed(normalize(embeddings[:, : self._dim]), precision or self.precision)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Float[np.ndarray, "n m"]:
        """Cosine of every row of one with every row of the other."""
        return cosine_similarity(np.asarray(embeddings1), np.asarray(embeddings2)).view(_Similarities)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Float[np.ndarray, " n"]:
        """Cosine of each row of one with the same row of the other."""
        return pairwise_cosine_similarity(np.asarray(embeddings1), np.asarray(embeddings2))

    @cached_property
    def mteb_model_meta(self) -> "ModelMeta":
        """What MTEB writes of the model beside its results."""
        config = self.embedder.config
        settings = {
            "embed_dim": self.truncate_dim,
            "output_dtypes": None if self.precision == "float32" else self.precision,
            "symmetric_retrieval": self._symmetric_retrieval or None,
            "max_length": self._max_length,
        }
        parameters = sum(variable.size for variable in variables(self.embedder.encoder).values())
        return _model_meta()(
            loader=None,
            name=self._name,
            revision=self._revision or "no_revision_available",
            release_date=None,
            languages=None,
            n_parameters=parameters,
            memory_usage_mb=None,
            max_tokens=self.embedder.max_length,
            embed_dim=list(config.matryoshka_dims) or config.hidden_size,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["JAX"],
            similarity_fn_name="cosine",  # type: ignore[arg-type]
            use_instructions=bool(config.prompts),
            training_datasets=None,
            experiment_kwargs={name: value for name, value in settings.items() if value is not None} or None,
        )


def task_options(
    config: ModelConfig, task_type: str, task_name: str, side: Side, *, symmetric_retrieval: bool = False
) -> dict[str, Any]:
    """Returns the arguments of `Embedder.encode` for one side of a task of MTEB.

    Args:
        config: that of the model.
        task_type, task_name: as in MTEB's metadata.
        side: "query" where the sides are alike.
        symmetric_retrieval: ArguAna, Quora and CQADupstack have sides that are alike.
    """
    alike = task_type == "Retrieval" and symmetric_retrieval and SYMMETRIC_RETRIEVAL.search(task_name) is not None
    if task_type == "Retrieval" and not alike:
        return side_options(config, side)
    adapter = "text-matching" if alike else ADAPTERS.get(task_type)
    if adapter in config.tasks:
        return {"task": adapter}
    name = config.side_prompt("query" if alike else side)
    return {} if name is None else {"prompt_name": name}


def compressed(embeddings: Float[np.ndarray, "n d"], precision: Precision) -> Float[np.ndarray, "n d"]:
    """Returns what is left of normalised embeddings in a precision.

    int8 has the ranges of these embeddings, as in sentence-transformers.
    """
    if precision == "float32" or len(embeddings) == 0:
        return embeddings
    ranges = np.stack([embeddings.min(axis=0), embeddings.max(axis=0)]) if precision == "int8" else None
    codes = quantize(embeddings, precision, ranges)
    return normalize(dequantize(codes, precision, embeddings.shape[1], ranges))


class _Similarities(np.ndarray):
    """A matrix whose single element is a float to `float`, as MTEB's summarisation takes it."""

    def __float__(self) -> float:
        return float(self.item())


def _model_meta() -> Any:
    try:
        from mteb.models.model_meta import ModelMeta
    except ImportError as error:
        raise ValueError(f"MTEB needs an extra: {how_to_install('mteb')}") from error
    return ModelMeta

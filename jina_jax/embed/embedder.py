"""The Embedder: texts to vectors, with the names and meanings of sentence-transformers."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Float

from ..checkpoints.load import load_encoder
from ..checkpoints.native import save_checkpoint
from ..config import ModelConfig
from ..model.adapters import fold_adapter
from ..model.encoder import Encoder
from ..model.parameters import unstack_layers
from ..parallel.mesh import replicate, shard_batch
from ..text import packing
from ..text.batching import packed_batches
from ..text.tokenizer import Tokenizer, max_tokens, tokenize
from .forward import text_embeddings, token_states
from .inputs import as_texts, check_one_of, is_int, resolve_max_length, resolve_truncate_dim, with_prompts
from .progress import progress_bar
from .quantize import EMBEDDING_PRECISIONS, EmbeddingPrecision, quantize
from .similarity import cosine_similarity, normalize

logger = logging.getLogger(__name__)

SLOTS_PER_TEXT = 256
"""Token slots that one text of `batch_size` stands for."""

WORTH_FOLDING = 16_384
"""Characters of one task, among texts of several tasks, from which on its adapter is folded into the kernels."""

OutputValue = Literal["sentence_embedding", "token_embeddings"]


class Embedder:
    """A model and its tokenizer.

    Attributes:
        config: the model's configuration; its `adapter_ids` and `prompts` are what `encode` takes.
        mesh: devices that share the work; None = one.
        max_length: most tokens of a text, special tokens included.
    """

    def __init__(self, encoder: Encoder, config: ModelConfig, tokenizer: Tokenizer, *, mesh: Mesh | None = None):
        if encoder.config.tasks != config.tasks or encoder.config.hidden_size != config.hidden_size:
            raise ValueError("the configuration is not that of the encoder: its tasks or its hidden_size differ")
        self.encoder = encoder if mesh is None else replicate(encoder, mesh)
        self.mesh = mesh
        self._base = self._for_inference(self.encoder)
        self.config = config
        self.tokenizer = tokenizer
        self.max_length = max_tokens(tokenizer, config)
        self._folded: tuple[str, Encoder] | None = None

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        dtype: DTypeLike | None = None,
        revision: str | None = None,
        mesh: Mesh | None = None,
    ) -> "Embedder":
        """Loads a model from a directory, a remote directory (`gs://...`) or the hub, in any supported layout.

        Args:
            source: a native checkpoint, or jina-embeddings-v3 (original, transformers with PEFT adapters), XLM-RoBERTa or
                multilingual-E5.
            dtype: of parameters and computation; None = float32 on CPU, and on accelerators that of the file.
            revision: branch, tag or commit on the hub.
            mesh: from `sharding.make_mesh`; texts are embedded on all its devices. If these belong to several processes, all of
                them call `encode` with the same texts, each computes a share, and each gets all embeddings. None = one device.

        Raises:
            FileNotFoundError: the source or one of its files does not exist.
            ValueError: the checkpoint is damaged, ambiguous or not supported; the message says what and where.
        """
        if dtype is None and jax.default_backend() == "cpu":
            dtype = jnp.float32
        encoder, tokenizer, _ = load_encoder(source, dtype=dtype, param_dtype=dtype, revision=revision)
        return cls(encoder, encoder.config, tokenizer, mesh=mesh)

    def save(self, directory: str | Path) -> None:
        """Writes a native checkpoint into a new directory, local or remote (`gs://...`)."""
        if self.mesh is not None and self.mesh.is_multi_process:
            raise ValueError("a model on several processes is not saved; load it on one")
        save_checkpoint(directory, self.encoder, self.tokenizer)

    def encode_query(self, sentences: str | Sequence[str], **options: Any) -> Any:
        """`encode` with the task retrieval.query, else with the prompt named query, else plain."""
        return self.encode(sentences, **self._retrieval_options("retrieval.query", ("query",), options))

    def encode_document(self, sentences: str | Sequence[str], **options: Any) -> Any:
        """`encode` with the task retrieval.passage, else with the prompt named document or passage, else plain."""
        prompts = ("document", "passage", "corpus")
        return self.encode(sentences, **self._retrieval_options("retrieval.passage", prompts, options))

    def encode(
        self,
        sentences: str | Sequence[str],
        task: str | Sequence[str | None] | None = None,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int = 32,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = True,
        precision: EmbeddingPrecision = "float32",
        max_length: int | None = None,
        output_value: OutputValue = "sentence_embedding",
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
    ) -> Any:
        """Embeds texts.

        Args:
            sentences: a text, or several.
            task: the adapter, one for all texts or one for each; None = the base model. A task puts its instruction before
                the text.
            prompt: text put before every input, in place of the task's instruction.
            prompt_name: the same by its name in `config.prompts`.
            batch_size: bounds memory: the token slots computed at once, on each device, are at most 256 times this, or one row.
            truncate_dim: leading dimensions to keep; where the model lists its Matryoshka dimensions, one of them.
            normalize_embeddings: scale to length 1, after truncation.
            precision: float32, int8, uint8, binary or ubinary, as in sentence-transformers.
            max_length: most tokens of a text, special tokens included; longer texts are cut, with a warning.
            output_value: "sentence_embedding", or "token_embeddings" for the token states of each text.
            show_progress_bar: None = where the logger of this module shows INFO.
            convert_to_numpy: False gives a list of vectors in place of a matrix.
            convert_to_tensor, device: not supported, see the error.

        Returns:
            For one text a vector [dim], for several a matrix [n, dim] in the order given; for token embeddings [tokens, d],
            one array or a list.

        Raises:
            ValueError: an argument is not valid; the message lists what is.
        """
        if convert_to_tensor:
            raise ValueError("convert_to_tensor gives PyTorch tensors; use torch.from_numpy(model.encode(...))")
        if device is not None:
            raise ValueError("device is JAX's to choose: set JAX_PLATFORMS, or use jax.default_device(...) around the call")
        texts = as_texts(sentences)
        dim = resolve_truncate_dim(truncate_dim, self.config)
        check_one_of("precision", precision, EMBEDDING_PRECISIONS)
        check_one_of("output_value", output_value, ("sentence_embedding", "token_embeddings"))
        if output_value == "token_embeddings" and precision != "float32":
            raise ValueError("token_embeddings come in float32 only")
        if not is_int(batch_size) or batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, and an integer, not {batch_size!r}")
        texts, adapter_ids = with_prompts(texts, task, prompt, prompt_name, self.config)
        limit, cut = resolve_max_length(max_length, self.max_length), []

        def token_ids(some: Sequence[str]) -> list[list[int]]:
            ids, too_long = tokenize(self.tokenizer, some, limit)
            cut.append(too_long)
            return ids

        compute = text_embeddings if output_value == "sentence_embedding" else token_states
        results = _one_ahead(self._computed(compute, texts, adapter_ids, token_ids, batch_size))
        collect = _sentence_embeddings if output_value == "sentence_embedding" else _token_states
        show = logger.isEnabledFor(logging.INFO) if show_progress_bar is None else show_progress_bar
        with progress_bar(len(texts), "Embedding", "text", show=show) as progress:
            collected = collect(results, len(texts), self.config.hidden_size, progress)
        if sum(cut):
            warnings.warn(f"{sum(cut)} of {len(texts)} texts are longer than {limit} tokens and were cut", stacklevel=2)
        if output_value == "token_embeddings":
            return collected[0] if isinstance(sentences, str) else collected

        embeddings = np.asarray(collected)[:, :dim]
        if normalize_embeddings:
            embeddings = normalize(embeddings)
        embeddings = quantize(embeddings, precision)
        if isinstance(sentences, str):
            return embeddings[0]
        return embeddings if convert_to_numpy else list(embeddings)

    def similarity(
        self, embeddings1: Float[Any, "n d"] | Float[Any, " d"], embeddings2: Float[Any, "m d"] | Float[Any, " d"]
    ) -> Float[np.ndarray, "n m"]:
        """Cosine similarities between every row of one and every row of the other; a vector counts as one row."""
        return cosine_similarity(embeddings1, embeddings2)

    def _retrieval_options(self, task: str, prompt_names: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
        if "task" in options or task in self.config.tasks:
            return {"task": task} | options
        if options.get("prompt") is None and options.get("prompt_name") is None:
            for name in prompt_names:
                if self.config.prompt(name) is not None:
                    return options | {"prompt_name": name}
        return options

    def _computed(
        self,
        compute: Callable[..., Array],
        texts: list[str],
        adapter_ids: np.ndarray,
        token_ids: Callable[[Sequence[str]], list[list[int]]],
        batch_size: int,
    ) -> Iterator[tuple[packing.PackedBatch, Array]]:
        """Every batch with its result, which may still be under way. Its rows have the texts' indices in the call."""
        budget, devices = batch_size * SLOTS_PER_TEXT, 1 if self.mesh is None else self.mesh.size
        for encoder, members, mixed in self._groups(texts, adapter_ids):
            for rows in packed_batches([texts[i] for i in members], token_ids, self.config.pad_id, budget, devices):
                own = np.where(rows.texts < 0, -1, members[rows.texts])
                if mixed:
                    row_adapter_ids = np.where(own < 0, -1, adapter_ids[own])
                else:
                    row_adapter_ids = None if encoder is self._base else np.int32(0)
                arrays = rows.tokens, rows.segment_ids, rows.positions, row_adapter_ids
                if self.mesh is not None:
                    arrays = shard_batch(arrays, self.mesh)
                yield rows._replace(texts=own), compute(encoder, *arrays, mesh=self.mesh)

    def _groups(self, texts: list[str], adapter_ids: np.ndarray) -> Iterator[tuple[Encoder, np.ndarray, bool]]:
        """(encoder, texts, whether their tasks are mixed): large tasks one by one with their adapter folded, the rest mixed."""
        names = np.unique(adapter_ids).tolist()
        mixed = []
        for index in names:
            members = np.flatnonzero(adapter_ids == index)
            if len(names) > 1 and sum(len(texts[i]) for i in members) < WORTH_FOLDING:
                mixed.append(members)
            else:
                yield self._encoder_of(index), members, False
        if mixed:
            members = np.sort(np.concatenate(mixed))
            base_alone = (adapter_ids[members] < 0).all()
            yield self._base, members, not base_alone

    def _encoder_of(self, index: int) -> Encoder:
        """The base, or the encoder with one task folded in; the last one is kept."""
        if index < 0:
            return self._base
        task = self.config.tasks[index]
        if self._folded is None or self._folded[0] != task:
            self._folded = None  # freed before the next is made
            self._folded = task, self._for_inference(fold_adapter(self.encoder, task))
        return self._folded[1]

    def _for_inference(self, encoder: Encoder) -> Encoder:
        return unstack_layers(encoder) if self.mesh is None else encoder


def _one_ahead(results: Iterator[tuple[packing.PackedBatch, Array]]) -> Iterator[tuple[packing.PackedBatch, Array]]:
    """Starts each batch before the one before it is read, so that the device never waits for the host."""
    waiting = None
    for result in results:
        if waiting is not None:
            yield waiting
        waiting = result
    if waiting is not None:
        yield waiting


def _sentence_embeddings(
    results: Iterator[tuple[packing.PackedBatch, Array]], texts: int, hidden_size: int, progress: Any
) -> Float[np.ndarray, "n d"]:
    out = np.zeros((texts, hidden_size), np.float32)
    for rows, pooled in results:
        packing.scatter(np.asarray(pooled), rows, out)
        progress.update(int((rows.texts >= 0).sum()))
    return out


def _token_states(
    results: Iterator[tuple[packing.PackedBatch, Array]], texts: int, hidden_size: int, progress: Any
) -> list[Float[np.ndarray, "t d"]]:
    out = [np.zeros((0, hidden_size), np.float32)] * texts
    for rows, states in results:
        for row, index_in_row in zip(*np.nonzero(rows.texts >= 0), strict=True):
            own = rows.segment_ids[row] == index_in_row + 1
            out[rows.texts[row, index_in_row]] = np.asarray(states[row], np.float32)[own]
        progress.update(int((rows.texts >= 0).sum()))
    return out

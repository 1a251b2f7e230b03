"""`Embedder`: texts to vectors, with the names and meanings of sentence-transformers."""

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Float

from ..checkpoints.load import load_encoder
from ..checkpoints.native import save_checkpoint
from ..config import ModelConfig, Side
from ..model.encoder import Encoder
from ..parallel.mesh import replicate
from ..storage import StoragePath
from ..text.tokenizer import Tokenizer, max_tokens, private_backend
from .batch_runner import BatchRunner, Tuning
from .inputs import parse_output, parse_request, resolve_truncate_dim
from .late_chunking import (
    WindowForm,
    collect_chunks,
    parse_chunk_request,
    tokenize_documents,
)
from .mixed_rows import MixedRows
from .progress import progress_bar
from .quantize import EmbeddingPrecision
from .results import collect_embeddings, collect_token_states, finish, one_ahead
from .sides import side_options
from .similarity import cosine_similarity, pairwise_cosine_similarity

logger = logging.getLogger(__name__)

OutputValue = Literal["sentence_embedding", "token_embeddings"]


class EncodeOptions(TypedDict, total=False):
    """Arguments of `Embedder.encode` that do not change the type of its result."""

    prompt: str | None
    prompt_name: str | None
    batch_size: int
    truncate_dim: int | None
    normalize_embeddings: bool
    precision: EmbeddingPrecision
    ranges: Any
    max_length: int | None
    show_progress_bar: bool | None
    convert_to_tensor: bool
    device: None


class Embedder:
    """A model and its tokenizer; any number of threads may use it at the same time.

    Attributes:
        config: the model's configuration; its `tasks` and `prompts` are what `encode` takes.
        mesh: devices that share the work; None = one.
        tuning: sizes that trade memory and latency for speed.
        max_length: most tokens of a text, special tokens included.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        mesh: Mesh | None = None,
        tuning: Tuning | None = None,
    ):
        if encoder.config.tasks != config.tasks or encoder.config.hidden_size != config.hidden_size:
            raise ValueError("the configuration is not that of the encoder: its tasks or its hidden_size differ")
        self.encoder = encoder if mesh is None else replicate(encoder, mesh)
        self.mesh = mesh
        self.config = config
        self.tokenizer = tokenizer
        self.max_length = max_tokens(tokenizer, config)
        self.tuning = tuning or Tuning()
        self._backend = private_backend(tokenizer)
        self._batches = BatchRunner(self.encoder, self._backend, mesh, self.tuning)

    @classmethod
    def load(
        cls,
        source: str | StoragePath,
        *,
        dtype: DTypeLike | None = None,
        revision: str | None = None,
        mesh: Mesh | None = None,
        prompts: Mapping[str, str] | None = None,
        strict: bool = False,
    ) -> "Embedder":
        """Loads a model from a directory, a bucket (gs://, s3://) or the hub, in any supported
        layout.

        Args:
            source: a native checkpoint, or jina-embeddings-v3 (original, transformers with PEFT
                adapters), XLM-RoBERTa or multilingual-E5.
            dtype: of parameters and computation; None = float32 on CPU, and on accelerators that of
                the file.
            revision: branch, tag or commit on the hub.
            mesh: from `make_mesh`; texts are embedded on all its devices. If these belong
                to several processes, all of them call `encode` with the same texts, each computes a
                share, and each gets all embeddings. None = one device.
            prompts: texts by name, laid over the model's own; those named `query` and `document`
                are for `encode_query` and `encode_document` of a model without tasks for them. A
                name that is a task of the model replaces the instruction of that task.
            strict: settings beside the weights that are not known are an error, not a warning.

        Raises:
            FileNotFoundError: the source or one of its files does not exist.
            ValueError: the checkpoint is damaged, ambiguous or not supported, the message says what
                and where; or a prompt or its name is no string.
        """
        if dtype is None and jax.default_backend() == "cpu":
            dtype = jnp.float32
        encoder, tokenizer, _ = load_encoder(
            source, dtype=dtype, param_dtype=dtype, revision=revision, prompts=prompts, strict=strict
        )
        return cls(encoder, encoder.config, tokenizer, mesh=mesh)

    def save(self, directory: str | StoragePath) -> None:
        """Writes a native checkpoint into a new directory, local or in a bucket (gs://, s3://)."""
        if self.mesh is not None and self.mesh.is_multi_process:
            raise ValueError("a model on several processes is not saved; load it on one")
        save_checkpoint(directory, self.encoder, self.tokenizer)

    @property
    def prompts(self) -> dict[str, str]:
        """Instructions and prompts by the name of their task, or their own."""
        return dict(self.config.prompts)

    @property
    def max_seq_length(self) -> int:
        """`max_length`, by the name that sentence-transformers gives it."""
        return self.max_length

    def get_embedding_dimension(self) -> int:
        """Width of the embeddings that `encode` returns where no `truncate_dim` is given."""
        return resolve_truncate_dim(None, self.config)

    def get_sentence_embedding_dimension(self) -> int:
        """`get_embedding_dimension`, by its name before sentence-transformers 6."""
        return self.get_embedding_dimension()

    def encode_query(self, sentences: str | Sequence[str], **options: Any) -> Any:
        """`encode` with the task retrieval.query, else with the prompt named query, else plain."""
        return self.encode(sentences, **self._with_side("query", options))

    def encode_document(self, sentences: str | Sequence[str], **options: Any) -> Any:
        """`encode` with the task retrieval.passage, else with the prompt named document, passage or
        corpus, else plain."""
        return self.encode(sentences, **self._with_side("document", options))

    @overload
    def encode(
        self,
        sentences: str,
        task: str | None = None,
        *,
        output_value: OutputValue = "sentence_embedding",
        convert_to_numpy: bool = True,
        **options: Unpack[EncodeOptions],
    ) -> np.ndarray: ...
    @overload
    def encode(
        self,
        sentences: Sequence[str],
        task: str | Sequence[str | None] | None = None,
        *,
        output_value: Literal["sentence_embedding"] = "sentence_embedding",
        convert_to_numpy: Literal[True] = True,
        **options: Unpack[EncodeOptions],
    ) -> np.ndarray: ...
    @overload
    def encode(
        self,
        sentences: Sequence[str],
        task: str | Sequence[str | None] | None = None,
        *,
        output_value: OutputValue = "sentence_embedding",
        convert_to_numpy: bool = True,
        **options: Unpack[EncodeOptions],
    ) -> list[np.ndarray] | np.ndarray: ...
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
        ranges: Any = None,
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
            task: the adapter, one for all texts or one for each; None = the base model. A task puts
                its instruction before the text.
            prompt: text put before every input, in place of the task's instruction.
            prompt_name: the same by its name in `config.prompts`.
            batch_size: bounds memory: the token slots computed at once, on each device, are at most
                256 times this, or one row.
            truncate_dim: leading dimensions to keep, best one of those that the model was trained
                at.
            normalize_embeddings: scale to length 1, after truncation.
            precision: float32, int8, uint8, binary or ubinary, as in sentence-transformers.
            ranges: for int8 and uint8, least and largest value of each dimension [2, dim], as
                sentence-transformers' `quantize_embeddings` takes them; None = those of this call.
            max_length: most tokens of a text, special tokens included; longer texts are cut, with a
                warning.
            output_value: "sentence_embedding", or "token_embeddings" for the token states of each
                text.
            show_progress_bar: None = where the logger of this module shows INFO.
            convert_to_numpy: False gives a list of vectors in place of a matrix.
            convert_to_tensor: not supported, see the error.
            device: not supported, see the error.

        Returns:
            For one text a vector [dim], for several a matrix [n, dim] in the order given; for token
            embeddings [tokens, d], one array or a list.

        Raises:
            ValueError: an argument is not valid; the message lists what is.
        """
        if convert_to_tensor:
            raise ValueError("convert_to_tensor gives PyTorch tensors; use torch.from_numpy(model.encode(...))")
        if device is not None:
            raise ValueError("device is JAX's to choose: set JAX_PLATFORMS, or use jax.default_device(...) around the call")
        request = parse_request(sentences, task, prompt, prompt_name, batch_size, max_length, self.config, self.max_length)
        output = parse_output(
            sentences, truncate_dim, normalize_embeddings, precision, ranges, output_value, convert_to_numpy, self.config
        )
        show = logger.isEnabledFor(logging.INFO) if show_progress_bar is None else show_progress_bar
        with progress_bar(len(request.texts), "Embedding", "text", show=show) as progress:
            compute = self._batches.token_states if output.token_embeddings else self._batches.embeddings
            results = one_ahead(compute(request))
            collect = collect_token_states if output.token_embeddings else collect_embeddings
            collected, truncated = collect(results, len(request.texts), self.config.hidden_size, progress)
        if truncated:
            total, limit = len(request.texts), request.max_length
            warnings.warn(f"{truncated} of {total} texts are longer than {limit} tokens and were cut", stacklevel=2)
        return finish(collected, output)

    def encode_chunks(
        self,
        documents: Iterable[Iterable[str]],
        task: str | Sequence[str | None] | None = None,
        *,
        late: bool = True,
        separator: str = "",
        overlap: int | None = None,
        windows: WindowForm = "framed",
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int = 32,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = True,
        precision: EmbeddingPrecision = "float32",
        ranges: Any = None,
        max_length: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[np.ndarray]:
        """Embeds the chunks of documents, each in the context of its document (late chunking).

        Chunks cut by `text.chunking.by_tokens` or `by_sentences` are valid. The first chunk has the
        prompt and the special tokens before it, the last those behind it: one chunk is embedded as
        `encode` embeds it.

        Args:
            documents: the chunks of each document, in order; their join is its text.
            task: the adapter, one for all documents or one for each, as in `encode`.
            late: False embeds each chunk by itself, cut at the limit.
            separator: stands between two chunks in the text, and belongs to the first of them.
            overlap: tokens that a window repeats of the one before it, in a document over the
                limit; None = 256, or half of a window if that is less.
            windows: "framed" has prompt and special tokens around each window, "plain" is
                Algorithm 2 of the paper.
            max_length: most tokens of a window, special tokens and prompt included.

        The others are those of `encode`.

        Returns:
            For each document its chunks in order [chunks, dim].

        Raises:
            ValueError: an argument is not valid, or a chunk has no token of its own: the message
                names it by document and chunk, from 0.
        """
        request = parse_chunk_request(
            documents,
            separator,
            late,
            overlap,
            windows,
            task,
            prompt,
            prompt_name,
            batch_size,
            max_length,
            self.config,
            self.max_length,
        )
        output = parse_output(
            [], truncate_dim, normalize_embeddings, precision, ranges, "sentence_embedding", True, self.config
        )
        found, truncated = tokenize_documents(self._backend, request)
        show = logger.isEnabledFor(logging.INFO) if show_progress_bar is None else show_progress_bar
        with progress_bar(len(found), "Embedding", "window", show=show) as progress:
            results = one_ahead(self._batches.chunk_means(request, found))
            means = collect_chunks(results, found, request.names, self.config.hidden_size, progress)
        if truncated:
            total, limit = len(request.names), request.max_length
            warnings.warn(f"{truncated} of {total} chunks are longer than {limit} tokens and were cut", stacklevel=2)
        starts = [index for index, (_, chunk) in enumerate(request.names) if chunk == 0]
        return np.split(finish(means, output), starts[1:]) if starts else []

    def mixed_rows(self, slots: int) -> MixedRows:
        """Returns the forward pass of a server: rows of any adapters in a few shapes, which it
        compiles ahead of time.

        Args:
            slots: most token slots of a batch on each device; the longest text gets a row of its
                own all the same.
        """
        return self._batches.mixed_rows(self.max_length, slots)

    def similarity(
        self, embeddings1: Float[Any, "n d"] | Float[Any, " d"], embeddings2: Float[Any, "m d"] | Float[Any, " d"]
    ) -> Float[np.ndarray, "n m"]:
        """Cosine similarities between every row of one and every row of the other; a vector counts
        as one row."""
        return cosine_similarity(embeddings1, embeddings2)

    def similarity_pairwise(
        self, embeddings1: Float[Any, "n d"] | Float[Any, " d"], embeddings2: Float[Any, "n d"] | Float[Any, " d"]
    ) -> Float[np.ndarray, " n"]:
        """Cosine similarity of each row of one with the same row of the other."""
        return pairwise_cosine_similarity(embeddings1, embeddings2)

    def _with_side(self, side: Side, options: dict[str, Any]) -> dict[str, Any]:
        """Adds what embeds a side to what a call says of itself."""
        chosen = side_options(self.config, side)
        prompted = options.get("prompt") is not None or options.get("prompt_name") is not None
        return options if "task" in options or (prompted and "task" not in chosen) else options | chosen

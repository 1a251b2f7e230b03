"""The batches of a call: texts grouped by adapter, tokenised, packed into rows and handed to the
device."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jax import Array
from jax.sharding import Mesh

from ..model.encoder import Encoder
from ..model.parameters import unstack_layers
from ..parallel.mesh import shard_batch
from ..text.batching import FIRST_CHUNK, LARGEST_CHUNK, packed_batches
from ..text.packing import PackedBatch, plan_batches, row_shapes
from ..text.tokenizer import tokenize
from .folded_adapters import FoldedAdapters, group_by_adapter, how_many_to_keep
from .forward import chunk_means, text_embeddings, token_states
from .inputs import Request
from .late_chunking import ChunkRequest, Window, lay_out_chunks
from .mixed_rows import MixedRows
from .results import Result

if TYPE_CHECKING:
    import tokenizers

SLOTS_PER_TEXT = 256
"""Token slots that one text of `batch_size` stands for."""


class Tuning(NamedTuple):
    """Sizes that trade memory and latency for speed; results do not depend on them."""

    worth_folding: int = 32_768
    """Characters of one task in a call from which on its adapter is folded into the kernels. A
    smaller call has it computed beside them, unless a folded encoder is kept."""
    kept_adapters: int | None = None
    """Folded encoders that are kept; each holds a copy of the kernels. None = all that a quarter of
    an accelerator's memory holds, one on CPU."""
    first_chunk: int = FIRST_CHUNK
    largest_chunk: int = LARGEST_CHUNK
    """Texts tokenised at a time, see `text.batching`."""


class BatchRunner:
    """The forward passes of a model over the batches of any number of calls at the same time.

    Attributes:
        base: the encoder with all its adapters, as inference takes it.
        folded: encoders with one adapter folded into the kernels.
    """

    def __init__(self, encoder: Encoder, backend: "tokenizers.Tokenizer", mesh: Mesh | None, tuning: Tuning):
        """Compiles nothing yet; `encoder` is on all devices of `mesh`."""
        self._backend, self._mesh, self._tuning = backend, mesh, tuning
        self._pad_id = encoder.config.pad_id
        self.base = self._for_inference(encoder)
        self.folded = FoldedAdapters(encoder, tuning.kept_adapters or how_many_to_keep(encoder), self._for_inference)

    def embeddings(self, request: Request) -> Iterator[Result]:
        """Yields every batch with its embeddings, which may still be under way; `texts` are indices
        in the call."""
        return self._run(request, lambda encoder, *inputs: text_embeddings(encoder, *inputs, mesh=self._mesh))

    def token_states(self, request: Request) -> Iterator[Result]:
        """The same with token states."""
        return self._run(request, lambda encoder, *inputs: token_states(encoder, *inputs[:-1], mesh=self._mesh))

    def chunk_means(self, request: ChunkRequest, windows: list[Window]) -> Iterator[Result]:
        """The same of windows with the means of their chunks, which `texts` counts."""
        documents = np.array([window.document for window in windows], np.int64)
        for encoder, members, mixed in self._groups(request):
            own = np.flatnonzero(np.isin(documents, members))
            held = [windows[i] for i in own]
            adapter_ids = request.adapter_ids[documents[own]] if mixed else None
            lengths = [len(window.token_ids) for window in held]
            for plan in plan_batches(lengths, request.batch_size * SLOTS_PER_TEXT, self._devices):
                batch, chunks = lay_out_chunks(held, plan, self._pad_id)
                inputs = self._inputs(encoder, batch, adapter_ids)
                means = chunk_means(encoder, *inputs, means=chunks.shape[1], mesh=self._mesh)
                yield batch._replace(texts=chunks), means

    def mixed_rows(self, max_length: int, slots: int) -> MixedRows:
        """Returns the forward pass over rows of any adapters, as `Embedder.mixed_rows` does."""
        return MixedRows(self.base, self._mesh, row_shapes(max_length, slots, self._devices))

    def _run(self, request: Request, compute: Callable[..., Array]) -> Iterator[Result]:
        def token_ids(texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
            return tokenize(self._backend, texts, request.max_length)

        for encoder, members, mixed in self._groups(request):
            texts = [request.texts[i] for i in members]
            batches = packed_batches(
                texts,
                token_ids,
                self._pad_id,
                request.batch_size * SLOTS_PER_TEXT,
                self._devices,
                first_chunk=self._tuning.first_chunk,
                largest_chunk=self._tuning.largest_chunk,
            )
            for batch in batches:
                batch = batch._replace(texts=np.where(batch.texts < 0, -1, members[batch.texts]))
                yield batch, compute(encoder, *self._inputs(encoder, batch, request.adapter_ids if mixed else None))

    def _groups(self, request: Request | ChunkRequest) -> Iterator[tuple[Encoder, np.ndarray, bool]]:
        sizes = [len(text) for text in request.texts]
        return group_by_adapter(self.base, self.folded, sizes, request.adapter_ids, self._tuning.worth_folding)

    def _inputs(self, encoder: Encoder, batch: PackedBatch, adapter_ids: np.ndarray | None) -> tuple[Any, ...]:
        """Returns what the forward passes take of a batch; `adapter_ids` are those of all texts
        that `batch.texts` counts, None = one for all."""
        of_batch = None if encoder is self.base else np.int32(0)
        if adapter_ids is not None:
            of_batch = np.where(batch.texts < 0, -1, adapter_ids[batch.texts])
        inputs = batch.tokens, batch.segment_ids, batch.positions, of_batch, batch.pool_ids
        return inputs if self._mesh is None else shard_batch(inputs, self._mesh)

    @property
    def _devices(self) -> int:
        return 1 if self._mesh is None else self._mesh.size

    def _for_inference(self, encoder: Encoder) -> Encoder:
        return unstack_layers(encoder) if self._mesh is None else encoder

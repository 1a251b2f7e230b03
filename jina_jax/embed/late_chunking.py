"""Late chunking: one pass over a document, then a mean for each of its chunks (arXiv 2409.04701).

A document is tokenised as a whole behind its prompt, and each token belongs to one chunk. Over the
limit it is read through windows that overlap; where two hold a token, its state in the first one
counts.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int

from ..config import ModelConfig
from ..text.chunking import first_characters, not_white_space
from ..text.packing import BatchPlan, PackedBatch, lay_out, max_texts
from ..text.unicode import lone_surrogate
from .inputs import check_one_of, is_int, parse_request
from .results import Result, not_finite

if TYPE_CHECKING:
    import tokenizers

WindowForm = Literal["framed", "plain"]
"""framed: every window has the document's special tokens and prompt around it, as a text has.
plain: windows are slices of the token ids, as in the paper's Algorithm 2."""

OVERLAP = 256
"""Tokens that a window shares with the one before it, where not half a window is less."""

DOCUMENTS_AT_ONCE = 64
"""Documents tokenised at once; bounds memory, since offsets are large."""

SLOT_STEPS = (1, 4)
"""A row has as many slots for chunks as for texts, or a multiple, or one for each token: one
program each, whatever the chunks."""


class ChunkRequest(NamedTuple):
    """The documents of a call to `encode_chunks`, ready to be tokenised."""

    texts: list[str]
    """Of each document, behind its prompt. Without late chunking every chunk is one."""
    chunk_starts: list[Int[np.ndarray, " c"]]
    """Where the chunks of each document begin in its text."""
    chunk_ends: list[Int[np.ndarray, " c"]]
    names: list[tuple[int, int]]
    """Document and number of each chunk, as the call counts them."""
    adapter_ids: Int[np.ndarray, " n"]
    """Adapter of each text, -1 = none."""
    max_length: int
    batch_size: int
    overlap: int | None
    windows: WindowForm | None
    """None = a text over the limit is cut."""


class Window(NamedTuple):
    """Tokens that are encoded together: a document, or a part of one over the limit."""

    document: int
    token_ids: Int[np.ndarray, " t"]
    chunk_ids: Int[np.ndarray, " t"]
    """Chunk of the call whose mean a token counts in, -1 = none."""


class Tokens(NamedTuple):
    """Token ids of a document, its special tokens and prompt included."""

    token_ids: Int[np.ndarray, " t"]
    chunk_ids: Int[np.ndarray, " t"]
    """Chunk of the document that a token belongs to."""
    lead: int
    """Special tokens and those of the prompt, before the document."""
    tail: int
    """Special tokens behind it."""


# ---- arguments


def parse_chunk_request(
    documents: Any,
    separator: Any,
    late: bool,
    overlap: Any,
    windows: Any,
    task: Any,
    prompt: Any,
    prompt_name: Any,
    batch_size: Any,
    max_length: Any,
    config: ModelConfig,
    limit: int,
) -> ChunkRequest:
    """Returns the documents of a call with their prompts, chunks, adapters and limits; `limit` is
    the model's of tokens."""
    check_one_of("windows", windows, get_args(WindowForm))
    if not isinstance(separator, str):
        raise ValueError(f"separator must be a string, not {separator!r}")
    documents = as_documents(documents)
    joined = [separator.join(chunks) for chunks in documents]
    request = parse_request(joined, task, prompt, prompt_name, batch_size, max_length, config, limit)
    if overlap is not None and (not is_int(overlap) or not 0 <= overlap < request.max_length):
        raise ValueError(f"overlap must be an integer in 0..{request.max_length - 1}, less than a window, not {overlap!r}")
    names = [(number, chunk) for number, chunks in enumerate(documents) for chunk in range(len(chunks))]
    texts, adapter_ids = request.texts, request.adapter_ids
    prompts = [text[: len(text) - len(bare)] for text, bare in zip(texts, joined, strict=True)]
    if not late:
        texts = [prompts[number] + documents[number][chunk] for number, chunk in names]
        prompts = [prompts[number] for number, _ in names]
        adapter_ids = adapter_ids[np.array([number for number, _ in names], np.int64)]
        documents = [[documents[number][chunk]] for number, chunk in names]
    starts, ends = [], []
    for chunks, before in zip(documents, prompts, strict=True):
        lengths = np.array([len(chunk) for chunk in chunks])
        ends.append(len(before) + np.cumsum(lengths) + len(separator) * np.arange(len(chunks)))
        starts.append(ends[-1] - lengths)
    windows = windows if late else None
    return ChunkRequest(texts, starts, ends, names, adapter_ids, request.max_length, request.batch_size, overlap, windows)


def as_documents(documents: Any) -> list[list[str]]:
    """Returns the chunks of each document of a call."""
    if isinstance(documents, str | bytes | dict | Set) or not isinstance(documents, Iterable):
        kind = type(documents).__name__
        raise ValueError(f"documents must be a sequence of documents, each the sequence of its chunks, not {kind}")
    return [_as_chunks(number, chunks) for number, chunks in enumerate(documents)]


def _as_chunks(number: int, chunks: Any) -> list[str]:
    if isinstance(chunks, str | bytes | dict | Set) or not isinstance(chunks, Iterable):
        raise ValueError(f"document {number} must be the sequence of its chunks, not {type(chunks).__name__}")
    chunks = list(chunks)
    if not chunks:
        raise ValueError(f"document {number} has no chunks")
    for index, chunk in enumerate(chunks):
        if not isinstance(chunk, str):
            raise ValueError(f"chunk {index} of document {number} is no string but {type(chunk).__name__}")
        if (position := lone_surrogate(chunk)) is not None:
            raise ValueError(
                f"chunk {index} of document {number} is not valid Unicode: a lone surrogate at position {position}"
            )
    return [str(chunk) for chunk in chunks]


# ---- tokens


def tokenize_documents(backend: "tokenizers.Tokenizer", request: ChunkRequest) -> tuple[list[Window], int]:
    """Returns the windows of all documents, and how many were cut instead.

    Raises:
        ValueError: a chunk has no token of its own, or a window no room beside prompt and overlap.
    """
    found: list[Window] = []
    truncated = first_chunk = 0
    for start in range(0, len(request.texts), DOCUMENTS_AT_ONCE):
        encodings = backend.encode_batch(request.texts[start : start + DOCUMENTS_AT_ONCE])
        for document, encoding in enumerate(encodings, start):
            tokens = _tokens(encoding, request, document, first_chunk)
            if request.windows is None:
                truncated += len(tokens.token_ids) > request.max_length
                pieces = [_cut(tokens, request.max_length)]
            else:
                pieces = split_into_windows(tokens, request.max_length, request.overlap, request.windows)
            for token_ids, chunk_ids in pieces:
                found.append(Window(document, token_ids, np.where(chunk_ids < 0, -1, chunk_ids + first_chunk)))
            first_chunk += len(request.chunk_starts[document])
    return found, truncated


def _tokens(encoding: "tokenizers.Encoding", request: ChunkRequest, document: int, first_chunk: int) -> Tokens:
    starts, ends = request.chunk_starts[document], request.chunk_ends[document]
    special = np.array(encoding.special_tokens_mask, bool)
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    own = own_chunks(request.texts[document], starts, ends, np.where(special[:, None], 0, offsets))
    if len(lacking := np.setdiff1d(np.arange(len(starts)), own)):
        number, chunk = request.names[first_chunk + lacking[0]]
        raise ValueError(
            f"chunk {chunk} of document {number} has no token of its own: "
            "it is white space, or the tokens of its characters begin before it"
        )
    # A token that is of no chunk goes to the chunk before it, at the start to the first.
    last = np.maximum.accumulate(np.where(own >= 0, np.arange(len(own)), -1))
    chunk_ids = np.where(last >= 0, own[last], 0)
    before = special | (offsets[:, 1] <= starts[0])
    tail = int(np.argmin(special[::-1]))
    chunk_ids[len(chunk_ids) - tail :] = len(starts) - 1
    return Tokens(np.array(encoding.ids, np.int32), chunk_ids.astype(np.int32), int(np.argmin(before)), tail)


def own_chunks(
    text: str, starts: Int[np.ndarray, " c"], ends: Int[np.ndarray, " c"], offsets: Int[np.ndarray, "t 2"]
) -> Int[np.ndarray, " t"]:
    """Returns the chunk that holds the first character of each token that is of a chunk and no
    white space; -1 = there is none, as in special tokens, and those of the prompt or the separator.

    Args:
        text: the document behind its prompt.
        starts, ends: of the chunks in it, ascending.
        offsets: characters of each token; tokens may share some, and have none.
    """
    chunk_of = np.full(len(text) + 1, -1)
    for chunk, (start, end) in enumerate(zip(starts, ends, strict=True)):
        chunk_of[start:end] = chunk
    first = first_characters(not_white_space(text) & (chunk_of[:-1] >= 0))[offsets[:, 0]]
    return np.where(first < offsets[:, 1], chunk_of[first], -1)


def _cut(tokens: Tokens, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens and the last, as `text.tokenizer.tokenize` cuts a text."""
    if len(tokens.token_ids) <= limit:
        return tokens.token_ids, tokens.chunk_ids
    kept = np.append(np.arange(limit - 1), len(tokens.token_ids) - 1)
    return tokens.token_ids[kept], tokens.chunk_ids[kept]


def split_into_windows(
    tokens: Tokens, limit: int, overlap: int | None, windows: WindowForm
) -> Iterator[tuple[Int[np.ndarray, " w"], Int[np.ndarray, " w"]]]:
    """Yields the token ids of each window, and the chunk that each of them counts in, -1 = none.

    Every token counts in one window: that of the overlap in the first that holds it; where every
    window has special tokens and the prompt, these in the first, those behind in the last.

    Args:
        tokens: of a document.
        limit: tokens of a window.
        overlap: tokens of the document that a window repeats of the one before it; None = OVERLAP,
            or half of what a window holds of the document if that is less.
        windows: their form.

    Raises:
        ValueError: a window holds no more than prompt and overlap.
    """
    token_ids, chunk_ids, *_ = tokens
    if len(token_ids) <= limit:
        yield token_ids, chunk_ids
        return
    lead, tail = (tokens.lead, tokens.tail) if windows == "framed" else (0, 0)
    room = limit - lead - tail
    if room < 1:
        raise ValueError(f"a window of {limit} tokens holds nothing beside the {lead + tail} of special tokens and prompt")
    overlap = min(OVERLAP, room // 2) if overlap is None else overlap
    if overlap >= room:
        raise ValueError(
            f"overlap {overlap} is not less than what a window of {limit} tokens holds of a document: {room}, "
            "beside special tokens and prompt"
        )
    end = len(token_ids) - tail
    around = np.arange(lead), np.arange(end, len(token_ids))
    for start in range(lead, end, room - overlap):
        places = np.arange(start, min(start + room, end))
        is_first, is_last = start == lead, start + room >= end
        counted = np.concatenate(
            [np.full(lead, is_first), places >= start + (0 if is_first else overlap), np.full(tail, is_last)]
        )
        places = np.concatenate([around[0], places, around[1]])
        yield token_ids[places], np.where(counted, chunk_ids[places], -1)
        if is_last:
            return


# ---- batches


def lay_out_chunks(windows: Sequence[Window], plan: BatchPlan, pad_id: int) -> tuple[PackedBatch, Int[np.ndarray, "b s"]]:
    """Writes the windows of a planned batch into arrays.

    Returns:
        (batch, with the pool ids of chunks and `texts` as indices in `windows`; the chunk of each
        pool id - 1, -1 = none).
    """
    batch = lay_out([window.token_ids for window in windows], plan, pad_id)
    b, t = plan.shape
    in_rows = [np.concatenate([windows[i].chunk_ids for i in row]) if row else np.zeros(0, np.int32) for row in plan.rows]
    numbered = [np.unique(ids, return_inverse=True) for ids in in_rows]
    distinct = [chunks[chunks >= 0] for chunks, _ in numbered]
    most = max(len(chunks) for chunks in distinct)
    slots = next((max_texts(t) * step for step in SLOT_STEPS if most <= max_texts(t) * step), t)
    chunks = np.full((b, slots), -1, np.int32)
    for row, (ids, held, (found, inverse)) in enumerate(zip(in_rows, distinct, numbered, strict=True)):
        # np.unique sorts: -1 comes first where there is any, and is pool id 0.
        batch.pool_ids[row, : len(ids)] = inverse + (1 - (len(found) - len(held)))
        chunks[row, : len(held)] = held
    return batch, chunks


def collect_chunks(
    results: Iterator[Result], windows: Sequence[Window], names: Sequence[tuple[int, int]], hidden_size: int, progress: Any
) -> Float[np.ndarray, "n d"]:
    """Returns the mean of each chunk over all its windows; the `texts` of the results are chunks.

    Raises:
        NotFiniteError: a mean is not finite; its indices are of chunks in the call.
    """
    out = np.zeros((len(names), hidden_size), np.float32)
    tokens = np.zeros(len(names), np.int64)
    for window in windows:
        np.add.at(tokens, window.chunk_ids[window.chunk_ids >= 0], 1)
    for batch, means in results:
        slots = batch.texts.shape[1]
        counts = np.stack([np.bincount(row, minlength=slots + 1)[1:] for row in batch.pool_ids])
        held = batch.texts >= 0
        shares = (counts[held] / tokens[batch.texts[held]]).astype(np.float32)  # 1 where a window has all of a chunk
        np.add.at(out, batch.texts[held], np.asarray(means)[held] * shares[:, None])
        progress.update(int((batch.positions[batch.segment_ids > 0] == 0).sum()))
    if wrong := np.flatnonzero(~np.isfinite(out).all(axis=-1)).tolist():
        found = [names[index] for index in wrong]
        raise not_finite(wrong, f"{len(wrong)} of {len(names)} chunks, as (document, chunk)", found)
    return out

"""Turns examples into batches: tokenised, masked, packed, in fixed shapes."""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import tokenizers
from jaxtyping import Float, Int

from jina_jax.text import packing
from jina_jax.text.tokenizer import Tokenizer, private_backend

from ..config import Stage
from .examples import Example
from .masking import mask_words, word_starts

Either = np.ndarray | jax.Array


class TrainBatch(NamedTuple):
    """Inputs of a training step: n examples of s texts each, on the host, then on devices.

    The first axis of every array is split evenly over the devices.
    """

    tokens: Int[Either, "b t"]
    segment_ids: Int[Either, "b t"]
    positions: Int[Either, "b t"]
    adapter_ids: Int[Either, "b g"]
    """Adapter of each text: an index into those that the stage trains; -1 = none."""
    labels: Int[Either, "b t"]
    """Original token of a masked position, -1 elsewhere."""
    places: Int[Either, "n s"]
    """Index of each text among the b * g of its device."""
    scores: Float[Either, " n"]
    groups: Int[Either, " n"]
    """Group of each example; examples of equal group are not negatives of one another."""


class TokenizedTexts(NamedTuple):
    """Tokenised texts of some examples, one example after the other."""

    ids: list[np.ndarray]
    labels: list[np.ndarray] | None
    """Labels of each text for MLM; None for other objectives."""
    adapter_ids: list[int]


class BatchShape(NamedTuple):
    """Shapes that a batch may have on each device."""

    row_length: int
    row_counts: tuple[int, ...]
    """Row counts, ascending; the last one holds any batch."""


Encode = Callable[[Sequence[Example]], TokenizedTexts]


def batch_shape(texts: int, stage: Stage) -> BatchShape:
    """Returns the shapes of a stage's batches.

    The largest row count holds the texts even if all are of full length: packed rows, except the
    last, are so full that no further text fits, so each holds at least row_length // max_length.

    Args:
        texts: texts on each device.
        stage: gives `row_length`, `max_length`, `num_row_counts` and `encode_chunk_rows`.
    """
    per_row = min(stage.row_length // stage.max_length, packing.max_texts(stage.row_length))
    most, chunk = -(-texts // per_row), stage.encode_chunk_rows or 1
    counts = {-(-most * (i + 1) // stage.num_row_counts) for i in range(stage.num_row_counts)}
    if most > chunk:
        counts = {-(-count // chunk) * chunk for count in counts}
    return BatchShape(stage.row_length, tuple(sorted(counts)))


def text_encoder(stage: Stage, prompts: dict[str, str], tokenizer: Tokenizer) -> Encode:
    """Returns the function that tokenises a stage's examples.

    It puts instructions before the texts and suffixes behind them, and cuts texts that are too
    long.

    Args:
        stage: its adapters' instructions are put before the texts.
        prompts: instruction of each task.
        tokenizer: left unchanged; the returned function may run in several threads.
    """
    backend = private_backend(tokenizer)
    if stage.objective == "mlm":
        mask = partial(
            mask_words,
            starts=word_starts(tokenizer),
            rate=stage.mask_rate,
            mask_id=tokenizer.mask_token_id,  # type: ignore[arg-type]
            special_ids=tuple(tokenizer.all_special_ids),
        )
        return lambda examples: _masked_texts(examples, backend, stage.max_length, mask)
    # The anchor takes the first adapter, the texts compared with it the last: the same one, except
    # in retrieval.
    instructions = [prompts.get(task, "") for task in stage.adapters] or [""]
    last = max(len(stage.adapters) - 1, -1) if stage.adapters else -1
    first = 0 if stage.adapters else -1
    instructed = max(len(backend.encode(instruction).ids) for instruction in instructions)

    def encode(examples: Sequence[Example]) -> TokenizedTexts:
        texts, suffixes, adapter_ids = [], [], []
        for example in examples:
            suffix = backend.encode(example.suffix, add_special_tokens=False).ids if example.suffix else []
            if (taken := instructed + len(suffix)) >= stage.max_length:
                raise ValueError(
                    f"stage {stage.name}: max_length {stage.max_length} leaves no room for text; "
                    f"special tokens, instruction and suffix are {taken} tokens"
                )
            for number, text in enumerate(example.texts):
                texts.append(instructions[0 if number == 0 else -1] + text)
                suffixes.append(suffix)
                adapter_ids.append(first if number == 0 else last)
        encodings = backend.encode_batch_fast(texts)
        ids = [_cut(encoding.ids, suffix, stage.max_length) for encoding, suffix in zip(encodings, suffixes, strict=True)]
        return TokenizedTexts(ids, None, adapter_ids)

    return encode


def collate(
    examples: Sequence[Example],
    encode: Encode,
    shape: BatchShape,
    devices: int,
    pad_id: int,
    max_over_processes: Callable[[int], int] = lambda rows: rows,
) -> TrainBatch:
    """Packs examples into one batch, in separate rows for each device.

    Args:
        examples: examples of this process.
        encode: from `text_encoder`.
        shape: from `batch_shape`.
        devices: devices of this process.
        pad_id: padding id of the model.
        max_over_processes: takes the most rows that a device of this process needs, and returns the
            most that a device of any process needs.
    """
    # A device takes every d-th example, as a process takes every p-th: so the split over the same
    # number of devices does not depend on the number of processes.
    shares = [examples[device::devices] for device in range(devices)]
    parts = [encode(share) for share in shares]
    most = packing.max_texts(shape.row_length)
    plans = [packing.best_fit_decreasing([len(ids) for ids in part.ids], shape.row_length, most) for part in parts]
    needed = max_over_processes(max(map(len, plans)))
    rows = next(count for count in shape.row_counts if count >= needed)
    packed = [_packed(part, plan, (rows, shape.row_length), pad_id) for part, plan in zip(parts, plans, strict=True)]
    arrays = {name: np.concatenate([part[name] for part in packed]) for name in packed[0]}
    arrays["places"] = arrays["places"].reshape(len(examples), -1)
    scores = np.array([example.score for share in shares for example in share], np.float32)
    groups = np.array([_group(example) for share in shares for example in share], np.int32)
    return TrainBatch(**arrays, scores=scores, groups=groups)


def _masked_texts(examples: Sequence[Example], backend: tokenizers.Tokenizer, length: int, mask: Callable) -> TokenizedTexts:
    """Masks words of the texts; takes a random window of a text that is too long."""
    ids, labels = [], []
    for example, encoding in zip(examples, backend.encode_batch_fast([e.texts[0] for e in examples]), strict=True):
        rng = np.random.default_rng(example.seed)
        tokens = np.array(encoding.ids, np.int32)
        if (over := len(tokens) - length) > 0:
            start = 1 + int(rng.integers(over + 1))
            tokens = np.concatenate([tokens[:1], tokens[start : start + length - 2], tokens[-1:]])
        masked, originals = mask(tokens, rng=rng)
        ids.append(masked)
        labels.append(originals)
    return TokenizedTexts(ids, labels, [-1] * len(ids))


def _cut(ids: list[int], suffix: list[int], length: int) -> np.ndarray:
    """Puts the suffix before the last special token; cuts the text to `length` tokens in all."""
    return np.array([*ids[:-1][: length - 1 - len(suffix)], *suffix, ids[-1]], np.int32)


def _packed(texts: TokenizedTexts, plan: list[list[int]], shape: tuple[int, int], pad_id: int) -> dict[str, np.ndarray]:
    plan = plan + [[] for _ in range(shape[0] - len(plan))]
    rows = packing.lay_out(texts.ids, packing.BatchPlan(plan, shape), pad_id)
    held = rows.texts >= 0
    adapter_ids = np.where(held, np.array(texts.adapter_ids, np.int32)[rows.texts], -1)
    places = np.empty(len(texts.ids), np.int32)
    places[rows.texts[held]] = np.flatnonzero(held)
    labels = np.full(shape, -1, np.int32)
    if texts.labels is not None:
        labels = packing.lay_out(texts.labels, packing.BatchPlan(plan, shape), -1).tokens
    return {
        "tokens": rows.tokens,
        "segment_ids": rows.segment_ids,
        "positions": rows.positions,
        "adapter_ids": adapter_ids.astype(np.int32),
        "labels": labels,
        "places": places,
    }


def _group(example: Example) -> int:
    """Returns an integer for the group of an example.

    Examples without a group are grouped by anchor, since equal anchors have the same positives. The
    integer is a checksum: it is the same on every process, and a rare collision costs one negative.
    """
    return zlib.crc32((example.group or f"\0{example.texts[0]}").encode()) >> 1

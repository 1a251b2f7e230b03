"""Turns examples into batches: tokenised, masked, packed, in fixed shapes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import tokenizers
from jaxtyping import Int

from jina_jax.text import packing
from jina_jax.text.tokenizer import Tokenizer, private_backend

from ..config import Stage
from .examples import Example
from .masking import mask_words, word_starts
from .whole_batch import Agreed, agree_alone

Either = np.ndarray | jax.Array


class PackedRows(NamedTuple):
    """Packed rows of texts that one adapter embeds, or the base."""

    tokens: Int[Either, "b t"]
    segment_ids: Int[Either, "b t"]
    positions: Int[Either, "b t"]
    labels: Int[Either, "b t"]
    """Original token of a masked position, -1 elsewhere."""


class TrainBatch(NamedTuple):
    """Inputs of a training step: n examples of s texts each, on the host, then on devices.

    The first axis of every array is split evenly over the devices.
    """

    parts: tuple[PackedRows, ...]
    """The rows of each adapter that the stage trains, in their order; those of the base alone."""
    places: Int[Either, "n s"]
    """Index of each text among the places of its device: g for each of its rows, part by part."""
    scores: Int[Either, "n 2"]
    """Score of each example, as `score_keys` writes it."""
    groups: Int[Either, "n numbers"]
    """Number of the group of each example, then of each of its negatives (`groups.py`). A text is
    no negative of an anchor of equal number. An example of one text has one number."""


class TokenizedTexts(NamedTuple):
    """Tokenised texts of some examples, one example after the other."""

    ids: list[np.ndarray]
    labels: list[np.ndarray] | None
    """Labels of each text for MLM; None for other objectives."""
    parts: list[int]
    """Part of the batch that each text is of."""


class BatchShape(NamedTuple):
    """Shapes that a batch may have on each device."""

    row_length: int
    texts_per_row: int
    """Most texts of a row."""
    row_counts: tuple[tuple[int, ...], ...]
    """Row counts of the parts, the fewest rows first; the last ones hold any batch."""


Encode = Callable[[Sequence[Example]], TokenizedTexts]


def text_encoder(stage: Stage, instructions: dict[str, str], tokenizer: Tokenizer) -> Encode:
    """Returns the function that tokenises a stage's examples.

    It puts prompts before the texts and suffixes behind them, and cuts texts that are too long.

    Args:
        stage: its adapters' instructions are put before the texts; without adapters, its prompts.
        instructions: instruction of each task.
        tokenizer: left unchanged; the returned function may run in several threads.
    """
    backend = private_backend(tokenizer)
    if stage.objective == "mlm":
        if tokenizer.mask_token_id is None:
            raise ValueError(f"stage {stage.name}: the tokenizer has no mask token, which masked language modelling needs")
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
    prompts = [instructions.get(task, "") for task in stage.adapters] or stage.prompts
    last = max(len(stage.adapters) - 1, 0)
    prompted = max(len(backend.encode(prompt).ids) for prompt in prompts)

    def encode(examples: Sequence[Example]) -> TokenizedTexts:
        texts, suffixes, parts = [], [], []
        for example in examples:
            suffix = backend.encode(example.suffix, add_special_tokens=False).ids if example.suffix else []
            if (taken := prompted + len(suffix)) >= stage.max_length:
                raise ValueError(
                    f"stage {stage.name}: max_length {stage.max_length} leaves no room for text; "
                    f"special tokens, prompt and suffix are {taken} tokens"
                )
            for number, text in enumerate(example.texts):
                texts.append(prompts[0 if number == 0 else -1] + text)
                suffixes.append(suffix)
                parts.append(0 if number == 0 else last)
        encodings = backend.encode_batch_fast(texts)
        ids = [_cut(encoding.ids, suffix, stage.max_length) for encoding, suffix in zip(encodings, suffixes, strict=True)]
        return TokenizedTexts(ids, None, parts)

    return encode


def collate(
    examples: Sequence[Example],
    encode: Encode,
    shape: BatchShape,
    devices: int,
    pad_id: int,
    agree: Callable[[Int[np.ndarray, " parts"], Sequence[Example]], Agreed] = agree_alone,
) -> TrainBatch:
    """Packs examples into one batch, in separate rows for each device.

    Args:
        examples: examples of this process.
        encode: from `text_encoder`.
        shape: its row counts are of `row_counts.fitted_row_counts`.
        devices: devices of this process.
        pad_id: padding id of the model.
        agree: takes the most rows of each part that a device of this process needs, and the
            examples; returns what holds for all processes (`whole_batch.py`).
    """
    # A device takes every d-th example, as a process takes every p-th: so the split over the same
    # number of devices does not depend on the number of processes.
    shares = [examples[device::devices] for device in range(devices)]
    encoded = [encode(share) for share in shares]
    plans = [_plans(texts, shape) for texts in encoded]
    ordered = [example for share in shares for example in share]
    needed = np.max([[len(plan) for plan in each] for each in plans], axis=0)
    agreed = agree(needed, ordered)
    rows = next(counts for counts in shape.row_counts if np.all(np.array(counts) >= agreed.rows))
    laid_out = [_laid_out(texts, each, rows, shape.row_length, pad_id) for texts, each in zip(encoded, plans, strict=True)]
    of_devices = [parts for parts, _ in laid_out]
    parts = tuple(jax.tree.map(lambda *rows: np.concatenate(rows), *part) for part in zip(*of_devices, strict=True))
    places = np.concatenate([places for _, places in laid_out]).reshape(len(examples), -1)
    return TrainBatch(parts, places, score_keys([example.score for example in ordered]), agreed.groups)


def score_keys(scores: Sequence[float]) -> Int[np.ndarray, "n 2"]:
    """Returns integers (high, low) whose order, high first, is that of the scores in float64.

    Devices compute in float32, in which close scores would become equal.
    """
    # Bits of floats are in their order, apart from negative ones, which are the other way round.
    bits = (np.array(scores, np.float64) + 0.0).view(np.int64)  # the sum makes one zero of -0 and 0
    keys = np.where(bits < 0, bits ^ np.int64(2**63 - 1), bits)
    return np.stack([keys >> 32, (keys & 0xFFFFFFFF) - 2**31], axis=1).astype(np.int32)


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
    return TokenizedTexts(ids, labels, [0] * len(ids))


def _cut(ids: list[int], suffix: list[int], length: int) -> np.ndarray:
    """Puts the suffix before the last special token; cuts the text to `length` tokens in all."""
    return np.array([*ids[:-1][: length - 1 - len(suffix)], *suffix, ids[-1]], np.int32)


def _plans(texts: TokenizedTexts, shape: BatchShape) -> list[list[list[int]]]:
    """Rows of each part, as lists of texts."""
    plans = []
    for part in range(len(shape.row_counts[0])):
        members = [index for index, of in enumerate(texts.parts) if of == part]
        packed = packing.best_fit_decreasing(
            [len(texts.ids[index]) for index in members], shape.row_length, shape.texts_per_row
        )
        plans.append([[members[i] for i in row] for row in packed])
    return plans


def _laid_out(
    texts: TokenizedTexts, plans: list[list[list[int]]], rows: Sequence[int], length: int, pad_id: int
) -> tuple[list[PackedRows], Int[np.ndarray, " texts"]]:
    """Lays out the texts of a device; returns the parts, and the place of each text."""
    parts, first, places = [], 0, np.empty(len(texts.ids), np.int32)
    for plan, count in zip(plans, rows, strict=True):
        plan = packing.BatchPlan(plan + [[] for _ in range(count - len(plan))], (count, length))
        packed = packing.lay_out(texts.ids, plan, pad_id)
        labels = np.full((count, length), -1, np.int32)
        if texts.labels is not None:
            labels = packing.lay_out(texts.labels, plan, -1).tokens
        held = packed.texts >= 0
        places[packed.texts[held]] = first + np.flatnonzero(held)
        first += held.size
        parts.append(PackedRows(packed.tokens, packed.segment_ids, packed.positions, labels))
    return parts, places

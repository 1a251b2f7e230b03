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
    last = max(len(stage.adapters) - 1, -1) if stage.adapters else -1
    first = 0 if stage.adapters else -1
    prompted = max(len(backend.encode(prompt).ids) for prompt in prompts)

    def encode(examples: Sequence[Example]) -> TokenizedTexts:
        texts, suffixes, adapter_ids = [], [], []
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
    agree: Callable[[int, Sequence[Example]], Agreed] = agree_alone,
) -> TrainBatch:
    """Packs examples into one batch, in separate rows for each device.

    Args:
        examples: examples of this process.
        encode: from `text_encoder`.
        shape: from `batch_shape`.
        devices: devices of this process.
        pad_id: padding id of the model.
        agree: takes the most rows that a device of this process needs, and the examples; returns
            what holds for all processes (`whole_batch.py`).
    """
    # A device takes every d-th example, as a process takes every p-th: so the split over the same
    # number of devices does not depend on the number of processes.
    shares = [examples[device::devices] for device in range(devices)]
    parts = [encode(share) for share in shares]
    most = packing.max_texts(shape.row_length)
    plans = [packing.best_fit_decreasing([len(ids) for ids in part.ids], shape.row_length, most) for part in parts]
    ordered = [example for share in shares for example in share]
    agreed = agree(max(map(len, plans)), ordered)
    rows = next(count for count in shape.row_counts if count >= agreed.rows)
    packed = [_packed(part, plan, (rows, shape.row_length), pad_id) for part, plan in zip(parts, plans, strict=True)]
    arrays = {name: np.concatenate([part[name] for part in packed]) for name in packed[0]}
    arrays["places"] = arrays["places"].reshape(len(examples), -1)
    return TrainBatch(**arrays, scores=score_keys([example.score for example in ordered]), groups=agreed.groups)


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

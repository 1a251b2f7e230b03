"""From examples to batches: tokenised, masked, packed, in fixed shapes."""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import tokenizers
from jaxtyping import Float, Int

from jina_jax.text import packing
from jina_jax.text.tokenizer import Tokenizer

from ..config import Stage
from .examples import Example
from .masking import mask_words, word_starts

Either = np.ndarray | jax.Array


class TrainBatch(NamedTuple):
    """What a step takes; n examples of s texts each. On the host, then on devices.

    Every array's first axis is split evenly over the devices.
    """

    tokens: Int[Either, "b t"]
    segment_ids: Int[Either, "b t"]
    positions: Int[Either, "b t"]
    adapter_ids: Int[Either, "b g"]
    """Adapter of each text, among those that the stage trains; -1 = none."""
    labels: Int[Either, "b t"]
    """Original token where one was masked, else -1."""
    places: Int[Either, "n s"]
    """Where each text is among the b * g of its own device."""
    scores: Float[Either, " n"]
    groups: Int[Either, " n"]
    """Examples of equal group are not negatives of one another."""


class TokenizedTexts(NamedTuple):
    """The tokenised texts of some examples, one example after the other."""

    ids: list[np.ndarray]
    labels: list[np.ndarray] | None
    """For masked-language training."""
    adapter_ids: list[int]


class BatchShape(NamedTuple):
    """Sizes of a batch on each device."""

    row_length: int
    row_counts: tuple[int, ...]
    """Ascending; the last one holds any batch."""


Encode = Callable[[Sequence[Example]], TokenizedTexts]


def batch_shape(texts: int, stage: Stage) -> BatchShape:
    """Shapes of the batches of a stage that puts so many texts on each device.

    The largest row count holds them even if all are of full length: packed rows, the last excepted, are so full that no text
    fits in any more, and so hold row_length // length texts at least.
    """
    per_row = min(stage.row_length // stage.max_length, packing.max_texts(stage.row_length))
    most, chunk = -(-texts // per_row), stage.encode_chunk_rows or 1
    counts = {-(-most * (i + 1) // stage.num_row_counts) for i in range(stage.num_row_counts)}
    if most > chunk:
        counts = {-(-count // chunk) * chunk for count in counts}
    return BatchShape(stage.row_length, tuple(sorted(counts)))


def text_encoder(stage: Stage, prompts: dict[str, str], tokenizer: Tokenizer) -> Encode:
    """The function that tokenises a stage's examples: instructions before, suffixes behind, too long texts cut.

    Args:
        stage: its adapters' instructions are put before the texts.
        prompts: instruction of each task.
        tokenizer: is not changed; the returned function may run in several threads.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    if stage.objective == "mlm":
        mask = partial(
            mask_words,
            starts=word_starts(tokenizer),
            rate=stage.mask_rate,
            mask_id=tokenizer.mask_token_id,  # type: ignore[arg-type]
            special_ids=tuple(tokenizer.all_special_ids),
        )
        return lambda examples: _masked_texts(examples, backend, stage.max_length, mask)
    # The anchor is of the first adapter, what it is compared with of the last: of the same one, save in retrieval.
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
    """One batch; each device's share of the examples is packed into rows of its own.

    Args:
        examples: of this process.
        encode: from `text_encoder`.
        shape: from `batch_shape`.
        devices: of this process.
        pad_id: of the model.
        max_over_processes: the most rows that a device of any process needs, from the most that one of this process does.
    """
    # Every d-th, as every p-th example is this process's: on as many devices, any number of processes makes the same shares.
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
    """Texts with masked words; of one that is too long, a window anywhere in it."""
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
    """The suffix before the last special token, and the text cut so that all are `length` at most."""
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
    """A number for the group; where there is none, for the anchor, since equal anchors have the same positives.

    A checksum: the same on every process, and a rare collision costs one negative.
    """
    return zlib.crc32((example.group or f"\0{example.texts[0]}").encode()) >> 1

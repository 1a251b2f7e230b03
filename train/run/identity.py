"""Identity of a run: a checkpoint of another run is refused.

Data and models are known by their contents, whatever their paths. Fields that say only how a run is
executed may change; those that change its numbers from then on are reported.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from jina_jax.files import json_diff
from jina_jax.model.encoder import Encoder
from jina_jax.model.parameters import variables
from jina_jax.text.tokenizer import Tokenizer, private_backend

from ..config import TrainConfig, to_dict
from ..data.records import Record
from ..data.tfds_datasets import RecordSource
from ..old_names import with_new_names
from ..step.trainable_split import split_trainable

RUNNING = ("mesh", "checkpoint_every", "keep_checkpoints", "log_every", "read_threads")
"""Fields of the configuration that are no part of a run's identity."""

EXECUTION = ("encode_chunk_rows", "logit_chunk", "remat", "row_length", "num_row_counts")
"""Fields of a stage that leave its batches and its loss as they are, but for rounding."""

SAMPLED = ("language", "group", "text", "anchor", "positive", "negatives", "sentence1", "sentence2", "score", "label")
"""Fields of records that `dataset_identity` samples, fixed since runs have been saved with it."""

PROBES = ("", "Hello, world!", "ÀÉ ﬁ ½ naïve", "日本語の文。", "Привет, мир", "a  b\tc\n", "🦊 x<s>y</s>", "12,345.67")


class Changes(NamedTuple):
    """Fields in which a configuration differs from that of a saved run."""

    refused: list[str]
    """Differences that make it another run."""
    taken: list[str]
    """Differences that it may have, and what follows from each."""


def run_identity(
    config: TrainConfig, start: Encoder, encoder: Encoder, tokenizer: Tokenizer, sources: Sequence[Sequence[RecordSource]]
) -> dict[str, Any]:
    """Returns the fields by which a checkpoint is known to belong to a run.

    Args:
        config: configuration of the run.
        start: the model that it starts from, as it was loaded.
        encoder: the same with the adapters and heads of the stages.
        tokenizer: the model's.
        sources: opened datasets of each stage.
    """
    arrays = {path: variable.get_value() for path, variable in variables(start).items()}
    return {
        "config": {name: value for name, value in to_dict(config).items() if name not in RUNNING},
        "model": encoder.config.to_dict(),
        "frozen": fingerprint(split_trainable(encoder, config.stages[0]).frozen),
        "start": None if config.start.source is None else fingerprint(arrays),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "records": [[dataset_identity(source) for source in of_stage] for of_stage in sources],
    }


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Compares the identity of a run with that of a saved one, whichever version saved it.

    Args:
        saved: fields of a checkpoint: an identity, and `done`, the steps of each stage.
        now: from `run_identity`.
    """
    done = saved["done"]
    saved, now = _plain({name: saved.get(name) for name in now}), _plain(now)
    saved["config"] = _with_new_fields(with_new_names(saved["config"]), now)
    found = Changes([], [])
    # What has been compared is made equal in `saved`; what still differs then is refused.
    _compare_start(saved, now, found)
    _compare_prompts(saved, now, found)
    _compare_data(saved, now, found)
    _compare_stages(saved, now, done, found)
    return Changes(found.refused + json_diff(saved, now), found.taken)


def fingerprint(arrays: Mapping[str, Array]) -> str:
    """SHA-256 over arrays and their paths, in the order of the paths."""
    digest = hashlib.sha256()
    for path in sorted(arrays):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(arrays[path]).data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 over the vocabulary of a tokenizer and what it makes of some texts."""
    backend = private_backend(tokenizer)
    model = json.loads(backend.to_str())["model"]
    ids = [backend.encode(text).ids for text in PROBES]
    parts = [model.get("vocab"), model.get("merges"), sorted(backend.get_vocab().items()), ids]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def dataset_identity(source: RecordSource) -> dict[str, Any]:
    """Returns what a dataset is known by: the hash that was made when it was prepared.

    A dataset that an earlier version prepared has none. It is known by its number of records and a
    checksum of 16 of them, as every dataset was to that version.
    """
    some = [_sampled(source[i * (len(source) - 1) // 15]) for i in range(16)]
    return {"sample": f"{len(source)} records, {zlib.crc32(''.join(some).encode()):08x}", "sha256": source.sha256}


def _sampled(record: Record) -> str:
    """The record as earlier versions wrote it, which held scores in float32."""
    values = {name: getattr(record, name) for name in type(record).model_fields if name in SAMPLED}
    if "score" in values:
        values["score"] = float(np.float32(values["score"]))
    return f"{type(record).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def _with_new_fields(config: dict[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the fields that a saved configuration is older than, with what they meant then.

    Every model became a rotary one, and texts had no prompts.
    """
    kept = now["model"].get("position_type") == "rope"
    start = {"position_type": now["config"]["start"]["position_type"] if kept else "rope"} | config["start"]
    return config | {"start": start, "stages": [{"prompts": ["", ""]} | stage for stage in config["stages"]]}


# ---- what may differ


def _compare_start(saved: dict[str, Any], now: dict[str, Any], found: Changes) -> None:
    """Another path of the same model and tokenizer, and another word for the same positions."""
    before, after = saved["config"]["start"], now["config"]["start"]
    if saved["model"].get("position_type") == now["model"].get("position_type"):
        _take(before, after, "position_type", "start.position_type", "the model has the same positions", found)
    hashed = saved["tokenizer"] is not None  # else an earlier version saved it, and the path decides
    for name, key in (("source", "start"), ("tokenizer", "tokenizer")):
        old, new = before[name], after[name]
        if not hashed:
            same = _same_directory(old, new)
        elif not (same := saved[key] == now[key]):
            what = f"the {'model' if key == 'start' else 'tokenizer'} of {new or after['source']}"
            found.refused.append(f"{what}: SHA-256 {str(saved[key])[:16]} -> {str(now[key])[:16]}")
        if same:
            _take(before, after, name, f"start.{name}", "it has the same contents", found)
        saved[key] = now[key]


def _same_directory(a: str | None, b: str | None) -> bool:
    return a is not None and b is not None and Path(a).exists() and Path(b).exists() and Path(a).samefile(b)


def _compare_prompts(saved: dict[str, Any], now: dict[str, Any], found: Changes) -> None:
    """Other prompts of the model, of which only the instructions of trained tasks stand before
    texts of the run."""
    trained = {task for stage in now["config"]["stages"] for task in stage["adapters"]}
    others = []
    for fields in (saved, now):
        prompts = dict(fields["model"].get("prompts", []))
        others.append({name: prompts.pop(name) for name in [*prompts] if name not in trained})
        fields["model"]["prompts"] = prompts
    lines = json_diff(others[0], others[1], "model.prompts")
    found.taken.extend(f"{line} (the model's, and of no text of this run)" for line in lines)


def _compare_data(saved: dict[str, Any], now: dict[str, Any], found: Changes) -> None:
    """Another path of the same records."""
    for i, (stage, stage_now) in enumerate(_pairs(saved["config"]["stages"], now["config"]["stages"])):
        for j, (before, after) in enumerate(_pairs(stage["datasets"], stage_now["datasets"])):
            old, new = saved["records"][i][j], now["records"][i][j]
            if _same_records(old, new):
                _take(before, after, "path", f"stages.{i}.datasets.{j}.path", "it has the same records", found)
            else:
                found.refused.append(f"the records of {after['path']}: {_described(old)} -> {_described(new)}")
            saved["records"][i][j] = new


def _same_records(old: Any, new: dict[str, Any]) -> bool:
    if isinstance(old, str):  # saved by an earlier version
        return old == new["sample"]
    if old["sha256"] and new["sha256"]:
        return old["sha256"] == new["sha256"]
    return old["sample"] == new["sample"]


def _described(records: Any) -> str:
    if isinstance(records, str) or not records["sha256"]:
        return records if isinstance(records, str) else records["sample"]
    return f"{records['sample']}, SHA-256 {records['sha256'][:16]}"


def _compare_stages(saved: dict[str, Any], now: dict[str, Any], done: list[int], found: Changes) -> None:
    for i, (before, after) in enumerate(_pairs(saved["config"]["stages"], now["config"]["stages"])):
        for name in EXECUTION:
            _take(before, after, name, f"stages.{i}.{name}", "from here on not bit for bit", found)
        steps, taken = after["steps"], done[i]
        if steps < taken:
            found.refused.append(f"stages.{i}.steps: {before['steps']} -> {steps}, and {taken} have been taken")
            before["steps"] = steps
        follows = f"from here on the learning rate is that of a run of {steps} steps"
        _take(before, after, "steps", f"stages.{i}.steps", follows, found)


def _take(before: dict[str, Any], after: dict[str, Any], name: str, place: str, follows: str, found: Changes) -> None:
    """Notes the difference in a field, if there is one, and makes the fields equal."""
    found.taken.extend(f"{line} ({follows})" for line in json_diff(before[name], after[name], place))
    before[name] = after[name]


def _pairs(saved: list[Any], now: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Pairs of what both have; that one has more than the other is a difference by itself."""
    return zip(saved, now, strict=False)


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Copy of the fields as JSON has them."""
    return json.loads(json.dumps(fields))

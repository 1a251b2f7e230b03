"""What makes a run another one: contents, and never their paths."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
from helpers.training import KINDS, records, run_config, stages
from jina_jax import files
from jina_jax.checkpoints.native import load_checkpoint, save_checkpoint
from jina_jax.model.adapters import base_arrays
from jina_jax.model.parameters import from_arrays
from train.config import DatasetConfig, InitialModel, TrainConfig
from train.data.stream import open_datasets
from train.data.tfds_datasets import open_dataset, prepare_records
from train.run import identity
from train.run.identity import changes, run_identity
from train.run.initial_model import load_start, prepare_for_stages

SMALL = {"vocab_size": 16_000, "hidden_size": 8, "num_layers": 1, "num_heads": 1, "mlp_size": 8}


@pytest.fixture
def pairs(tmp_path) -> Path:
    return write_pairs(tmp_path / "pairs.jsonl")


def write_pairs(file: Path, **third: str) -> Path:
    """Pairs; `third` changes one of them, which no sample of 16 of them has."""
    lines = records("pair")
    lines[3] |= third
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return file


@pytest.fixture(scope="module")
def source(make_encoder, tokenizer, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    save_checkpoint(directory, make_encoder(**SMALL), tokenizer)
    return directory


def config_of(data: Path | str, source: Path, **fields: Any) -> TrainConfig:
    kinds = ("text", "pair", "triplet", "scored_pair", "labelled_text")
    datasets = {kind: DatasetConfig(str(data), kind) for kind in kinds}
    return run_config(stages(datasets, **({"steps": 10} | fields))["pairs"], start=InitialModel(source=str(source)))


def identity_of(config: TrainConfig, workdir: Path) -> dict[str, Any]:
    start, tokenizer = load_start(config)
    opened = [open_datasets(stage, workdir) for stage in config.stages]
    return run_identity(config, start, prepare_for_stages(start, config), tokenizer, opened)


def test_the_same_data_and_model_under_other_paths_are_the_same_run(pairs, source, tmp_path, monkeypatch):
    saved = identity_of(config_of(pairs, source), tmp_path / "run")
    shutil.copytree(source, tmp_path / "model")
    shutil.copy(pairs, tmp_path / "other.jsonl")
    dataset = prepare_records({"train": [pairs]}, "pair", tmp_path / "prepared")
    monkeypatch.chdir(tmp_path)
    os.symlink("pairs.jsonl", "link.jsonl")
    for data in ("pairs.jsonl", "link.jsonl", "other.jsonl", str(dataset), str(dataset.relative_to(tmp_path))):
        found = changes(saved | {"done": [5]}, identity_of(config_of(data, Path("model")), tmp_path / "run"))
        assert not found.refused and len(found.taken) == 2, found
        assert found.taken[0].endswith('-> "model" (it has the same contents)')
        assert found.taken[1].endswith(f'-> "{data}" (it has the same records)')


def test_changed_data_are_refused_by_their_name(pairs, source, tmp_path):
    config = config_of(pairs, source)
    saved = identity_of(config, tmp_path / "run")
    write_pairs(pairs, positive="something else")
    found = changes(saved | {"done": [5]}, identity_of(config, tmp_path / "run"))
    assert len(found.refused) == 1 and found.refused[0].startswith(f"the records of {pairs}: 40 records, ")
    assert not found.taken


def test_a_changed_model_or_tokenizer_is_refused_by_its_name(pairs, source, tmp_path):
    saved = identity_of(config_of(pairs, source), tmp_path / "run")
    encoder, (_, tokenizer) = load_checkpoint(source), load_start(config_of(pairs, source))
    arrays = base_arrays(encoder)
    arrays["layers.up.kernel"] = arrays["layers.up.kernel"].at[0, 0, 0].add(1e-3)
    save_checkpoint(tmp_path / "changed", from_arrays(encoder.config, arrays, dtype=jnp.float32), tokenizer)
    found = changes(saved | {"done": [5]}, identity_of(config_of(pairs, tmp_path / "changed"), tmp_path / "run"))
    assert found.refused[0].startswith(f"the model of {tmp_path / 'changed'}: SHA-256 ") and not found.taken

    (tmp_path / "tokenizer").mkdir()
    fields = json.loads((source / "tokenizer.json").read_text("utf-8"))
    pieces = fields["model"]["vocab"]
    pieces[1000][1], pieces[2000][1] = pieces[2000][1], pieces[1000][1]
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(fields), "utf-8")
    config = config_of(pairs, source)
    config = replace(config, start=replace(config.start, tokenizer=str(tmp_path / "tokenizer")))
    found = changes(saved | {"done": [5]}, identity_of(config, tmp_path / "run"))
    assert found.refused[0].startswith(f"the tokenizer of {tmp_path / 'tokenizer'}: SHA-256 ") and not found.taken


EXECUTION = {"encode_chunk_rows": 4, "logit_chunk": 4, "remat": "full", "row_length": 96, "num_row_counts": 2}


@pytest.mark.parametrize("name", EXECUTION)
def test_how_a_step_is_computed_may_change(pairs, source, tmp_path, name):
    before, after = config_of(pairs, source), config_of(pairs, source, **{name: EXECUTION[name]})
    found = changes_of_configs(before, after)
    assert not found.refused and found.taken[0].startswith(f"stages.0.{name}: ")
    assert found.taken[0].endswith(" (from here on not bit for bit)") and len(found.taken) == 1


def changes_of_configs(before: TrainConfig, after: TrainConfig) -> identity.Changes:
    one, two = (
        {"config": identity.to_dict(config), "model": {}, "frozen": "", "start": "", "tokenizer": "", "records": [[RECORDS]]}
        for config in (before, after)
    )
    return changes(one | {"done": [5]}, two)


RECORDS = {"sample": "40 records, 00000000", "sha256": None}


@pytest.mark.parametrize("steps", [20, 7, 5])
def test_a_run_may_have_more_steps_or_fewer(pairs, source, steps):
    found = changes_of_configs(config_of(pairs, source), config_of(pairs, source, steps=steps))
    expected = f"stages.0.steps: 10 -> {steps} (from here on the learning rate is that of a run of {steps} steps)"
    assert found == ([], [expected])


def test_a_step_that_was_taken_stays(pairs, source):
    found = changes_of_configs(config_of(pairs, source), config_of(pairs, source, steps=4))
    assert found == (["stages.0.steps: 10 -> 4, and 5 have been taken"], [])


@pytest.mark.parametrize("field", [{"max_length": 32}, {"temperature": 0.1}, {"batch_size": 16}, {"warmup_steps": 2}], ids=str)
def test_what_a_run_learns_may_not_change(pairs, source, field):
    found = changes_of_configs(config_of(pairs, source), config_of(pairs, source, **field))
    (name,) = field
    assert not found.taken and len(found.refused) == 1 and f"stages.0.{name}: " in found.refused[0]


def older(saved: dict[str, Any]) -> dict[str, Any]:
    """The identity as it was saved before a run could choose its positions and prompts."""
    saved = json.loads(json.dumps(saved))
    del saved["config"]["start"]["position_type"]
    for stage in saved["config"]["stages"]:
        del stage["prompts"]
    return saved | {"done": [5]}


def test_an_older_run_of_a_rotary_model_is_recognised(pairs, source, tmp_path):
    config = config_of(pairs, source)
    saved = identity_of(config, tmp_path)
    assert changes(older(saved), saved) == ([], [])
    asking = replace(config, start=replace(config.start, position_type="rope"))
    assert changes(older(saved), identity_of(asking, tmp_path)) == ([], [])
    prompted = replace(config, stages=(replace(config.stages[0], prompts=("query: ", "")),))
    refused = changes(older(saved), identity_of(prompted, tmp_path)).refused
    assert 'config.stages.0.prompts.0: "" -> "query: "' in refused


def test_an_older_run_of_an_absolute_model_is_one_with_rotary_positions(pairs, make_encoder, tokenizer, tmp_path):
    absolute = make_encoder(**SMALL | {"hidden_size": 16}, position_type="absolute", max_position_embeddings=514)
    save_checkpoint(tmp_path / "absolute", absolute, tokenizer)
    kept = config_of(pairs, tmp_path / "absolute")
    rope = replace(kept, start=replace(kept.start, position_type="rope"))
    now = identity_of(rope, tmp_path)
    saved = older(now)
    assert changes(saved, now) == ([], [])
    refused = changes(saved, identity_of(kept, tmp_path)).refused
    assert {'config.start.position_type: "rope" -> "keep"', 'model.position_type: "rope" -> "absolute"'} <= {*refused}


def test_prompts_of_the_model_that_no_text_has_may_change(pairs, source, tokenizer, tmp_path):
    """An older version did not know those that a published model needs."""
    encoder = load_checkpoint(source)
    encoder.config = replace(encoder.config, prompts=(("query", "query: "), ("note", "")))
    save_checkpoint(tmp_path / "prompted", encoder, tokenizer)
    saved, now = (identity_of(config_of(pairs, model), tmp_path) for model in (source, tmp_path / "prompted"))
    found = changes(saved | {"done": [5]}, now)
    taken = [line for line in found.taken if line.startswith("model.prompts")]
    assert not found.refused and len(taken) == 2
    assert taken[0] == 'model.prompts.query: null -> "query: " (the model\'s, and of no text of this run)'
    assert changes(now | {"done": [5]}, now) == ([], [])


def test_another_instruction_of_a_task_that_is_trained_is_another_run(tmp_path):
    datasets = {kind: DatasetConfig("not read", kind) for kind in KINDS}
    stage = stages(datasets)["separation"]
    one, two = (
        {"config": identity.to_dict(run_config(stage)), "model": {"prompts": [["separation", text]]}}
        | {"frozen": "", "start": "", "tokenizer": "", "records": [[RECORDS, RECORDS]]}
        for text in ("query: ", "")
    )
    assert changes(one | {"done": [4]}, two) == (['model.prompts.separation: "query: " -> ""'], [])


def test_another_word_for_the_same_positions_is_taken(pairs, source, tmp_path):
    kept = config_of(pairs, source)
    rope = replace(kept, start=replace(kept.start, position_type="rope"))
    found = changes(identity_of(kept, tmp_path) | {"done": [5]}, identity_of(rope, tmp_path))
    assert found == ([], ['start.position_type: "keep" -> "rope" (the model has the same positions)'])


def test_data_without_a_hash_are_known_by_a_sample(pairs, source, tmp_path, monkeypatch):
    """Those that an earlier version prepared, and what it saved of them."""
    dataset = prepare_records({"train": [pairs]}, "pair", tmp_path / "prepared")
    (dataset / "metadata.json").unlink()
    now = identity.dataset_identity(open_dataset(dataset, "pair", "train"))
    assert now["sha256"] is None and now["sample"].startswith("40 records, ")
    config = identity.to_dict(config_of(dataset, source))
    same = {"config": config, "model": {}, "frozen": "", "start": None, "tokenizer": None, "done": [5]}
    for saved, refused in ((now["sample"], 0), (now, 0), (now | {"sha256": "a"}, 0), ("40 records, 01234567", 1)):
        found = changes(
            same | {"records": [[saved]]}, same | {"start": "a", "tokenizer": "b", "records": [[now]]} | {"done": 0}
        )
        assert len([line for line in found.refused if "records of" in line]) == refused


def test_a_file_is_hashed_once_while_it_is_unchanged(tmp_path, monkeypatch):
    file, kept = tmp_path / "a.txt", tmp_path / "kept"
    file.write_text("one")
    assert files.kept_sha256(file, kept) == files.sha256(file) and not kept.exists()  # it was changed just now
    monkeypatch.setattr(files, "SETTLED_SECONDS", 0)
    first = files.kept_sha256(file, kept)
    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256", lambda _: pytest.fail("read again"))
        assert files.kept_sha256(file, kept) == first
        monkeypatch.chdir(tmp_path)
        assert files.kept_sha256(Path("./a.txt"), kept) == first
    before = file.stat()
    file.write_text("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size and time
    assert files.kept_sha256(file, kept) == files.sha256(file) != first

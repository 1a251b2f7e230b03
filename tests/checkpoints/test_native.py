"""Native checkpoints are whole or absent, and never silently wrong."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from convert.__main__ import main as convert
from jina_jax import Embedder
from jina_jax.checkpoints import array_store, native
from jina_jax.checkpoints.array_store import check_readable
from jina_jax.checkpoints.native import load_checkpoint, save_checkpoint
from jina_jax.checkpoints.sealed_directory import atomic_directory, check_free, seal, verify
from jina_jax.errors import CheckpointError, ConfigError
from jina_jax.model.parameters import variables


@pytest.fixture
def saved(embedder, tmp_path):
    embedder.save(tmp_path / "model")
    return tmp_path / "model"


def test_an_edited_file_is_refused_until_it_is_sealed(saved):
    path = saved / "config.json"
    path.write_text(path.read_text().replace('"truncate_dim": null', '"truncate_dim": 16'))
    with pytest.raises(CheckpointError, match=r"damaged or edited: \['config.json'\].*python -m convert seal"):
        Embedder.load(saved)
    seal(saved)
    assert Embedder.load(saved).encode("a").shape == (16,)


def no_json(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def another_size(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"mlp_size": 128', '"mlp_size": 96'))


def no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")


def no_arrays(directory: Path) -> None:
    shutil.rmtree(directory / "arrays")


def no_metadata(directory: Path) -> None:
    for file in (directory / "arrays").glob("*METADATA*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_json, "config.json is not JSON"),
        (another_size, "config.json contradicts the arrays"),
        (no_tokenizer, "damaged or not a tokenizer"),
        (no_arrays, "has no arrays"),
        (no_metadata, "arrays"),
    ],
)
def test_files_from_which_no_model_can_be_read_are_not_sealed(saved, damage, message):
    before = (saved / "manifest.json").read_bytes()
    damage(saved)
    result = CliRunner().invoke(convert, ["seal", str(saved)])
    assert result.exit_code == 1 and message in result.output and len(result.output.splitlines()) == 1, result.output
    assert (saved / "manifest.json").read_bytes() == before


def test_a_missing_file_is_named(saved):
    (saved / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"missing: \['tokenizer.json'\]"):
        verify(saved)


def test_files_beside_the_checkpoint_do_not_matter(saved):
    (saved / "README.md").write_text("# my model")
    verify(saved)


def test_a_configuration_that_contradicts_the_arrays(saved):
    path = saved / "config.json"
    path.write_text(path.read_text().replace('"mlp_size": 128', '"mlp_size": 96'))
    seal(saved)
    with pytest.raises(ConfigError, match="contradicts the arrays.*layers.up.kernel"):
        load_checkpoint(saved)
    path.write_text(path.read_text().replace('"mlp_size": 96', '"mlp_sise": 128'))
    seal(saved)
    with pytest.raises(ConfigError, match=r"unknown configuration fields \['mlp_sise'\]"):
        load_checkpoint(saved)


def test_a_checkpoint_of_a_later_version(saved):
    path = saved / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(CheckpointError, match="version 2; this library reads 1"):
        load_checkpoint(saved)


def test_a_save_never_replaces_anything(saved, embedder):
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        embedder.save(saved)
    verify(saved)
    (saved.parent / "file").write_text("")
    with pytest.raises(FileExistsError):
        check_free(saved.parent / "file")


@pytest.mark.parametrize("failing", ["seal", "dump_json"])
def test_a_save_that_fails_leaves_nothing(embedder, tmp_path, monkeypatch, failing):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(native, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "model", embedder.encoder, embedder.tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_nothing_appears_under_the_name_before_all_is_written(tmp_path):
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_behind_does_not_stop_one_with_the_same_id(tmp_path):
    left = atomic_directory(tmp_path / "out")
    left.__enter__()
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "out" / "file").exists()


def test_a_conversion_killed_at_any_moment_leaves_no_loadable_half(saved, tmp_path):
    """`to_torch` and `from_torch`, in a process that is killed early or late, then run again."""
    pytest.importorskip("click")
    original, target = tmp_path / "original", tmp_path / "native"
    command = [sys.executable, "-m", "convert"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([*command, "to_torch", saved, original, "--layout", "original"], check=True, env=environment)
    for delay in (0, 0.02, 0.05, 0.1, 0.2):  # after the first sign of a save, which takes about 0.2 s
        process = subprocess.Popen([*command, "from_torch", original, target], env=environment, stdout=subprocess.DEVNULL)
        seen = set(tmp_path.iterdir())
        while process.poll() is None and set(tmp_path.iterdir()) == seen:
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if target.exists():
            verify(target)
            break
        with pytest.raises(FileNotFoundError):
            Embedder.load(target)
    else:
        subprocess.run([*command, "from_torch", original, target], check=True, env=environment, stdout=subprocess.DEVNULL)
    expected = Embedder.load(saved).encode(["a", "b"], "classification")
    np.testing.assert_allclose(Embedder.load(target).encode(["a", "b"], "classification"), expected, atol=1e-6)


# ---- names of directories, and what is behind them


@pytest.mark.parametrize("name", ["lr[1e-4]", "a*b?", "{x,y}", "50 %", "ünï\n[a]"])
def test_a_directory_may_have_any_name(embedder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    embedder.save(tmp_path / name / "model")
    embedder.save(tmp_path / f"model {name}")
    for directory in (tmp_path / name / "model", tmp_path / f"model {name}"):
        np.testing.assert_array_equal(Embedder.load(directory).encode("a game"), embedder.encode("a game"))


def test_another_thing_in_the_place_of_a_link(embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    embedder.save(tmp_path / "[a]" / "model")
    (link,) = tmp_path.glob("jina-jax-*")
    link.unlink()
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is in the way of"):
        Embedder.load(tmp_path / "[a]" / "model")


@pytest.mark.parametrize("fault", [no_arrays, no_metadata])
def test_what_cannot_be_opened_is_not_called_saved(embedder, tmp_path, monkeypatch, fault):
    class Orbax:
        def __getattr__(self, name):
            return getattr(array_store.orbax(), name)

        def save(self, path, arrays):
            array_store.orbax().save(path, arrays)
            fault(Path(path).parent)

    monkeypatch.setattr(native, "orbax", Orbax)
    with pytest.raises(CheckpointError, match="it was written, and .*cannot be read"):
        embedder.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_other_arrays_than_those_saved_are_found(embedder, saved):
    arrays = {path: variable.get_value() for path, variable in variables(embedder.encoder).items()}
    check_readable(saved / "arrays", arrays)
    arrays["tokens.table"] = arrays["tokens.table"][1:]
    arrays["more"] = arrays.pop("embed_norm.bias")
    with pytest.raises(CheckpointError, match=r"does not hold what was saved: \['embed_norm.bias', 'more', 'tokens.table'\]"):
        check_readable(saved / "arrays", arrays)

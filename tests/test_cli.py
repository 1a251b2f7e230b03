"""`jina-jax embed`: the vectors of the library, and one line for every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("click")
from click.testing import CliRunner

from jina_jax.cli import main
from jina_jax.command import use_compilation_cache

LINES = ["an image editor", "", "画像エディタ", "a game"]


@pytest.fixture(scope="module")
def model(embedder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli") / "model"
    embedder.save(directory)
    return directory


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(LINES) + "\n", "utf-8")
    return path


def embed(*arguments: object, input: bytes | None = None):
    return CliRunner().invoke(main, ["embed", *map(str, arguments)], input=input)


def test_npy_and_parquet_hold_the_librarys_vectors_in_order(embedder, model, texts, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    expected = embedder.encode(LINES, "classification", truncate_dim=16)
    for name in ("out.npy", "out.parquet"):
        result = embed(texts, "--model", model, "--task", "classification", "--dim", 16, "--output", tmp_path / name)
        assert result.exit_code == 0, result.output
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert table["text"] == LINES
    np.testing.assert_allclose(table["embedding"], expected, atol=1e-6)
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_standard_input_to_json_lines(embedder, model):
    result = embed("-", "--model", model, "--output", "-", input="\n".join(LINES).encode())
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    np.testing.assert_allclose(rows, embedder.encode(LINES), atol=1e-6)


def test_precision(embedder, model, texts, tmp_path):
    embed(texts, "--model", model, "--precision", "ubinary", "--output", tmp_path / "out.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), embedder.encode(LINES, precision="ubinary"))


def test_no_lines(model, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    result = embed(tmp_path / "empty.txt", "--model", model, "--output", tmp_path / "out.npy")
    assert result.exit_code == 0 and np.load(tmp_path / "out.npy").shape == (0, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "nowhere.txt"}, "nowhere.txt"),
        ({"--model": "nowhere/at/all"}, "no directory"),
        ({"--task": "translation"}, "unknown task 'translation'"),
        ({"--dim": 65}, "truncate_dim must be an integer in 1..64, not 65"),
        ({"--batch-size": 0}, "batch_size must be at least 1"),
        ({"--output": "out.txt"}, "must end in .npy or .parquet"),
        ({"--output": "nowhere/out.npy"}, "no directory"),
        ({"--output": "texts.txt/out.npy"}, "no directory"),
        ({"--precision": "int4"}, "int4"),
        ({"--dim": "wide"}, "not a valid integer"),
    ],
    ids=str,
)
def test_a_mistake_is_one_message_without_traceback_or_output(model, texts, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    options = {"file": texts, "--model": model, "--output": "out.npy"} | changes
    file = options.pop("file")
    result = embed(file, *(part for option in options.items() for part in option))
    assert result.exit_code != 0 and message in result.output
    assert result.output.startswith("Usage:") or len(result.output.splitlines()) == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_windows_line_endings_are_not_part_of_the_text(model, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "windows.txt").write_bytes("\r\n".join([*LINES, ""]).encode())
    assert embed(tmp_path / "windows.txt", "--model", model, "--output", tmp_path / "out.parquet").exit_code == 0
    assert pq.read_table(tmp_path / "out.parquet").to_pydict()["text"] == LINES


def test_text_that_is_not_utf8_is_named_by_line(model, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"fine\nfine\n\xe9t\xe9\n")
    result = embed(tmp_path / "latin.txt", "--model", model, "--output", tmp_path / "out.npy")
    assert result.exit_code == 1 and "latin.txt:3: not UTF-8" in result.output
    assert not (tmp_path / "out.npy").exists()


def test_a_directory_is_not_written_over(model, texts, tmp_path):
    (tmp_path / "out.npy").mkdir()
    result = embed(texts, "--model", model, "--output", tmp_path / "out.npy")
    assert result.exit_code == 1 and result.output == f"Error: {tmp_path / 'out.npy'} is a directory\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "texts.txt"]


def test_a_write_that_fails_leaves_what_was_there(model, texts, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    (tmp_path / "out.npy").write_text("older")
    monkeypatch.setattr(np, "save", fail)
    result = embed(texts, "--model", model, "--output", tmp_path / "out.npy")
    assert result.exit_code == 1 and result.output == "Error: No space left on device\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "texts.txt"]
    assert (tmp_path / "out.npy").read_text() == "older"


def test_a_terminal_shows_progress(model, texts, tmp_path):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 120))  # a fresh one is 0 columns wide, too narrow for a bar
    command = [sys.executable, "-m", "jina_jax.cli", "embed", texts, "--model", model, "--output", tmp_path / "out.npy"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, env=environment, stderr=stderr, check=True)
    os.close(stderr)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert "Embedding: 100%" in shown and "4/4" in shown


def test_the_command_as_a_process(embedder, model, texts, tmp_path):
    """With a compilation cache on disk, and no PyTorch imported."""
    cache = tmp_path / "cache"
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jina_jax.cli", "embed", texts, "--model", model, "--output", tmp_path / "out.npy"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "4 embeddings of 64 dimensions" in done.stderr and "100%" not in done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), embedder.encode(LINES), atol=1e-6)


def test_half_written_entries_of_the_compilation_cache_are_removed(tmp_path, monkeypatch):
    """JAX writes an entry and then its time of use.

    A program killed between the two would end all caching.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "jina-jax"
    cache.mkdir()
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (cache / name).write_bytes(b"")
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        use_compilation_cache()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert sorted(path.name for path in cache.iterdir()) == ["whole-atime", "whole-cache"]


def test_a_user_without_a_home_directory_has_no_cache(monkeypatch):
    def homeless(self):
        raise RuntimeError("Could not determine home directory.")  # as pathlib says it

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        use_compilation_cache()
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)

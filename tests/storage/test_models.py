"""Models are saved to buckets and loaded from them, by way of one copy for a host."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from convert.__main__ import main as convert
from jina_jax import Embedder
from jina_jax.checkpoints.sealed_directory import MANIFEST, verify
from jina_jax.errors import BucketError, CheckpointError
from jina_jax.storage import as_path
from jina_jax.storage.cache import cache_directory, fetch_directory, fetch_file
from jina_jax.storage.upload import UNFINISHED

TEXTS = ["a", "some text"]


def run_convert(*arguments: object) -> None:
    convert.main([str(each) for each in arguments], standalone_mode=False)


def copies() -> list[str]:
    return sorted(path.name for path in cache_directory().iterdir() if path.is_dir())


def test_a_model_comes_back_as_it_was_saved(root, server, embedder):
    embedder.save(str(root))
    writes = [path for method, path, _ in server.log if method in ("POST", "PUT")]
    assert MANIFEST in [path for path in writes if not path.endswith("?delete")][-1]  # written last
    assert not (root / UNFINISHED).exists()
    loaded = Embedder.load(str(root))
    np.testing.assert_array_equal(loaded.encode(TEXTS), embedder.encode(TEXTS))
    verify(fetch_directory(root))
    server.counts.clear()
    Embedder.load(str(root))  # from the copy
    assert sum(server.counts.values()) <= 3
    assert len(copies()) == 1
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        embedder.save(str(root))


def test_other_layouts_go_through_a_bucket(root, embedder, tmp_path):
    embedder.save(root / "native")
    run_convert("to_torch", root / "native", root / "original", "--layout", "original")
    run_convert("from_torch", root / "original", root / "back")
    np.testing.assert_allclose(Embedder.load(root / "back").encode(TEXTS), embedder.encode(TEXTS), atol=1e-6)
    config = root / "back" / "config.json"
    config.write_text(config.read_text().replace('"truncate_dim": null', '"truncate_dim": 16'))
    with pytest.raises(CheckpointError, match="damaged or edited"):
        Embedder.load(root / "back")
    run_convert("seal", root / "back")
    assert Embedder.load(root / "back").encode("a").shape == (16,)


def test_an_interrupted_save_is_never_loaded_and_can_be_repeated(root, server, embedder, monkeypatch):
    monkeypatch.setenv("JINA_JAX_BUCKET_SECONDS", "0")
    server.fault = lambda method, path, body: 503 if method in ("POST", "PUT") and path.endswith("config.json") else None
    with pytest.raises(OSError, match="could not be written"):
        embedder.save(root)
    server.reset()
    assert root.is_dir() and not (root / MANIFEST).exists()
    with pytest.raises(CheckpointError, match="is not complete: what wrote it was interrupted"):
        Embedder.load(root)
    embedder.save(root)
    np.testing.assert_array_equal(Embedder.load(root).encode(TEXTS), embedder.encode(TEXTS))


def test_a_model_that_changes_makes_another_copy(root):
    (root / "a").write_text("1")
    assert (fetch_directory(root) / "a").read_text() == "1"
    (root / "a").write_text("2")
    assert (fetch_directory(root) / "a").read_text() == "2"


@pytest.mark.buckets
def test_several_processes_share_one_copy(root, server):
    for number in range(4):
        (root / str(number)).write_bytes(bytes(100_000))
    server.counts.clear()
    code = f"""
from jina_jax.storage import as_path
from jina_jax.storage.cache import fetch_directory
print(fetch_directory(as_path({str(root)!r})))
"""

    def run(_):
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(run, range(3)))
    assert len(found) == 1 and copies() == [found.pop().strip().rpartition("/")[2]]
    reads = [
        path for method, path, _ in server.log if method == "GET" and ("alt=media" in path or path.endswith(tuple("0123")))
    ]
    assert len(reads) == 4


def test_copies_beyond_the_limit_are_removed_but_none_in_use(root, monkeypatch):
    from jina_jax.storage import cache

    monkeypatch.setenv("JINA_JAX_CACHE_GB", "0.000250")
    monkeypatch.setattr(cache, "_in_use", {})
    for name in "abc":
        (root / name).write_bytes(bytes(100_000))
    first, second = fetch_file(root / "a"), fetch_file(root / "b")
    for name in [path.name for path in cache_directory().iterdir() if path.is_dir()]:
        if name == second.parent.name:
            os.close(cache._in_use.pop(name))  # as a process that has ended
    third = fetch_file(root / "c")
    assert first.exists() and third.exists() and not second.exists()
    monkeypatch.setenv("JINA_JAX_CACHE_GB", "many")
    with pytest.raises(ValueError, match="JINA_JAX_CACHE_GB must be a number of gigabytes, not 'many'"):
        fetch_file(root / "b")


def test_what_is_no_model_is_named(root, server):
    (root / "object").write_text("x")
    with pytest.raises(ValueError, match="object is an object; a model is a directory"):
        Embedder.load(root / "object")
    with pytest.raises(FileNotFoundError, match=f"there is no directory {server.scheme}://"):
        Embedder.load(root / "nothing")
    with pytest.raises(BucketError, match="there is no bucket"):
        Embedder.load(f"{server.scheme}://jina-nowhere/model")
    with pytest.raises(CheckpointError):
        Embedder.load(root)  # foreign files
    with pytest.raises(ValueError, match="has no revision"):
        Embedder.load(str(as_path(str(root))), revision="main")

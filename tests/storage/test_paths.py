"""Paths in buckets behave as local ones do, on servers of both protocols."""

import contextlib
import os
from pathlib import Path

import pytest

from helpers import buckets
from helpers.buckets import BUCKET, random_faults
from jina_jax.errors import BucketError
from jina_jax.files import atomic_write, file_stamp, read_json, read_json_or_empty, repeated_files, sha256, write_json
from jina_jax.storage import BucketPath, as_path, is_bucket
from jina_jax.storage.paths import create, expand
from jina_jax.storage.store import ObjectChanged, StoreUnavailable

NAMES = ("plain.txt", "with space [1].txt", "ünï 日本.txt", "50%&+#?.txt")


def test_a_path_in_a_bucket_has_the_methods_of_a_local_one(root, tmp_path):
    """Both get the same calls, and give the same answers."""

    def answers(path):
        path.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            (path / name).write_text(f"text of {name}")
        (path / "inner").mkdir(exist_ok=True)
        (path / "inner" / "config.json").write_bytes(b"{}")
        write_json(path / "a.json", {"a": 1})
        with atomic_write(path / "whole.bin") as partial:
            partial.write_bytes(bytes(range(256)) * 100)
        found = {
            "names": sorted(each.name for each in path.iterdir()),
            "glob": sorted(each.name for each in path.glob("*.json")),
            "deep": sorted(each.relative_to(path).as_posix() for each in path.glob("*/*.json")),
            "texts": [(path / name).read_text() for name in NAMES],
            "kinds": [(p.exists(), p.is_file(), p.is_dir()) for p in (path, path / "inner", path / NAMES[0], path / "none")],
            "json": (read_json(path / "a.json"), read_json_or_empty(path / "none.json")),
            "hash": sha256(path / "whole.bin"),
            "bytes": file_stamp(path / "whole.bin")["bytes"],
            "twice": [[Path(p).name for p in same] for same in repeated_files([path / "a.json", path / "a.json"])],
            "created": (create(path / "new", b"1"), create(path / "new", b"2"), (path / "new").read_bytes()),
        }
        with (path / "whole.bin").open("rb") as file:
            found["part"] = (file.seek(300), file.read(5), file.seek(-3, 2), file.read())
        (path / "a.json").unlink()
        (path / "a.json").unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError):
            (path / "a.json").read_text()
        return found | {"left": sorted(each.name for each in path.iterdir())}

    assert answers(root) == answers(tmp_path)


def test_a_write_under_a_condition_fails_when_another_program_has_written(root):
    first = root.store.write(f"{root.key}/x", b"1", version="")
    second = root.store.write(f"{root.key}/x", b"2", version=first.version)
    with pytest.raises(ObjectChanged):
        root.store.write(f"{root.key}/x", b"3", version=first.version)
    assert (root / "x").read_bytes() == b"2" and (root / "x").info().version == second.version


def test_of_many_writes_at_once_under_the_same_condition_one_is_done(root):
    from concurrent.futures import ThreadPoolExecutor

    def write(data, version):
        with contextlib.suppress(ObjectChanged):
            return root.store.write(f"{root.key}/x", data, version=version)

    version = ""
    with ThreadPoolExecutor(6) as pool:
        for attempt in range(20):
            texts = [f"{attempt} {writer}".encode() for writer in range(6)]
            done = [result for result in pool.map(write, texts, [version] * 6) if result]
            assert len(done) == 1
            version = done[0].version
            assert (root / "x").info().version == version


def test_patterns_find_objects(root):
    for name in ("a.txt", "b.txt", "c.jsonl", "d[1]/e.txt", "d[1]/f?.txt"):
        (root / name).write_text("x")
    assert [as_path(each).name for each in expand(f"{root}/*.txt")] == ["a.txt", "b.txt"]
    assert [as_path(each).name for each in expand(f"{root}/d[1]/*.txt")] == ["e.txt", "f?.txt"]
    assert [as_path(each).name for each in expand(f"{root}/*/e.txt")] == ["e.txt"]
    assert expand(f"{root}/c.jsonl") == [f"{root}/c.jsonl"]
    with pytest.raises(FileNotFoundError, match="no object matches"):
        expand(f"{root}/*.parquet")


def test_large_objects_go_in_parts(root, tmp_path):
    data = os.urandom(20 * 2**20)
    (tmp_path / "large").write_bytes(data)
    root.store.upload(f"{root.key}/large", tmp_path / "large")
    root.store.download(f"{root.key}/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    root.store.copy(f"{root.key}/large", f"{root.key}/copy")
    assert sha256(root / "copy") == sha256(tmp_path / "large")


# ---- a store that fails


def test_faults_of_requests_are_tried_again(server, root, tmp_path):
    server.fault = random_faults(0.3, seed=1, delay=0.05)
    for number in range(20):
        assert create(root / f"{number}", str(number).encode())
        assert not create(root / f"{number}", b"another")
    assert sorted(int(path.name) for path in root.iterdir()) == list(range(20))
    assert [(root / f"{number}").read_text() for number in range(20)] == [str(number) for number in range(20)]


def change_once(server) -> list[str]:
    """Has the first body with "the content" arrive changed; returns a list for its path."""
    changed = []

    def fault(method, path, body):
        if b"the content" in body and not changed:
            changed.append(path)
            return body.replace(b"the content", b"the c0ntent")
        return None

    server.fault = fault
    return changed


def test_a_body_that_arrives_changed_is_sent_again(server, root):
    changed = change_once(server)
    (root / "x").write_bytes(b"the content")
    assert changed and (root / "x").read_bytes() == b"the content"


def test_a_store_that_is_gone_ends_with_one_error_in_time(server, root, monkeypatch):
    (root / "x").write_bytes(b"1")
    monkeypatch.setenv("JINA_JAX_BUCKET_SECONDS", "1")
    server.fault = lambda *_: 503
    with pytest.raises(StoreUnavailable, match="could not be read for 1 seconds"):
        (root / "x").read_bytes()
    server.fault = lambda *_: "cut"
    with pytest.raises(StoreUnavailable, match="could not be written for 1 seconds"):
        (root / "x").write_bytes(b"2")
    server.reset()
    assert (root / "x").read_bytes() == b"1"


def test_a_server_that_does_not_listen_is_unavailable(server, root, monkeypatch):
    monkeypatch.setenv("JINA_JAX_BUCKET_SECONDS", "0.3")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    buckets.forget_clients()
    with pytest.raises(StoreUnavailable, match="could not be listed"):
        root.is_dir()
    monkeypatch.undo()
    buckets.forget_clients()


def test_what_a_store_refuses_is_one_error(server, root):
    server.fault = lambda *_: 400
    with pytest.raises(BucketError, match="could not be written"):
        root.write_text("x")


def test_a_manifest_that_arrives_changed_is_replaced_by_its_writer(server, root):
    changed = change_once(server)
    assert create(root / "x", b"the content") and changed and (root / "x").read_bytes() == b"the content"


# ---- bad input


def test_a_bucket_that_does_not_exist_is_named(server, root):
    nowhere = as_path(f"{server.scheme}://jina-nowhere/a")
    for call in (nowhere.is_dir, lambda: list(nowhere.iterdir()), lambda: nowhere.write_text("x")):
        with pytest.raises(BucketError, match=f"there is no bucket {server.scheme}://jina-nowhere: create it"):
            call()


@pytest.mark.parametrize("method, what", [("GET", "list"), ("write", "write")])
def test_a_permission_that_is_lacking_is_named(server, root, method, what):
    server.fault = lambda verb, *_: 403 if (verb == "GET") == (method == "GET") else None
    with pytest.raises(BucketError, match=f"no permission to {what} {server.scheme}://{BUCKET}/"):
        root.is_dir() if what == "list" else root.write_text("x")


def test_absent_credentials_are_one_error(server, root, monkeypatch, tmp_path):
    for name in ("STORAGE_EMULATOR_HOST", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    buckets.forget_clients()
    with pytest.raises(BucketError, match=f"no (valid )?credentials for {server.scheme}://{BUCKET}"):
        root.is_dir()
    monkeypatch.undo()
    buckets.forget_clients()


@pytest.mark.parametrize(
    "text, message",
    [
        ("http://a/b", "is at no known store; buckets are named gs://BUCKET/KEY or s3://BUCKET/KEY"),
        ("gs://", "names no bucket"),
        ("gs:///x", "names no bucket"),
        ("gs://ab cd/x", "names no bucket"),
        ("s3://bucket/a//b", "has an empty part"),
        ("s3://bucket/a/../b", "has an empty part"),
        ("gs://bucket/a\nb", "has an empty part"),
    ],
)
def test_urls_that_name_no_place_are_errors(text, message):
    with pytest.raises(ValueError, match=message):
        as_path(text)


def test_what_a_path_is():
    assert as_path("a/b") == Path("a/b") and not is_bucket(as_path("a/b"))
    assert str(as_path("gs://bucket/a/b/")) == "gs://bucket/a/b" and str(as_path("s3://bucket")) == "s3://bucket"
    assert as_path("gs://bucket/a b[1]") == BucketPath("gs", "bucket", "a b[1]")
    with pytest.raises(ValueError, match="was a URL before it became"):
        as_path(Path("gs://bucket/a"))

"""Bulk embedding from a bucket into a bucket: the shards that a disk gets, whatever ends processes.

With `-m buckets` processes are killed BUCKET_KILLS times.
"""

import json
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner

from jina_jax.bulk import run as bulk
from jina_jax.bulk.read_shards import open_shards, read_blocks
from jina_jax.bulk.run import BulkOptions, embed_files, load_on_this_host, model_fingerprint
from jina_jax.cli import main
from jina_jax.errors import RunError
from jina_jax.storage import StoragePath, as_path

OPTIONS = BulkOptions(dim=16, shard_rows=10)
KILLS = int(os.environ.get("BUCKET_KILLS", "10"))
TEXTS = [f"text number {number} of some" for number in range(47)]


@pytest.fixture(autouse=True)
def short_calls(monkeypatch):
    monkeypatch.setattr(bulk, "CALL_ROWS", 4)


@pytest.fixture
def texts(root, tmp_path) -> list[str]:
    """The rows, in two files in the bucket."""
    (root / "texts [1]" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:20]))
    pq.write_table(pa.table({"text": TEXTS[20:]}), tmp_path / "b.parquet", row_group_size=5)
    (root / "texts [1]" / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes())
    return [f"{root}/texts [1]/a.jsonl", f"{root}/texts [1]/b.parquet"]


def contents(output: StoragePath) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def test_shards_in_a_bucket_are_those_on_a_disk(embedder, texts, root, tmp_path, server):
    done = embed_files(embedder, "model", texts, root / "out", OPTIONS)
    assert done == (47, 5, True) == embed_files(embedder, "model", texts, tmp_path / "out", OPTIONS)
    assert contents(root / "out") == contents(tmp_path / "out")
    opened = open_shards(root / "out")
    assert [id for ids, _ in read_blocks(opened) for id in ids][:1] == [f"{texts[0]}:1"]
    server.log.clear()
    assert embed_files(embedder, "model", texts, root / "out", OPTIONS) == done  # nothing is read or made again
    assert not [path for method, path, _ in server.log if method == "GET" and ".parquet?alt=media" in path]
    (root / "out" / "part-00002.parquet").write_bytes(contents(root / "out")["part-00001.parquet"])
    assert embed_files(embedder, "model", texts, root / "out", OPTIONS) == done
    assert contents(root / "out") == contents(tmp_path / "out")
    with pytest.raises(RunError, match="holds other embeddings; they differ in: options.dim"):
        embed_files(embedder, "model", texts, root / "out", BulkOptions(dim=8, shard_rows=10))
    with pytest.raises(FileExistsError, match="is not empty and holds no embeddings"):
        embed_files(embedder, "model", texts, root / "texts [1]", OPTIONS)


def test_two_processes_share_a_bucket_by_the_command(embedder, texts, root, tmp_path):
    embedder.save(root / "model")
    embedder.save(tmp_path / "model")
    common = ["--dim", "16", "--shard-rows", "10"]
    for number in (1, 0):
        shared = ["--model", f"{root}/model", "--output", f"{root}/out/", "--num-processes", "2", "--process-id", str(number)]
        result = CliRunner().invoke(main, ["embed", f"{root}/texts [1]/*", *common, *shared])
        assert result.exit_code == 0, result.output
    assert result.output.endswith("47 rows in 5 shards; complete\n")
    alone = ["--model", f"{tmp_path}/model", "--output", f"{tmp_path}/out/"]
    assert CliRunner().invoke(main, ["embed", *texts, *common, *alone]).exit_code == 0
    got, want = contents(root / "out"), contents(tmp_path / "out")
    assert {name: got[name] for name in want if name.startswith("part-")} == {n: b for n, b in want.items() if n[0] == "p"}
    found = CliRunner().invoke(
        main, ["search", "text", "--embeddings", f"{root}/out/", "--model", f"{root}/model", "--top", "1"]
    )
    assert found.exit_code == 0 and "\n1  " in found.output, found.output


def test_what_is_wrong_with_a_path_is_one_line(embedder, texts, root, server):
    def message(*arguments: object) -> str:
        result = CliRunner().invoke(main, ["embed", *map(str, arguments), "--model", f"{root}/none"])
        assert result.exit_code == 1 and result.output.count("\n") == 1
        return result.output

    assert "no object matches" in message(f"{root}/*.parquet", "--output", f"{root}/out/")
    assert f"there is no {root}/none.txt" in message(f"{root}/none.txt", "--output", f"{root}/out/")
    assert "there is no bucket" in message(f"{server.scheme}://jina-nowhere/a.txt", "--output", f"{root}/out/")
    assert not (root / "out").exists()


# ---- kill -9


def _embed(environment: dict[str, str], model: Path, files: list[str], output: str, process: int) -> None:
    os.environ.update(environment)
    os.setpgrp()
    bulk.CALL_ROWS = 4
    embedder = load_on_this_host(model)
    slow = embedder.encode
    embedder.encode = lambda *a, **k: (time.sleep(0.02), slow(*a, **k))[1]
    embed_files(embedder, model_fingerprint(model), files, as_path(output), OPTIONS, process=process, processes=2)


@pytest.mark.buckets
def test_two_processes_killed_at_random_write_every_row_once(embedder, texts, root, tmp_path):
    embedder.save(tmp_path / "model")
    model = tmp_path / "model"
    fingerprint = model_fingerprint(model)
    embed_files(embedder, fingerprint, texts, tmp_path / "want", OPTIONS)
    context, rng = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["jina_jax.bulk.run"])
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS", "STORAGE", "JINA", "NO_GCE"))}

    def start(process: int) -> Any:
        started = context.Process(target=_embed, args=(environment, model, texts, f"{root}/out", process))
        started.start()
        return started

    began = time.monotonic()
    running = [start(0), start(1)]
    for process in running:
        process.join()
    seconds, killed, rounds = time.monotonic() - began, 0, 0
    assert contents(root / "out") == contents(tmp_path / "want")
    (root / "out").rmtree()
    running = [start(0), start(1)]
    while killed < KILLS:
        time.sleep(rng.random() * seconds / 2)
        victim = rng.randrange(2)
        if running[victim].is_alive():
            running[victim].kill()
            running[victim].join()
            killed += 1
        elif not running[1 - victim].is_alive():  # done: once more, from the beginning
            assert contents(root / "out") == contents(tmp_path / "want")
            (root / "out").rmtree()
            rounds += 1
            running[1 - victim] = start(1 - victim)
        running[victim] = start(victim)
    for process in running:
        process.join()
    for number in (0, 1):  # whoever comes last finds all
        last = start(number)
        last.join()
    assert contents(root / "out") == contents(tmp_path / "want")

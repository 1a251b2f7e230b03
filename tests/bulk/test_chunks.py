"""Chunks in the shell and in bulk: a row for each, once, whatever ends the processes."""

import json
import lzma
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("click")
import jax.numpy as jnp
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner, Result

from jina_jax import Embedder
from jina_jax.bulk import run as bulk
from jina_jax.bulk.read_shards import open_shards
from jina_jax.bulk.run import BulkOptions, embed_files
from jina_jax.cli import main
from jina_jax.embed import chunk_rows
from jina_jax.errors import NotFiniteError, RunError
from jina_jax.model.parameters import from_arrays, variables
from jina_jax.text.chunking import by_sentences, by_tokens

TEXTS = [
    "An image editor. It opens many files! And it prints them.",
    "",
    "画像を編集します。写真を開いて、印刷します。",
    "one",
    " \t ",
    "สวัสดีครับ ผมชื่อ สมชาย และ ผม อยู่ที่นี่",
    "🦊 emoji 👩‍👩‍👧 flags 🇩🇪🇯🇵 and 1️⃣. End.",
    *(f"Sentence {number} of a text. Another one, " * (number % 4 + 1) for number in range(12)),
]
TOKENS = BulkOptions(task="retrieval.passage", dim=16, shard_rows=5, chunk_tokens=4)


@pytest.fixture(scope="module")
def model(embedder, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("chunks") / "model"
    embedder.save(directory)
    return directory


@pytest.fixture
def files(tmp_path) -> list[str]:
    with lzma.open(tmp_path / "a.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:9]))
    pq.write_table(pa.table({"text": TEXTS[9:]}), tmp_path / "b.parquet")
    return [str(tmp_path / name) for name in ("a.jsonl.xz", "b.parquet")]


@pytest.fixture(autouse=True)
def short_calls(monkeypatch):
    monkeypatch.setattr(bulk, "CALL_DOCUMENTS", 2)


def contents(output: Path) -> dict[str, bytes]:
    assert not list(output.glob(".part-*"))
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def ids(files: list[str]) -> list[str]:
    return [f"{files[0]}:{row + 1}" for row in range(9)] + [f"{files[1]}:{row + 1}" for row in range(len(TEXTS) - 9)]


@pytest.mark.parametrize("late", [None, False])
@pytest.mark.parametrize("kind", ["chunk_tokens", "chunk_sentences"])
def test_a_row_is_a_chunk_with_its_document_number_and_characters(embedder, files, tmp_path, kind, late):
    options = BulkOptions(task="retrieval.passage", dim=16, shard_rows=5, late_chunking=late, **{kind: 2})
    done = embed_files(embedder, "model", files, tmp_path / "out", options)
    assert done == (len(TEXTS), 4, True)
    cut = by_tokens if kind == "chunk_tokens" else by_sentences
    documents = [cut(text, 2, embedder.tokenizer) for text in TEXTS]
    table = pq.read_table(tmp_path / "out")
    assert table.schema.names == ["id", "chunk", "start", "end", "embedding"]
    rows = table.drop_columns(["embedding"]).to_pylist()
    assert [row["id"] for row in rows] == [name for name, each in zip(ids(files), documents, strict=True) for _ in each]
    assert [row["chunk"] for row in rows] == [number for each in documents for number in range(len(each))]
    texts = dict(zip(ids(files), TEXTS, strict=True))
    assert [texts[row["id"]][row["start"] : row["end"]] for row in rows] == [chunk for each in documents for chunk in each]
    given = [each for each in documents if each]
    want = embedder.encode_chunks(given, "retrieval.passage", truncate_dim=16, late=late is None)
    np.testing.assert_allclose(table["embedding"].to_pylist(), np.concatenate(want), rtol=0, atol=1e-6)
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert (manifest["rows"], manifest["documents"]) == (len(rows), len(TEXTS))
    assert sum(shard["rows"] for shard in manifest["shards"]) == len(rows)
    assert manifest["options"][kind] == 2 and manifest["options"]["late_chunking"] is late


def test_any_number_of_processes_and_restarts_give_the_same_bytes(embedder, files, tmp_path, monkeypatch):
    embed_files(embedder, "model", files, tmp_path / "one", TOKENS)
    for process in (1, 0):
        embed_files(embedder, "model", files, tmp_path / "two", TOKENS, process=process, processes=2)
    encode, calls = Embedder.encode_chunks, []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise OSError("the device is gone")
        return encode(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "encode_chunks", failing)
        with pytest.raises(OSError, match="the device is gone"):
            embed_files(embedder, "model", files, tmp_path / "killed", TOKENS)
    assert [*contents(tmp_path / "killed")] == ["part-00000.parquet"]
    kept = (tmp_path / "killed" / "part-00000.parquet").stat().st_mtime_ns
    assert embed_files(embedder, "model", files, tmp_path / "killed", TOKENS).complete
    assert (tmp_path / "killed" / "part-00000.parquet").stat().st_mtime_ns == kept
    assert contents(tmp_path / "killed") == contents(tmp_path / "two") == contents(tmp_path / "one")


def test_texts_without_a_token_have_no_rows(embedder, tmp_path):
    (tmp_path / "a.txt").write_text("\n \n\t\n")
    assert embed_files(embedder, "model", [str(tmp_path / "a.txt")], tmp_path / "out", TOKENS) == (3, 1, True)
    table = pq.read_table(tmp_path / "out")
    assert table.num_rows == 0 and table.schema.field("embedding").type == pa.list_(pa.float32(), 16)


def test_another_size_of_chunks_is_another_run(embedder, files, tmp_path):
    embed_files(embedder, "model", files, tmp_path / "out", TOKENS)
    with pytest.raises(RunError, match="options.chunk_tokens: 4 -> 5"):
        embed_files(embedder, "model", files, tmp_path / "out", BulkOptions(**(vars(TOKENS) | {"chunk_tokens": 5})))


def searched(output: Path, model: Path, *options: object) -> list[dict]:
    arguments = ["search", "to print a picture", "--embeddings", output, "--model", model, "--json", *options]
    result = CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_search_finds_chunks_and_shows_them(embedder, model, files, tmp_path):
    options = BulkOptions(side="document", shard_rows=5, chunk_tokens=4)
    embed_files(embedder, bulk.model_fingerprint(model), files, tmp_path / "out", options)
    rows = pq.read_table(tmp_path / "out").to_pylist()
    scores = np.array([row["embedding"] for row in rows], np.float32) @ embedder.encode_query("to print a picture")
    texts = dict(zip(ids(files), TEXTS, strict=True))
    found = searched(tmp_path / "out", model, "--top", len(rows))
    assert sorted((each["id"], each["chunk"]) for each in found) == sorted((row["id"], row["chunk"]) for row in rows)
    np.testing.assert_allclose([each["score"] for each in found], np.sort(scores)[::-1], atol=1e-6)
    for each in found:
        row = next(row for row in rows if (row["id"], row["chunk"]) == (each["id"], each["chunk"]))
        assert (each["start"], each["end"]) == (row["start"], row["end"])
        assert each["text"] == texts[row["id"]][row["start"] : row["end"]]
    lines = CliRunner().invoke(main, ["search", "to print a picture", "--embeddings", f"{tmp_path}/out", "--model", str(model)])
    first = found[0]
    assert lines.stdout.startswith(f"1  {first['score']:.4f}  {first['id']}:{first['start']}-{first['end']}  ")


def test_chunks_whose_text_is_not_certain_are_not_shown(embedder, model, tmp_path):
    documents = [("a", "one two three four five"), ("b", "six seven eight nine"), ("a", "ten eleven twelve")]
    file, out = tmp_path / "texts.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps({"text": text, "id": name}) + "\n" for name, text in documents))
    options = BulkOptions(side="document", chunk_sentences=1, id_field="id")
    embed_files(embedder, bulk.model_fingerprint(model), [str(file)], out, options)
    found = {(each["id"], each["text"]) for each in searched(out, model)}
    assert found == {("a", None), ("b", "six seven eight nine")}
    file.write_text(file.read_text().replace("six", "SIX"))
    assert {each["text"] for each in searched(out, model)} == {None}
    opened = open_shards(out)
    assert opened.is_chunked and opened.rows == 3


def test_a_text_whose_chunk_is_not_finite_is_named_by_its_id(embedder, files, tmp_path):
    arrays = {path: variable.get_value() for path, variable in variables(embedder.encoder).items()}
    token = embedder.tokenizer("one")["input_ids"][1]
    arrays["tokens.table"] = arrays["tokens.table"].at[token].set(jnp.nan)
    broken = Embedder(from_arrays(embedder.config, arrays, dtype=jnp.float32), embedder.config, embedder.tokenizer)
    options = BulkOptions(chunk_tokens=4, batch_size=1)
    with pytest.raises(NotFiniteError, match=r"a.jsonl.xz:4'"):
        embed_files(broken, "model", files, tmp_path / "out", options)
    assert not list((tmp_path / "out").glob("*.parquet"))


# ---- the shell


def embed(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["embed", *map(str, arguments)])


def test_all_forms_of_the_shell_have_the_same_chunks(model, tmp_path):
    lines, options = tmp_path / "texts.txt", ["--model", model, "--side", "document", "--chunk-sentences", 1]
    lines.write_text("\n".join(TEXTS[:7]) + "\n", "utf-8")
    for output in (tmp_path / "out.parquet", f"{tmp_path}/shards/"):
        result = embed(lines, *options, "--output", output)
        assert result.exit_code == 0, result.output
    table, shards = pq.read_table(tmp_path / "out.parquet"), pq.read_table(tmp_path / "shards")
    for name in ("id", "chunk", "start", "end"):
        assert table[name].to_pylist() == shards[name].to_pylist() and table[name].type == shards[name].type
    np.testing.assert_allclose(table["embedding"].to_pylist(), shards["embedding"].to_pylist(), rtol=0, atol=1e-6)
    result = embed(lines, *options, "--output", "-")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["start"] for row in rows] == table["start"].to_pylist() and rows[0]["id"] == f"{lines}:1"
    np.testing.assert_allclose([row["embedding"] for row in rows], table["embedding"].to_pylist(), rtol=0, atol=1e-6)
    assert "".join(table["text"].to_pylist()[:3]) == TEXTS[0]


def test_no_late_chunking_embeds_each_chunk_by_itself(model, embedder, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    result = embed(tmp_path / "a.txt", "--model", model, "--chunk-tokens", 5, "--no-late-chunking", "--output", "-")
    want = embedder.encode(by_tokens(TEXTS[0], 5, embedder.tokenizer))
    got = [json.loads(line)["embedding"] for line in result.stdout.splitlines()]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("output", ["out.parquet", "out/"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chunk-tokens", 4, "--chunk-sentences", 1], "--chunk-tokens and --chunk-sentences exclude each other"),
        (["--chunk-tokens", 0], "--chunk-tokens must be at least 1, not 0"),
        (["--chunk-sentences", -1], "--chunk-sentences must be at least 1, not -1"),
        (["--no-late-chunking"], "only with --chunk-tokens or --chunk-sentences"),
        (["--late-chunking"], "only with --chunk-tokens or --chunk-sentences"),
    ],
    ids=str,
)
def test_a_mistake_is_one_message_before_a_model_is_loaded(tmp_path, monkeypatch, output, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a\n")
    result = embed("a.txt", "--model", tmp_path / "none", *options, "--output", output)
    assert result.exit_code == 1 and message in result.output and result.output.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_matrix_cannot_say_which_chunks_it_holds(tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    result = embed(tmp_path / "a.txt", "--model", "none", "--chunk-tokens", 4, "--output", tmp_path / "out.npy")
    assert result.exit_code == 1 and "--output must end in .parquet, or be - or DIR/" in result.output


def test_the_starts_of_chunks_follow_their_ends(embedder):
    rows = chunk_rows.embed_in_chunks(embedder, ["a b c d", "", "e"], lambda text: by_tokens(text, 2, embedder.tokenizer))
    assert [*zip(rows.texts, rows.numbers, rows.starts, rows.ends, strict=True)] == [(0, 0, 0, 4), (0, 1, 4, 7), (2, 0, 0, 1)]

"""`jina-jax search`: the ranking of a plain sort over all, of files and of shards."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("click")
pytest.importorskip("pyarrow")
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner

from jina_jax import Embedder
from jina_jax.cli import main
from jina_jax.commands import search as command
from jina_jax.model.parameters import from_arrays, variables
from oracles import bert, checkpoints

WORDS = "an image editor for paint sound and games 画像 エディタ très élégant text word".split()
TEXTS = [" ".join([*(WORDS[number * k % len(WORDS)] for k in range(1, 3 + number % 7)), str(number)]) for number in range(31)]
QUERY = "an editor for images"
PROMPTS = {"query": "for text ", "document": "a word "}


@pytest.fixture(scope="module")
def model(embedder, tmp_path_factory):
    """A model with adapters for both sides, and one that is symmetric."""
    directory = tmp_path_factory.mktemp("search") / "model"
    embedder.save(directory)
    return directory


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """A BERT with a prompt for each side, as multilingual-E5 has them."""
    return write_prompted(tmp_path_factory.mktemp("search") / "prompted", PROMPTS)


def write_prompted(directory: Path, prompts: dict[str, str]) -> Path:
    _, config = bert.write_bert(directory)
    checkpoints.write_modules(directory, config["max_position_embeddings"], config["hidden_size"], prompts)
    return directory


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """31 texts in files of every kind, one of them empty; for each text its FILE:NUMBER."""
    directory = tmp_path_factory.mktemp("texts")
    with gzip.open(directory / "a.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(TEXTS[:8]))
    (directory / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[8:12]))
    (directory / "empty.jsonl").write_text("")
    (directory / "c.tsv").write_text("n\ttext\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(TEXTS[12:20])), "utf-8")
    pq.write_table(pa.table({"text": TEXTS[20:]}), directory / "d.parquet", row_group_size=4)
    names = {
        "a.txt.gz": range(1, 9),
        "b.jsonl": range(1, 5),
        "empty.jsonl": (),
        "c.tsv": range(2, 10),
        "d.parquet": range(1, 12),
    }
    places = [f"{directory / name}:{number}" for name, numbers in names.items() for number in numbers]
    return [str(directory / name) for name in names], places


@pytest.fixture(autouse=True)
def short_calls(monkeypatch):
    monkeypatch.setattr(command, "CALL_TEXTS", 4)


@pytest.fixture(scope="module", autouse=True)
def models_loaded_once():
    """Commands of these tests share the models: loading takes most of their time."""
    loaded, load = {}, Embedder.load

    def load_once(source, *, dtype=None, **options):
        key = str(source), dtype or "float32"
        loaded[key] = loaded.get(key) or load(source, dtype=dtype, **options)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Embedder, "load", load_once)
        yield


def run(*arguments: object, input: bytes | None = None, columns: int = 80):
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(main, [*map(str, arguments)], input=input)


def search(*arguments: object, **options):
    return run("search", QUERY, *arguments, **options)


def found(*arguments: object, **options) -> list[dict]:
    result = search(*arguments, "--json", **options)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def embedded(output: Path, model: Path, files: list[str], *options: object) -> Path:
    """Shards of ten rows that `jina-jax embed` wrote."""
    result = run("embed", *files, "--model", model, "--shard-rows", 10, "--output", f"{output}/", *options)
    assert result.exit_code == 0, result.output
    return output


def check(results: list[dict], query: np.ndarray, texts: np.ndarray, ids: list, top: int) -> None:
    """Results are those of a sort over everything, with the texts of their rows."""
    scores = texts @ query
    best = np.argsort(-scores, kind="stable")[:top]
    assert [result["rank"] for result in results] == list(range(1, min(top, len(ids)) + 1))
    assert [result["id"] for result in results] == [ids[row] for row in best]
    assert [result["text"] for result in results] == [TEXTS[row] for row in best]
    np.testing.assert_allclose([result["score"] for result in results], scores[best], atol=1e-5)


# ---- over files


def test_files_of_every_kind_are_ranked_as_by_a_sort_over_all(embedder, model, files):
    query, texts = embedder.encode_query(QUERY), embedder.encode_document(TEXTS)
    check(found(*files[0], "--model", model), query, texts, files[1], 5)
    check(found(*files[0], "--model", model, "--top", 99), query, texts, files[1], 99)


def test_a_model_with_prompts_ranks_as_sentence_transformers(prompted, files):
    transformers = pytest.importorskip("sentence_transformers")
    peer = transformers.SentenceTransformer(str(prompted), device="cpu")
    query = peer.encode_query(QUERY, normalize_embeddings=True)
    texts = peer.encode_document(TEXTS, normalize_embeddings=True)
    expected = transformers.util.semantic_search(query, texts, top_k=7)[0]
    results = found(*files[0], "--model", prompted, "--top", 7)
    assert [result["id"] for result in results] == [files[1][hit["corpus_id"]] for hit in expected]
    np.testing.assert_allclose([result["score"] for result in results], [hit["score"] for hit in expected], atol=1e-5)


def test_no_call_holds_more_texts_than_bound_its_memory(model, files, monkeypatch):
    calls, encode = [], Embedder.encode

    def counted(self, texts, *arguments, **options):
        calls.append(len(texts) if isinstance(texts, list) else 1)
        return encode(self, texts, *arguments, **options)

    monkeypatch.setattr(Embedder, "encode", counted)
    found(*files[0], "--model", model)
    assert calls == [1] + [4] * 7 + [3]


def test_one_task_for_both_and_the_other_side(embedder, model, files):
    query, texts = (embedder.encode(each, "classification") for each in (QUERY, TEXTS))
    check(found(*files[0], "--model", model, "--task", "classification"), query, texts, files[1], 5)
    query, texts = embedder.encode_document(QUERY), embedder.encode_query(TEXTS)
    check(found(*files[0], "--model", model, "--side", "document"), query, texts, files[1], 5)


def test_dimensions_and_a_limit_of_tokens(embedder, model, files):
    options = {"truncate_dim": 16, "max_length": 20}
    with pytest.warns(match="longer than 20 tokens"):
        query, texts = (encode(each, **options) for encode, each in both_sides(embedder))
        check(found(*files[0], "--model", model, "--dim", 16, "--max-length", 20), query, texts, files[1], 5)


def test_standard_input_beside_a_file(embedder, model, files):
    lines = "\r\n".join(TEXTS[:8]).encode()
    query, texts = embedder.encode_query(QUERY), embedder.encode_document(TEXTS[:12])
    places = [*(f"-:{number}" for number in range(1, 9)), *files[1][8:12]]
    check(found("-", files[0][1], "--model", model, "--top", 9, input=lines), query, texts, places, 9)


def test_ids_and_fields(embedder, model, tmp_path):
    rows = [{"n": 7 * number, "in": {"body": text}} for number, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--field", "in.body", "--id-field", "n"]
    query, texts = embedder.encode_query(QUERY), embedder.encode_document(TEXTS)
    ids = [7 * number for number in range(31)]
    check(found(tmp_path / "a.jsonl", "--model", model, *options), query, texts, ids, 5)
    shards = embedded(tmp_path / "out", model, [str(tmp_path / "a.jsonl")], *options, "--side", "document")
    check(found("--embeddings", shards, "--model", model), query, texts, ids, 5)


def test_a_text_whose_embedding_is_not_finite_is_named(embedder, tmp_path):
    """Those that share its row are named with it, in the second call."""
    texts = [f"an image editor {number}" for number in range(7)] + ["画像"]
    (tmp_path / "a.txt").write_text("\n".join(texts), "utf-8")
    own, *others = (set(embedder.tokenizer(text)["input_ids"]) for text in (texts[7], QUERY, *texts[:7]))
    arrays = {path: variable.get_value() for path, variable in variables(embedder.encoder).items()}
    arrays["tokens.table"] = arrays["tokens.table"].at[np.array(sorted(own.difference(*others)))].set(np.inf)
    broken = Embedder(from_arrays(embedder.config, arrays, dtype=np.float32), embedder.config, embedder.tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Embedder, "load", lambda *_, **__: broken)
        result = search(tmp_path / "a.txt", "--model", "broken")
    assert result.exit_code == 1 and "NaN or infinity for 4 of the texts, by id" in result.output
    assert f"{tmp_path / 'a.txt'}:8" in result.output and not result.stdout


# ---- lines


def test_lines_hold_rank_score_place_and_the_text_as_wide_as_the_terminal(model, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("画像" * 40 + "\nan editor\x1b[31m\t for \x07 images\n" + "e\u0301" * 60 + "\n", "utf-8")
    results = found("a.txt", "--model", model)
    lines = search("a.txt", "--model", model, columns=50).stdout.splitlines()
    assert len(lines) == 3
    shown = {"a.txt:1": "画像" * 7 + "…", "a.txt:2": "an editor [31m for images", "a.txt:3": "e\u0301" * 29 + "…"}
    for line, result in zip(lines, results, strict=True):
        assert line == f"{result['rank']}  {result['score']:.4f}  {result['id']}  {shown[result['id']]}"
    narrow = search("a.txt", "--model", model, columns=5).stdout.splitlines()
    assert any(line.endswith("  " + "e\u0301" * 19 + "…") for line in narrow)


# ---- over shards


@pytest.fixture(scope="module")
def documents(model, files, tmp_path_factory):
    return embedded(tmp_path_factory.mktemp("shards") / "documents", model, files[0], "--side", "document", "--dim", 32)


@pytest.fixture
def shards(documents, tmp_path):
    """A copy of the shards of documents, to be changed."""
    return Path(shutil.copytree(documents, tmp_path / "shards"))


def change(directory: Path, **fields: object) -> None:
    path = directory / "_manifest.json"
    manifest = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in manifest.items() if value is not None}))


def test_shards_rank_as_their_files(embedder, model, files, documents):
    for top in (3, 99):
        results = found("--embeddings", documents, "--model", model, "--top", top)
        query, texts = (encode(each, truncate_dim=32) for encode, each in both_sides(embedder))
        check(results, query, texts, files[1], top)
        of_files = found(*files[0], "--model", model, "--dim", 32, "--top", top)
        assert [(result["id"], result["text"]) for result in results] == [(r["id"], r["text"]) for r in of_files]
        np.testing.assert_allclose([r["score"] for r in results], [r["score"] for r in of_files], atol=1e-5)


def both_sides(embedder):
    return (embedder.encode_query, QUERY), (embedder.encode_document, TEXTS)


def test_the_query_is_on_the_other_side_of_the_shards(embedder, model, files, tmp_path):
    as_query, as_document = embedder.encode_query(QUERY), embedder.encode_document(QUERY)
    of_queries, of_documents = embedder.encode_query(TEXTS), embedder.encode_document(TEXTS)
    queries = embedded(tmp_path / "queries", model, files[0], "--side", "query")
    check(found("--embeddings", queries, "--model", model), as_document, of_queries, files[1], 5)
    task = embedded(tmp_path / "task", model, files[0], "--task", "retrieval.passage")
    check(found("--embeddings", task, "--model", model), as_query, of_documents, files[1], 5)
    check(found("--embeddings", task, "--model", model, "--side", "document"), as_document, of_documents, files[1], 5)
    change(task, embedded=None)  # as earlier versions wrote it
    check(found("--embeddings", task, "--model", model), as_query, of_documents, files[1], 5)


def test_the_query_of_a_model_with_prompts_takes_the_prompt_of_the_other_side(prompted, files, tmp_path):
    embedder = Embedder.load(prompted)
    as_query, of_documents = embedder.encode_query(QUERY), embedder.encode_document(TEXTS)
    for number, options in enumerate(
        (["--side", "document"], ["--prompt-name", "document"], ["--prompt", PROMPTS["document"]])
    ):
        shards = embedded(tmp_path / str(number), prompted, files[0], *options)
        check(found("--embeddings", shards, "--model", prompted), as_query, of_documents, files[1], 5)
    shards = embedded(tmp_path / "queries", prompted, files[0], "--side", "query")
    results = found("--embeddings", shards, "--model", prompted)
    check(results, embedder.encode_document(QUERY), embedder.encode_query(TEXTS), files[1], 5)


def test_a_symmetric_task_or_a_prompt_of_ones_own_is_the_querys_too(embedder, model, files, tmp_path):
    for number, (options, arguments) in enumerate(
        (
            (["--task", "classification"], {"task": "classification"}),
            (["--task", "classification", "--prompt", "Kind: "], {"task": "classification", "prompt": "Kind: "}),
        )
    ):
        shards = embedded(tmp_path / str(number), model, files[0], *options)
        result = search("--embeddings", shards, "--model", model, "--json")
        assert not result.stderr
        query, texts = embedder.encode(QUERY, **arguments), embedder.encode(TEXTS, **arguments)
        check([json.loads(line) for line in result.stdout.splitlines()], query, texts, files[1], 5)


@pytest.mark.parametrize("with_record", [True, False])
def test_shards_without_a_side_are_searched_alike_and_one_line_says_so(embedder, model, files, tmp_path, with_record):
    shards = embedded(tmp_path / "plain", model, files[0])
    if not with_record:
        change(shards, embedded=None)
    result = search("--embeddings", shards, "--model", model, "--json")
    assert len(result.stderr.splitlines()) == 1
    assert "was embedded without a side, and so is the query" in result.stderr and "--side document" in result.stderr
    results = [json.loads(line) for line in result.stdout.splitlines()]
    check(results, embedder.encode(QUERY), embedder.encode(TEXTS), files[1], 5)


def test_where_documents_have_no_prompt_plain_shards_are_documents(files, tmp_path):
    """As in multilingual-e5-large-instruct, where only queries have one."""
    model = write_prompted(tmp_path / "model", {"query": "for text ", "document": ""})
    embedder = Embedder.load(model)
    shards = embedded(tmp_path / "plain", model, files[0])
    result = search("--embeddings", shards, "--model", model, "--json")
    assert not result.stderr
    results = [json.loads(line) for line in result.stdout.splitlines()]
    check(results, embedder.encode_query(QUERY), embedder.encode(TEXTS), files[1], 5)


def test_a_model_without_sides_says_nothing(files, tmp_path):
    model = write_prompted(tmp_path / "model", {})
    shards = embedded(tmp_path / "plain", model, files[0])
    result = search("--embeddings", shards, "--model", model)
    assert result.exit_code == 0 and not result.stderr and len(result.stdout.splitlines()) == 5


def test_the_query_is_computed_in_the_dtype_of_the_shards_unless_another_is_given(model, shards, monkeypatch):
    dtypes, load = [], Embedder.load

    def noted(source, **options):
        dtypes.append(options["dtype"])
        return load(source, **options)

    monkeypatch.setattr(Embedder, "load", noted)
    change(shards, model=json.loads((shards / "_manifest.json").read_text())["model"] | {"dtype": "bfloat16"})
    found("--embeddings", shards, "--model", model)
    found("--embeddings", shards, "--model", model, "--dtype", "float32")
    assert dtypes == ["bfloat16", "float32"]


def test_texts_that_are_not_to_be_had_leave_the_ids(model, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS[:4]))
    (tmp_path / "b.txt").write_text("\n".join(TEXTS[4:9]))
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    shards = embedded(tmp_path / "out", model, files, "--side", "document")
    before = found("--embeddings", shards, "--model", model, "--top", 9)
    (tmp_path / "b.txt").unlink()
    result = search("--embeddings", shards, "--model", model, "--top", 9, "--json")
    assert result.stderr == "5 of 9 texts are not shown: their files are gone, or other than when embedded\n"
    results = [json.loads(line) for line in result.stdout.splitlines()]
    expected = [row | {"text": row["text"] if row["id"].startswith(files[0]) else None} for row in before]
    assert results == expected
    lines = search("--embeddings", shards, "--model", model, "--top", 9, columns=400).stdout.splitlines()
    assert all(
        line.split("  ")[3:] == ([] if files[1] in line else [row["text"]]) for line, row in zip(lines, before, strict=True)
    )


# ---- what is refused


@pytest.fixture
def no_model(monkeypatch):
    """Whatever is refused is refused before a model is loaded."""

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Embedder, "load", load)


def refused(result) -> str:
    """The one line of an error, with nothing on standard output."""
    assert result.exit_code == 1 and not result.stdout, result.output
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "a.txt"], "the query is empty"),
        ([" \n\t\u3000", "a.txt"], "the query is empty"),
        (["caf\udce9", "a.txt"], "the query is not valid Unicode: a lone surrogate at position 3"),
        (["query"], "give either FILES to search, or --embeddings DIR/"),
        (["query", "a.txt", "--embeddings", "out/"], "give either FILES to search, or --embeddings DIR/"),
        (["query", "a.txt", "--top", 0], "--top must be at least 1, not 0"),
        (["query", "a.txt", "--task", "classification", "--side", "query"], "--side and --task exclude each other"),
        (["query", "nowhere.txt"], "there is no file nowhere.txt"),
        (["query", "http://bucket/a.txt"], "http://bucket/a.txt is at no known store"),
        (["query", "a.doc"], "a.doc is of no known type; valid are .txt"),
        (["query", "a.txt", "./a.txt"], "files are given twice: a.txt = ./a.txt"),
        (["query", "-", "a.txt", "-"], "files are given twice: -"),
        (["query", "a.txt", "--id-field", "n"], "a.txt is plain text, which has no field 'n'"),
        (["query", "-", "--id-field", "n"], "- is plain text, which has no field 'n'"),
        (["query", "empty.txt", "-"], "there is nothing to search: empty.txt, - without a row"),
        (["query", "bad.jsonl"], "bad.jsonl:1: no field 'text'"),
        (["query", "--embeddings", "nowhere/"], "there is no directory nowhere"),
        (["query", "--embeddings", "a.txt"], "a.txt is a file, not a directory"),
        (["query", "--embeddings", "http://bucket/out/"], "http://bucket/out/ is at no known store"),
        (["query", "--embeddings", "other"], "other holds no embeddings"),
        (
            ["query", "--embeddings", "o/", "--task", "a", "--id-field", "n"],
            "--task, --id-field: only with FILES; o/ has its own",
        ),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(tmp_path, monkeypatch, no_model, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text\n")
    Path("empty.txt").write_text("")
    Path("a.doc").write_text("text")
    Path("bad.jsonl").write_text('{"body": "text"}\n')
    Path("other").mkdir()
    assert message in refused(run("search", *arguments, "--model", "model", input=b""))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "translation"], "unknown task 'translation'"),
        (["--dim", 65], "truncate_dim must be an integer in 1..64, not 65"),
        (["--max-length", 1], "max_length must be an integer in 2..8194, not 1"),
        (["--batch-size", 0], "batch_size must be at least 1"),
    ],
    ids=str,
)
def test_an_option_that_the_model_does_not_take(model, files, arguments, message):
    assert message in refused(search(*files[0], "--model", model, *arguments))


def test_a_bad_row_further_on_leaves_no_results(model, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text\n" * 9 + b"caf\xe9\n")
    assert f"{tmp_path / 'a.txt'}:10: not UTF-8 text" in refused(search(tmp_path / "a.txt", "--model", model))


def test_shards_of_another_model_dimension_or_precision(prompted, model, files, documents, tmp_path, no_model):
    assert f"holds embeddings of another model: its files differ from those of {prompted}" in refused(
        search("--embeddings", documents, "--model", prompted)
    )
    result = search("--embeddings", documents, "--model", model, "--dim", 16)
    assert "holds embeddings of 32 dimensions, not of 16" in refused(result)


def test_shards_of_bits(model, files, tmp_path):
    bits = embedded(tmp_path / "bits", model, files[0], "--precision", "ubinary")
    message = refused(search("--embeddings", bits, "--model", model))
    assert "of precision ubinary" in message and "embed the texts again with --precision float32" in message


def test_unfinished_and_damaged_shards(model, shards, no_model):
    (shards / "part-00001.parquet").write_bytes(b"cut")
    assert "part-00001.parquet is missing or damaged" in refused(search("--embeddings", shards, "--model", model))
    (shards / "_manifest.json").unlink()
    assert "is not finished: run the same `jina-jax embed` again" in refused(search("--embeddings", shards, "--model", model))


def test_a_changed_bit_of_a_shard_leaves_no_results(model, shards):
    data = bytearray((shards / "part-00002.parquet").read_bytes())
    data[100] ^= 1
    (shards / "part-00002.parquet").write_bytes(data)
    assert "part-00002.parquet is missing or damaged" in refused(search("--embeddings", shards, "--model", model))


def test_no_rows_in_shards(model, tmp_path):
    (tmp_path / "a.txt").write_text("")
    shards = embedded(tmp_path / "none", model, [str(tmp_path / "a.txt")])
    assert "holds no rows: there is nothing to search" in refused(search("--embeddings", shards, "--model", model))

"""Late chunking: every chunk has a vector, which is the paper's, whatever else is in the call."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
import torch
from tokenizers import Tokenizer
from transformers import BertModel

from helpers.tokenizer_files import tokenizer_file
from jina_jax import Embedder
from jina_jax.embed.forward import chunk_means
from jina_jax.errors import NotFiniteError
from jina_jax.model.parameters import from_arrays, variables
from jina_jax.text.chunking import by_sentences, by_tokens
from oracles import bert, checkpoints, late_chunking, original

DOCUMENTS = (
    ["An image editor for photographs. ", "It opens many files,", " and prints them ", "\n\n too .  "],
    ["画像を編集します。", "写真を開いて、印刷します。", " はい！", "そう？"],
    ["สวัสดีครับ ", "ผมชื่อ สมชาย ", "และ ผม อยู่ที่นี่"],
    ["🦊 emoji ", "👩‍👩‍👧 flags ", "🇩🇪🇯🇵 and 1️⃣"],
    ["An edi", "tor that cuts wor", "ds in half, <s> and", " <pad> inside"],
    ["one"],
)
TASKS = ("retrieval.passage", None, "classification", "retrieval.query", None, "separation")


class Model(NamedTuple):
    embedder: Embedder
    tokenizer: Tokenizer
    states: Callable[[list[int], str | None], torch.Tensor]
    """Token ids and a task -> last states [t, d] in torch."""


def rotary_model(directory: Path) -> Model:
    """jina-embeddings-v3 with five adapters and the bundled tokenizer."""
    state, config = checkpoints.write_original(directory)
    tasks = config["lora_adaptations"]

    def states(ids: list[int], task: str | None) -> torch.Tensor:
        adapter = torch.tensor([-1 if task is None else tasks.index(task)])
        tokens = torch.tensor([ids])
        return original.hidden_states(state, config, tokens, torch.ones_like(tokens), adapter)[-1][0]

    return Model(Embedder.load(directory), _plain(directory / "tokenizer.json"), states)


def bert_model(directory: Path, name: str, vocab_size: int) -> Model:
    bert.write_bert(directory, vocab_size=vocab_size, pieces="sentences" if name == "E5's" else "words")
    shutil.copy(tokenizer_file(name), directory / "tokenizer.json")
    reference = checkpoints.load(BertModel, directory)

    @torch.no_grad()
    def states(ids: list[int], task: None) -> torch.Tensor:
        return reference(torch.tensor([ids])).last_hidden_state[0]

    return Model(Embedder.load(directory), _plain(directory / "tokenizer.json"), states)


def _plain(file: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@pytest.fixture(scope="module", params=["ours", "E5's", "word pieces"])
def model(request, tmp_path_factory) -> Model:
    directory = tmp_path_factory.mktemp("late") / "model"
    match request.param:
        case "ours":
            return rotary_model(directory)
        case "E5's":
            return bert_model(directory, "E5's", 250_037)
        case _:
            return bert_model(directory, "word pieces", 30_522)


def reference(
    model: Model, chunks: list[str], task: str | None, prompt: str, separator: str, limit: int, overlap: int, framed: bool
) -> np.ndarray:
    ids, numbers, before = late_chunking.chunk_of_tokens(model.tokenizer, prompt, chunks, separator)
    around = (before, 1) if framed else (0, 0)
    states = late_chunking.windowed_states(lambda ids: model.states(ids, task), ids, limit, overlap, *around)
    return torch.nn.functional.normalize(late_chunking.chunk_means(states, numbers), dim=-1).numpy()


@pytest.mark.parametrize(("separator", "prompt"), [("", None), (" | ", "Note: "), ("\n", "query:")])
def test_chunks_are_the_papers(model, separator, prompt):
    tasks = TASKS if model.embedder.config.tasks else (None,) * len(TASKS)
    got = model.embedder.encode_chunks(DOCUMENTS, tasks, separator=separator, prompt=prompt)
    assert [len(each) for each in got] == [len(chunks) for chunks in DOCUMENTS]
    for chunks, task, found in zip(DOCUMENTS, tasks, got, strict=True):
        before = (model.embedder.prompts[task] if task else "") if prompt is None else prompt
        want = reference(model, chunks, task, before, separator, limit=10_000, overlap=0, framed=False)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("prompt", "limit", "overlap"), [("", 14, 4), ("query:", 9, 1), ("query: ", 12, 0)])
@pytest.mark.parametrize("windows", ["plain", "framed"])
def test_chunks_of_windows_are_the_papers(model, prompt, limit, overlap, windows):
    options: dict[str, Any] = {"prompt": prompt, "max_length": limit, "overlap": overlap, "windows": windows}
    got = model.embedder.encode_chunks(DOCUMENTS, **options)
    for chunks, found in zip(DOCUMENTS, got, strict=True):
        want = reference(model, chunks, None, prompt, "", limit, overlap, windows == "framed")
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("windows", ["plain", "framed"])
def test_instructions_and_adapters_in_windows_are_the_papers(embedder_of_v3, windows):
    chunks = [f"part {number} of a text, " for number in range(9)]
    for task in ("retrieval.passage", "classification"):
        got = embedder_of_v3.embedder.encode_chunks([chunks], task, max_length=30, overlap=5, windows=windows)[0]
        prompt = embedder_of_v3.embedder.prompts[task]
        want = reference(embedder_of_v3, chunks, task, prompt, "", 30, 5, windows == "framed")
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def embedder_of_v3(tmp_path_factory) -> Model:
    return rotary_model(tmp_path_factory.mktemp("v3") / "model")


def test_one_chunk_is_the_text(embedder, corpus):
    texts = corpus[:20]
    for task in ("retrieval.passage", None):
        options: dict[str, Any] = {"truncate_dim": 16, "precision": "float32"}
        got = embedder.encode_chunks([[text] for text in texts], task, **options)
        np.testing.assert_allclose(np.concatenate(got), embedder.encode(texts, task, **options), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cut", [by_tokens, by_sentences])
def test_the_mean_of_chunks_by_their_tokens_is_the_texts(embedder, corpus, cut):
    texts = [text for text in corpus if len(text) > 150][:12]
    documents = [cut(text, 1 if cut is by_sentences else 20, embedder.tokenizer) for text in texts]
    got = embedder.encode_chunks(documents, "classification", normalize_embeddings=False)
    whole = embedder.encode(texts, "classification", normalize_embeddings=False)
    for chunks, means, want in zip(documents, got, whole, strict=True):
        _, numbers, _ = late_chunking.chunk_of_tokens(_backend(embedder), "", chunks, "")
        counts = np.bincount(numbers, minlength=len(chunks))
        assert len(chunks) > 1
        np.testing.assert_allclose((means * counts[:, None]).sum(0) / counts.sum(), want, rtol=0, atol=1e-5)


def _backend(embedder: Embedder) -> Tokenizer:
    return embedder.tokenizer.backend_tokenizer


def test_neighbours_in_the_row_and_the_call_do_not_matter(embedder, corpus):
    documents = [by_tokens(text, 7, embedder.tokenizer) for text in corpus[:60] if text.strip()]
    tasks = [("classification", None, "retrieval.passage")[number % 3] for number in range(len(documents))]
    together = embedder.encode_chunks(documents, tasks, max_length=64, overlap=8)
    few_rows = embedder.encode_chunks(documents[::-1], tasks[::-1], max_length=64, overlap=8, batch_size=1)[::-1]
    for number in range(len(documents)):
        np.testing.assert_allclose(few_rows[number], together[number], rtol=0, atol=1e-6)
    for number in range(8):
        alone = embedder.encode_chunks(documents[number : number + 1], tasks[number], max_length=64, overlap=8)[0]
        np.testing.assert_allclose(alone, together[number], rtol=0, atol=1e-6)


def test_900_chunks_in_one_row_and_over_the_limit(make_encoder, tokenizer):
    encoder = make_encoder(vocab_size=16_000, hidden_size=8, num_heads=1, num_layers=1, mlp_size=8)
    model = Embedder(encoder, encoder.config, tokenizer)
    chunks = [f"{number} an editor " for number in range(900)]
    ids, numbers, _ = late_chunking.chunk_of_tokens(_backend(model), "", chunks, "")
    assert 4000 < len(ids) < model.max_length
    whole = model.encode_chunks([chunks], normalize_embeddings=False)[0]
    states = model.encode("".join(chunks), output_value="token_embeddings")
    np.testing.assert_allclose(whole, late_chunking.chunk_means(torch.from_numpy(states), numbers), rtol=0, atol=1e-5)
    for windows in ("framed", "plain"):
        got = model.encode_chunks([chunks], max_length=512, windows=windows)[0]
        assert got.shape == (900, 8) and np.isfinite(got).all()


def test_few_programs_whatever_the_chunks(embedder):
    before = chunk_means.programs(embedder.encoder)
    for count in (1, 2, 3, 5, 8, 10, 20, 25, 33, 40, 50, 60, 80, 100, 120, 128):
        embedder.encode_chunks([["a "] * count])
    assert chunk_means.programs(embedder.encoder) - before <= 8  # seven lengths of rows, and one with four times the slots


def test_without_late_chunking_each_chunk_is_a_text(embedder):
    documents = [list(chunks) for chunks in DOCUMENTS]
    tasks = ["retrieval.passage", None, "classification", "retrieval.query", None, None]
    got = embedder.encode_chunks(documents, tasks, late=False, separator=" ")
    for chunks, task, found in zip(documents, tasks, got, strict=True):
        np.testing.assert_allclose(found, embedder.encode(chunks, task), rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="2 of 3 chunks are longer than 5 tokens and were cut"):
        got = embedder.encode_chunks([["one two three four five six", "a"], ["seven eight nine ten"]], late=False, max_length=5)
    with pytest.warns(UserWarning, match="1 of 1 texts"):
        want = embedder.encode("one two three four five six", max_length=5)
    np.testing.assert_allclose(got[0][0], want, rtol=0, atol=1e-6)


def test_dimensions_precision_and_empty_calls(embedder):
    documents = [["an editor ", "for images"], ["a game"]]
    raw = embedder.encode_chunks(documents, normalize_embeddings=False)
    short = [each[:, :16] / np.linalg.norm(each[:, :16], axis=1, keepdims=True) for each in raw]
    for found, want in zip(embedder.encode_chunks(documents, truncate_dim=16), short, strict=True):
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)
    bits = embedder.encode_chunks(documents, precision="ubinary")
    np.testing.assert_array_equal(np.unpackbits(np.concatenate(bits), axis=1), np.concatenate(raw) > 0)
    assert embedder.encode_chunks([]) == [] == embedder.encode_chunks([], late=False)


def test_a_long_prompt_leaves_room_for_half_a_window(embedder):
    """The overlap that is not given is never too large."""
    chunks = [f"part {number} " for number in range(40)]
    for limit in (8, 16, 100):
        assert embedder.encode_chunks([chunks], max_length=limit)[0].shape == (40, 64)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ("a text", {}, "documents must be a sequence of documents, each the sequence of its chunks, not str"),
        (None, {}, "documents must be a sequence of documents"),
        (["a text"], {}, "document 0 must be the sequence of its chunks, not str"),
        ([["a"], 3], {}, "document 1 must be the sequence of its chunks, not int"),
        ([["a"], []], {}, "document 1 has no chunks"),
        ([["a"], ["b", None]], {}, "chunk 1 of document 1 is no string but NoneType"),
        ([["a", "\ud800"]], {}, "chunk 1 of document 0 is not valid Unicode: a lone surrogate at position 0"),
        ([["a"], ["b ", " \n", "c"]], {}, "chunk 1 of document 1 has no token of its own: it is white space"),
        ([["a"], ["b ", " \n", "c"]], {"late": False}, "chunk 1 of document 1 has no token of its own"),
        ([["a", ""]], {}, "chunk 1 of document 0 has no token of its own"),
        ([[" ", "a"]], {}, "chunk 0 of document 0 has no token of its own"),
        ([["日", "本", "語"]], {"separator": ""}, "chunk 1 of document 0 has no token of its own: .* begin before it"),
        ([["a"]], {"separator": None}, "separator must be a string, not None"),
        ([["a"]], {"overlap": 512, "max_length": 512}, r"overlap must be an integer in 0\.\.511, less than a window, not 512"),
        ([["a"]], {"overlap": -1}, "overlap must be an integer"),
        ([["a"]], {"overlap": 1.5}, "overlap must be an integer"),
        (
            [["a b c d e f g h i j k"]],
            {"overlap": 6, "max_length": 8},
            "overlap 6 is not less than .* window of 8 tokens .*: 6",
        ),
        (
            [["a b c d e f g h i j"]],
            {"prompt": "a b c d e f ", "max_length": 8},
            "a window of 8 tokens holds nothing beside the 8",
        ),
        ([["a"]], {"windows": "round"}, r"unknown windows 'round'; use one of \['framed', 'plain'\]"),
        ([["a"], ["b"]], {"task": ["classification"]}, "there are 1 tasks for 2 texts"),
        ([["a"], ["b", "c"]], {"task": [None] * 3, "late": False}, "there are 3 tasks for 2 texts"),
        ([["a"]], {"task": "sorting"}, "unknown task 'sorting'"),
        ([["a"]], {"max_length": 1}, "max_length must be an integer in 2.."),
        ([["a"]], {"truncate_dim": 65}, "truncate_dim must be an integer in 1..64"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(embedder, documents, options, message):
    with pytest.raises(ValueError, match=message):
        embedder.encode_chunks(documents, **options)


def test_a_chunk_that_is_not_finite_is_named(embedder):
    arrays = {path: variable.get_value() for path, variable in variables(embedder.encoder).items()}
    token = embedder.tokenizer("editor")["input_ids"][1]
    arrays["tokens.table"] = arrays["tokens.table"].at[token].set(jnp.nan)
    model = Embedder(from_arrays(embedder.config, arrays, dtype=jnp.float32), embedder.config, embedder.tokenizer)
    with pytest.raises(NotFiniteError, match=r"for 2 of 3 chunks, as \(document, chunk\) \[\(1, 0\), \(1, 1\)\]") as caught:
        model.encode_chunks([["game " * 508], ["an ", "editor"]], max_length=512)  # each has its row
    assert caught.value.indices == [1, 2]

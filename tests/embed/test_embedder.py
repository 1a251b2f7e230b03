"""The Embedder: sentence-transformers' names and meanings, and a clear error for a bad argument."""

import copy
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import TASKS
from jina_jax import Embedder
from jina_jax.embed import folded_adapters, forward
from jina_jax.embed.batch_runner import Tuning
from jina_jax.embed.folded_adapters import FoldedAdapters
from jina_jax.embed.forward import text_embeddings, token_states
from jina_jax.embed.quantize import quantize
from jina_jax.model.parameters import from_arrays, variables
from jina_jax.text import packing
from jina_jax.text.tokenizer import tokenize

VALUES = ("sentence_embedding", "token_embeddings")
TEXTS = ["a text editor", "", "   \t\n ", "ein Spiel", "日本語", "🎲 dice " * 30, "Редактор", "x"]


@pytest.fixture(scope="module")
def tiny(make_encoder, tokenizer) -> Embedder:
    """For long texts, and many."""
    encoder = make_encoder(vocab_size=16_000, hidden_size=8, num_heads=1, num_layers=1, mlp_size=8)
    return Embedder(encoder, encoder.config, tokenizer)


def cosines(a, b):
    return (np.asarray(a) * np.asarray(b)).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def test_a_string_gives_a_vector_and_a_list_a_matrix(embedder):
    vector, matrix = embedder.encode("a game"), embedder.encode(["a game"])
    assert vector.shape == (64,) and matrix.shape == (1, 64) and vector.dtype == np.float32
    np.testing.assert_array_equal(vector, matrix[0])


def test_order_batch_size_and_neighbours_do_not_matter(embedder, corpus):
    texts = corpus[:150]
    expected = np.stack([embedder.encode(text) for text in texts[:25]])
    for batch_size in (1, 7, 64):
        np.testing.assert_allclose(embedder.encode(texts, batch_size=batch_size)[:25], expected, atol=1e-6)
    np.testing.assert_allclose(embedder.encode(texts[::-1])[::-1][:25], expected, atol=1e-6)


def test_a_task_for_each_text(embedder):
    tasks = [None, "retrieval.query", "classification", "retrieval.passage", None, "classification", "retrieval.query", None]
    expected = [embedder.encode(text, task) for text, task in zip(TEXTS, tasks, strict=True)]
    np.testing.assert_allclose(embedder.encode(TEXTS, tasks), expected, atol=1e-6)


def test_large_groups_are_folded_and_small_ones_mixed_with_the_same_result(embedder, corpus):
    texts = corpus[:60]
    tasks = ["classification" if i % 3 else ("retrieval.query" if i % 2 else None) for i in range(60)]
    mixed = embedder.encode(texts, tasks)
    folding = Embedder(embedder.encoder, embedder.config, embedder.tokenizer, tuning=Tuning(worth_folding=1))
    np.testing.assert_allclose(folding.encode(texts, tasks), mixed, atol=1e-6)
    assert folding._batches.folded.tasks


def test_large_calls_fold_and_the_last_tasks_kernels_are_kept(embedder):
    model = Embedder(embedder.encoder, embedder.config, embedder.tokenizer, tuning=Tuning(worth_folding=1))
    model.encode("x", "classification")
    kept = model._batches.folded["classification"]
    model.encode(["y", "z"], "classification")
    assert model._batches.folded["classification"] is kept and model._batches.folded.tasks == ("classification",)
    model.encode("x", "retrieval.query")
    assert model._batches.folded.tasks == ("retrieval.query",)


def test_more_folded_kernels_are_kept_on_request_and_the_oldest_go_first(embedder):
    tuning = Tuning(worth_folding=1, kept_adapters=2)
    model = Embedder(embedder.encoder, embedder.config, embedder.tokenizer, tuning=tuning)
    for task in ("classification", "retrieval.query", "classification", "retrieval.passage"):
        model.encode("x", task)
    assert model._batches.folded.tasks == ("classification", "retrieval.passage")


@pytest.mark.parametrize("kept", [1, len(TASKS)])
def test_small_calls_never_fold_anew(embedder, kept):
    folds = []
    tuning = Tuning(worth_folding=100, kept_adapters=kept)
    model = Embedder(embedder.encoder, embedder.config, embedder.tokenizer, tuning=tuning)
    prepare = model._batches.folded._prepare
    model._batches.folded._prepare = lambda encoder: folds.append(1) or prepare(encoder)
    expected = {task: embedder.encode("a game", task) for task in TASKS}
    for task in TASKS * 3:
        np.testing.assert_allclose(model.encode("a game", task), expected[task], atol=1e-6)
    assert len(folds) == (len(TASKS) if kept == len(TASKS) else 0)
    model.encode(["a game"] * 100, "classification")  # a large one folds, and small ones use what it has left
    before = len(folds)
    np.testing.assert_allclose(model.encode("a game", "classification"), expected["classification"], atol=1e-6)
    assert len(folds) == before and "classification" in model._batches.folded.tasks


def test_an_embedder_is_safe_in_any_number_of_threads(embedder):
    tuning = Tuning(worth_folding=200, kept_adapters=1)  # of two calls one folds, and takes the other's place
    model = Embedder(embedder.encoder, embedder.config, embedder.tokenizer, tuning=tuning)
    tasks = (*TASKS, None)
    calls = [(f"text {i % 3} " * (40 if i % 5 == 0 else 1), tasks[i % len(tasks)]) for i in range(600)]
    expected = {call: embedder.encode(*call) for call in set(calls)}
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda call: model.encode(*call), calls))
    for call, result in zip(calls, results, strict=True):
        np.testing.assert_allclose(result, expected[call], atol=1e-6)


def test_a_task_prepends_its_instruction_and_a_prompt_replaces_it(embedder):
    instruction = embedder.config.prompt("retrieval.query")
    assert instruction
    query = embedder.encode("a game", "retrieval.query")
    np.testing.assert_allclose(query, embedder.encode(instruction + "a game", "retrieval.query", prompt=""), atol=1e-6)
    by_name = embedder.encode("a game", "retrieval.query", prompt_name="note")
    np.testing.assert_allclose(by_name, embedder.encode("a game", "retrieval.query", prompt="Note: "), atol=1e-6)
    assert cosines(query, by_name) < 0.9999
    same = embedder.encode("a game", "retrieval.query", prompt_name="retrieval.query")
    np.testing.assert_allclose(query, same, atol=1e-6)


def test_queries_and_documents_take_their_tasks(embedder):
    for encode, task in ((embedder.encode_query, "retrieval.query"), (embedder.encode_document, "retrieval.passage")):
        np.testing.assert_allclose(encode(["a game"]), embedder.encode(["a game"], task), atol=1e-6)


@pytest.mark.parametrize(
    ("prompts", "query", "document"),
    [
        ((("query", "query: "), ("passage", "passage: ")), "query: ", "passage: "),
        ((("document", "d: "),), "", "d: "),
        ((), "", ""),
    ],
)
def test_without_adapters_queries_and_documents_take_prompts(make_encoder, tokenizer, prompts, query, document):
    encoder = make_encoder(vocab_size=16_000, prompts=prompts)
    model = Embedder(encoder, encoder.config, tokenizer)
    np.testing.assert_allclose(model.encode_query("a game"), model.encode(query + "a game"), atol=1e-6)
    np.testing.assert_allclose(model.encode_document("a game"), model.encode(document + "a game"), atol=1e-6)
    np.testing.assert_allclose(model.encode_query("a game", prompt="p "), model.encode("p a game"), atol=1e-6)


def test_the_default_prompt_applies_where_nothing_else_is_named(make_encoder, tokenizer):
    encoder = make_encoder(vocab_size=16_000, prompts=(("p", "P: "),), default_prompt="p")
    model = Embedder(encoder, encoder.config, tokenizer)
    np.testing.assert_allclose(model.encode("a game"), model.encode("P: a game", prompt=""), atol=1e-6)


def test_truncate_then_normalise_then_quantise(embedder):
    raw = embedder.encode(TEXTS, normalize_embeddings=False)
    short = raw[:, :16] / np.linalg.norm(raw[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose(embedder.encode(TEXTS, truncate_dim=16), short, atol=1e-6)
    np.testing.assert_allclose(embedder.encode(TEXTS, truncate_dim=16, normalize_embeddings=False), raw[:, :16], atol=1e-6)
    for precision in ("int8", "ubinary"):
        got = embedder.encode(TEXTS, truncate_dim=16, precision=precision)
        np.testing.assert_array_equal(got, quantize(embedder.encode(TEXTS, truncate_dim=16), precision))


def test_token_embeddings_average_to_the_sentence_embedding(embedder):
    states = embedder.encode(TEXTS, "classification", output_value="token_embeddings")
    ids = embedder.tokenizer(TEXTS)["input_ids"]
    assert [state.shape for state in states] == [(len(text), 64) for text in ids]
    raw = embedder.encode(TEXTS, "classification", normalize_embeddings=False)
    np.testing.assert_allclose([state.mean(0) for state in states], raw, atol=1e-5)
    assert embedder.encode("x", output_value="token_embeddings").shape == (3, 64)


def test_long_texts_are_cut_with_one_warning(embedder):
    long = ["one two three four five six seven"] * 3 + ["short"]
    with pytest.warns(UserWarning, match="3 of 4 texts are longer than 5 tokens") as caught:
        got = embedder.encode(long, max_length=5)
    assert len(caught) == 1
    ids = embedder.tokenizer(long[0])["input_ids"]
    states = embedder.encode(embedder.tokenizer.decode(ids[1:4]), output_value="token_embeddings")
    assert len(states) == 5
    np.testing.assert_allclose(got[0], embedder.encode(embedder.tokenizer.decode(ids[1:4])), atol=1e-6)


def test_texts_are_tokenised_chunk_by_chunk_with_the_same_result(embedder, corpus):
    texts, tasks = [*corpus[:20], "one two three four five six"], [None, "classification", "retrieval.query"] * 7
    with pytest.warns(UserWarning):
        vectors, states = (embedder.encode(texts, tasks, max_length=7, output_value=kind) for kind in VALUES)
    model = Embedder(embedder.encoder, embedder.config, embedder.tokenizer, tuning=Tuning(first_chunk=4))
    for kind, expected in zip(VALUES, (vectors, states), strict=True):
        with pytest.warns(UserWarning, match=f"of {len(texts)} texts are longer than 7 tokens") as caught:
            got = model.encode(texts, tasks, max_length=7, output_value=kind)
        assert len(caught) == 1 and len(got) == len(texts)
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)


def test_the_next_chunk_is_tokenised_while_one_is_computed(embedder, monkeypatch):
    tokenising, computing = threading.Event(), threading.Event()
    pieces, in_time = [], []

    def tokenize_during_computation(tokenizer, texts, limit):
        pieces.append(len(texts))
        if len(pieces) == 2:
            tokenising.set()
            in_time.append(computing.wait(60))
        return tokenize(tokenizer, texts, limit)

    def compute_during_tokenisation(*arguments, **options):
        computing.set()
        in_time.append(tokenising.wait(60))
        return text_embeddings(*arguments, **options)

    model = Embedder(embedder.encoder, embedder.config, embedder.tokenizer, tuning=Tuning(first_chunk=2))
    monkeypatch.setattr("jina_jax.embed.batch_runner.tokenize", tokenize_during_computation)
    monkeypatch.setattr("jina_jax.embed.batch_runner.text_embeddings", compute_during_tokenisation)
    one_row = "a " * 500
    assert model.encode([one_row] * 6, batch_size=1).shape == (6, 64)
    assert pieces == [2, 4] and len(in_time) == 7 and all(in_time)


def test_an_error_of_a_later_chunk_comes_before_anything_is_computed(embedder, monkeypatch):
    model = Embedder(embedder.encoder, embedder.config, embedder.tokenizer, tuning=Tuning(first_chunk=2))
    monkeypatch.setattr("jina_jax.embed.batch_runner.text_embeddings", None)
    with pytest.raises(ValueError, match="text 4 is not valid Unicode"):
        model.encode(["fine"] * 4 + ["bad \ud800"])


def test_a_text_of_two_megabytes(tiny):
    text = "ein sehr langer Text 日本 " * 80_000
    assert len(text.encode()) > 2_000_000
    with pytest.warns(UserWarning, match="1 of 1 texts are longer than 8194 tokens"):
        assert np.isfinite(tiny.encode(text)).all()


def test_nothing_in_nothing_out(embedder):
    assert embedder.encode([]).shape == (0, 64)
    assert embedder.encode([], truncate_dim=8, precision="int8").shape == (0, 8)
    assert embedder.encode([], output_value="token_embeddings") == []


def test_sequences_other_than_lists(embedder, unchecked):
    expected = embedder.encode(["a", "b"])
    for texts in (("a", "b"), np.array(["a", "b"]), (letter for letter in "ab")):
        np.testing.assert_array_equal(embedder.encode(texts), expected)
    vectors = embedder.encode(["a", "b"], convert_to_numpy=False)
    assert isinstance(vectors, list) and np.array_equal(vectors, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "translation"}, r"unknown task 'translation'.*retrieval.query.*classification"),
        ({"task": ["classification"]}, "1 tasks for 2 texts"),
        ({"task": 3}, "task must be a name, or one for each text, not int"),
        ({"task": ["classification", 3]}, "a task is a name or None, not 3"),
        ({"task": "translation", "sentences": []}, "unknown task 'translation'"),
        ({"truncate_dim": 65}, r"truncate_dim must be an integer in 1..64, not 65"),
        ({"truncate_dim": 0}, r"truncate_dim must be an integer in 1..64, not 0"),
        ({"precision": "int4"}, "unknown precision 'int4'.*ubinary"),
        ({"output_value": "logits"}, "unknown output_value 'logits'.*token_embeddings"),
        ({"output_value": "token_embeddings", "precision": "int8"}, "float32 only"),
        ({"prompt_name": "no"}, r"unknown prompt_name 'no'.*note"),
        ({"prompt": 3}, "prompt must be a string, not int"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 2.5}, "batch_size must be at least 1"),
        ({"batch_size": "8"}, "batch_size must be at least 1"),
        ({"max_length": 9000}, r"max_length must be an integer in 2..8194"),
        ({"max_length": 1}, r"2..8194"),
        ({"device": "cuda"}, "JAX_PLATFORMS"),
        ({"convert_to_tensor": True}, "torch.from_numpy"),
        ({"sentences": ["a", 3]}, "text 1 is no string but int"),
        ({"sentences": ["a", None]}, "text 1 is no string but NoneType"),
        ({"sentences": b"bytes"}, "not bytes"),
        ({"sentences": 5}, "not int"),
        ({"sentences": np.array("abc")}, "array without dimensions"),
        ({"sentences": ["fine", "bad \ud800"]}, "text 1 is not valid Unicode"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "backslashreplace").decode(),
)
def test_bad_arguments_are_value_errors_that_say_what_is_valid(embedder, unchecked, arguments, message):
    with pytest.raises(ValueError, match=message):
        embedder.encode(**({"sentences": ["a", "b"]} | arguments))


def test_an_unknown_keyword_is_a_type_error(embedder):
    with pytest.raises(TypeError, match="temperature"):
        embedder.encode("a", temperature=1)
    with pytest.raises(TypeError, match="temperature"):
        embedder.encode_query("a", temperature=1)


def test_without_a_list_of_dimensions_any_is_valid(make_encoder, tokenizer, unchecked):
    encoder = make_encoder(vocab_size=16_000)
    model = Embedder(encoder, encoder.config, tokenizer)
    assert model.encode("a", truncate_dim=5).shape == (5,)
    for dim in (0, 65, True, 2.5):
        with pytest.raises(ValueError, match=r"1\.\.64"):
            model.encode("a", truncate_dim=dim)


def test_similarity_is_sentence_transformers(embedder):
    util = pytest.importorskip("sentence_transformers").util
    a, b = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    np.testing.assert_allclose(embedder.similarity(a, b[:3]), util.cos_sim(a, b[:3]).numpy(), atol=1e-6)
    np.testing.assert_allclose(embedder.similarity(a[0], b), util.cos_sim(a[0], b).numpy(), atol=1e-6)


def test_on_cpu_the_base_and_a_folded_task_have_their_layers_apart(embedder, monkeypatch):
    seen = []

    def compute(encoder, *arguments, **options):
        seen.append(encoder.layers)
        return text_embeddings(encoder, *arguments, **options)

    monkeypatch.setattr("jina_jax.embed.batch_runner.text_embeddings", compute)
    embedder.encode("a text")
    embedder.encode("a text", task=embedder.config.tasks[0])
    assert len(seen) == 2 and all(len(layers) == embedder.config.num_layers for layers in seen)


def test_the_whole_test_split_compiles_at_most_four_programs(tiny, corpus):
    before = text_embeddings.programs(tiny.encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.encode(corpus)
        tiny.encode(corpus[::-8])
        tiny.encode(corpus[::-1])
    assert 1 <= text_embeddings.programs(tiny.encoder) - before <= 4


def test_all_tasks_share_their_compiled_programs(encoder, tokenizer):
    model = Embedder(encoder, encoder.config, tokenizer)
    first, *others = encoder.config.tasks
    model.encode("a text", task=first, prompt="")  # instructions differ in length, and rows in shape
    before = text_embeddings.programs(encoder)
    for task in others:
        model.encode("a text", task=task, prompt="")
    assert text_embeddings.programs(encoder) == before


def test_a_pass_is_compiled_for_the_device_that_its_encoder_is_on(encoder, monkeypatch):
    kinds = []
    monkeypatch.setattr(forward, "compiler_options", lambda kind: kinds.append(kind) or {})
    rows = forward.ForwardPass(lambda encoder, tokens: encoder.tokens.rows(tokens), ())
    tokens = jnp.array([[5, 9]])
    want = encoder.tokens.rows(tokens)
    np.testing.assert_array_equal(rows(encoder, tokens), want)
    np.testing.assert_array_equal(rows.lower(encoder, tokens).compile()(encoder, tokens), want)
    assert kinds == [jax.devices()[0].device_kind] and rows.programs(encoder) == 1
    np.testing.assert_array_equal(jax.jit(rows)(encoder, tokens), want)  # another program has options of its own
    assert kinds[1:] == [None]


def test_another_models_configuration_is_refused(encoder, make_encoder, tokenizer):
    with pytest.raises(ValueError, match="not that of the encoder"):
        Embedder(encoder, make_encoder().config, tokenizer)


def test_a_dimension_that_the_model_does_not_list_is_valid_and_said_once(embedder, caplog):
    raw = embedder.encode(TEXTS, normalize_embeddings=False)
    for _ in range(2):
        np.testing.assert_array_equal(embedder.encode(TEXTS, truncate_dim=24, normalize_embeddings=False), raw[:, :24])
    said = [record.message for record in caplog.records if "truncate_dim 24" in record.message]
    assert said == ["truncate_dim 24 is not one of the dimensions that the model was trained at: [8, 16, 32, 64]"]


def test_the_names_of_sentence_transformers(embedder):
    assert embedder.max_seq_length == embedder.max_length
    assert embedder.prompts == dict(embedder.config.prompts)
    assert embedder.get_sentence_embedding_dimension() == embedder.encode("a").shape[0] == 64
    first, second = embedder.encode(TEXTS), embedder.encode(TEXTS[::-1])
    got = embedder.similarity_pairwise(first, second)
    np.testing.assert_allclose(got, np.diag(embedder.similarity(first, second)), atol=1e-6)
    assert got.shape == (len(TEXTS),) and embedder.similarity_pairwise(first[0], second[0]).shape == (1,)


def test_what_is_pooled_may_differ_from_what_attends(encoder, tokenizer):
    """Two chunks of one text: they attend to each other, and each has a mean of its own."""
    ids = tokenizer("one text of two chunks, which attend to one another")["input_ids"]
    batch = packing.lay_out([ids], packing.BatchPlan([[0]], (1, 32)), 1)
    chunks = np.where(batch.segment_ids, 1 + (np.arange(32) >= len(ids) // 2)[None], 0).astype(np.int32)
    arrays = batch.tokens, batch.segment_ids, batch.positions
    got = np.asarray(text_embeddings(encoder, *arrays, None, chunks))[0]
    states = np.asarray(token_states(encoder, *arrays, None))[0]
    for chunk in (1, 2):
        np.testing.assert_allclose(got[chunk - 1], states[chunks[0] == chunk].mean(0), atol=1e-5)
    whole = np.asarray(text_embeddings(encoder, *arrays, None, batch.pool_ids))[0, 0]
    np.testing.assert_array_equal(whole, np.asarray(text_embeddings(encoder, *arrays, None))[0, 0])


def test_the_users_tokenizer_keeps_its_settings_and_changes_nothing(encoder, tokenizer):
    own = copy.deepcopy(tokenizer)
    model = Embedder(encoder, encoder.config, own)
    expected = model.encode(TEXTS)
    own.backend_tokenizer.enable_truncation(3)
    own.backend_tokenizer.enable_padding(length=9)
    settings = own.backend_tokenizer.truncation, own.backend_tokenizer.padding
    np.testing.assert_array_equal(model.encode(TEXTS), expected)
    assert (own.backend_tokenizer.truncation, own.backend_tokenizer.padding) == settings


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_an_error_that_names_the_texts(embedder, monkeypatch, value):
    def overflowing(*arguments, **options):
        return jnp.asarray(compute(*arguments, **options)).at[0, 1].set(value)

    for name, options in (("text_embeddings", {}), ("token_states", {"output_value": "token_embeddings"})):
        compute = {"text_embeddings": text_embeddings, "token_states": token_states}[name]
        with monkeypatch.context() as patched:
            patched.setattr(f"jina_jax.embed.batch_runner.{name}", overflowing)
            wrong = "1" if name == "text_embeddings" else "0"  # a slot of texts, or of tokens
            with pytest.raises(ValueError, match=rf"NaN or infinity for 1 of 3 texts, by index \[{wrong}\]; .* float16"):
                embedder.encode(["a", "b", "c"], **options)


def test_a_float16_model_that_overflows_is_refused(make_encoder, tokenizer):
    encoder = make_encoder(vocab_size=16_000)
    arrays = {path: variable.get_value() for path, variable in variables(encoder).items()}
    arrays["layers.up.kernel"] = arrays["layers.up.kernel"] * 1e5
    encoder = from_arrays(encoder.config, arrays, dtype=jnp.float16)
    with pytest.raises(ValueError, match="NaN or infinity for 2 of 2 texts"):
        Embedder(encoder, encoder.config, tokenizer).encode(["a", "b"], precision="ubinary")


def test_threads_fold_one_after_the_other(embedder):
    busy, met = threading.Lock(), []

    def prepare(encoder):
        alone = busy.acquire(blocking=False)
        met.append(not alone)
        time.sleep(0.02)
        if alone:
            busy.release()
        return encoder

    folded = FoldedAdapters(embedder.encoder, 1, prepare)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(folded.__getitem__, ["classification", "retrieval.query"] * 4))
    assert met and not any(met)


def test_one_text_is_quantised_by_calibration_ranges(embedder):
    calibration = embedder.encode([f"text {i}" for i in range(120)], truncate_dim=16)
    ranges = np.stack([calibration.min(0), calibration.max(0)])
    got = embedder.encode("text 5", truncate_dim=16, precision="int8", ranges=ranges)
    expected = (calibration[5] - ranges[0]) / (ranges[1] - ranges[0]) * 255 - 128
    assert got.dtype == np.int8
    np.testing.assert_allclose(got, expected, atol=1.01)
    with pytest.raises(ValueError, match=r"ranges must be \[2, 64\]"):
        embedder.encode("text 5", precision="int8", ranges=ranges)


@pytest.mark.parametrize("precision", ["ubinary", "int8"])
def test_integers_have_no_similarity(embedder, unchecked, precision):
    quantised = embedder.encode(["a", "b"], precision=precision)
    for compare in (embedder.similarity, embedder.similarity_pairwise):
        with pytest.raises(ValueError, match=r"floats, not of u?int8.*np.unpackbits"):
            compare(quantised, quantised)


@pytest.mark.parametrize("unordered", [{"a", "b"}, frozenset("ab"), {"a": 1}.keys()])
def test_a_set_of_texts_or_tasks_has_no_order(embedder, unchecked, unordered):
    with pytest.raises(ValueError, match="has none; pass a list"):
        embedder.encode(unordered)
    with pytest.raises(ValueError, match="in the order of the texts"):
        embedder.encode(["a", "b"][: len(unordered)], unordered)


@pytest.mark.parametrize(
    ("platform", "memory", "kept"),
    [("cpu", 2**40, 1), ("tpu", 2**40, len(TASKS)), ("tpu", 2 * 4, 2), ("tpu", 0, 1), ("gpu", None, 1)],
)
def test_folded_kernels_are_kept_as_an_accelerators_memory_allows(embedder, monkeypatch, platform, memory, kept):
    config = embedder.config
    kernels = 4 * config.num_layers * config.hidden_size * (4 * config.hidden_size + 2 * config.mlp_size)  # float32
    memory = memory if memory is None or memory > 100 else memory * kernels
    stats = None if memory is None else {"bytes_limit": memory}
    monkeypatch.setattr(folded_adapters, "platform", lambda: platform)
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)])
    assert folded_adapters.how_many_to_keep(embedder.encoder) == kept

"""The batcher: any mix of requests gets the vectors of `Embedder.encode`, and a bad text fails
alone."""

import threading
import time
from itertools import count

import numpy as np
import pytest

from helpers.serving import wait_until
from jina_jax.embed.mixed_rows import MixedRows, Started
from jina_jax.serve import batcher as batcher_module
from jina_jax.serve.batcher import FAILURES, Batcher, Pace, TextFailed
from jina_jax.serve.errors import ApiError
from jina_jax.serve.metrics import Metrics, _compilations
from jina_jax.serve.options import ServeOptions
from jina_jax.serve.schedule import Waiting
from jina_jax.serve.tasks import resolve_task
from jina_jax.serve.texts import Limits, TokenizedText, tokenize_texts
from jina_jax.serve.work import Work
from jina_jax.text.packing import max_texts, row_length
from jina_jax.text.tokenizer import private_backend

OPTIONS = ServeOptions(names=("tiny",), max_queued_tokens=10**9, deadline=600.0)
LENGTHS = (1, 2, 3, 5, 8, 12, 20, 40, 70, 130, 260, 500, 520, 1000)
LONG = (1500, 3000, 8000)


@pytest.fixture(scope="module")
def rows(five):
    rows = five.mixed_rows(1024)
    rows.compile()
    return rows


@pytest.fixture(scope="module")
def pool(five, corpus):
    return pool_of(five, corpus, LENGTHS)


def pool_of(five, corpus, lengths):
    """Texts of some lengths under every task: their tokens, and the vectors of `encode`."""
    backend, words = private_backend(five.tokenizer), " ".join(corpus[:400]).split()
    texts = [""] + [" ".join(words[7 * i : 7 * i + length]) for i, length in enumerate(lengths)]
    texts = [backend.decode(backend.encode(text).ids[1:8100]) for text in texts]
    tokenized, tasks = [], []
    for task in (*five.config.tasks, None):
        limits = Limits(five.max_length, "none", str, "")
        tokenized += tokenize_texts(backend, texts, 0, resolve_task(task, five.config, "task"), limits)
        tasks += [(text, task) for text in texts]
    return [*zip(tokenized, five.encode([text for text, _ in tasks], [task for _, task in tasks]), strict=True)]


@pytest.fixture
def start(five, monkeypatch):
    """Starter of batchers, which end with the test."""
    running = []

    def start(rows, options=OPTIONS, batches=1) -> Batcher:
        monkeypatch.setattr(batcher_module, "pace", lambda _: Pace(1024, batches))
        running.append(Batcher(rows, five.config.pad_id, options, Metrics()))
        return running[-1]

    yield start
    for batcher in running:
        assert batcher.close(seconds=60.0)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def check_mix(batcher: Batcher, pool, rng: np.random.Generator) -> None:
    """64 requests at once, of 1 to 20 texts, a few of them long, from 8 threads."""
    weights = np.array([1 / (1 + len(text.token_ids)) ** 0.5 for text, _ in pool])
    picks = [rng.choice(len(pool), rng.choice([1, 1, 2, 5, 20]), p=weights / weights.sum()) for _ in range(64)]
    works = [Work([pool[i][0] for i in pick]) for pick in picks]

    def submit(some):
        for work in some:
            batcher.submit(work)

    threads = [threading.Thread(target=submit, args=(works[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for work, pick in zip(works, picks, strict=True):
        results = work.future.result(timeout=600)
        np.testing.assert_allclose(unit(np.stack(results)), [pool[i][1] for i in pick], atol=1e-6)
    wait_until(lambda: batcher.queued_tokens == 0)


@pytest.mark.parametrize("batches", [1, 2])
def test_random_mixes_give_the_vectors_of_encode_and_compile_nothing(rows, pool, start, batches):
    batcher, before = start(rows, batches=batches), dict(_compilations)
    for seed in range(4):
        check_mix(batcher, pool, np.random.default_rng(seed))
    assert _compilations.get("jax", 0) == before.get("jax", 0)


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 2])
def test_a_thousand_random_mixes_of_1_to_8192_tokens(optimized, five, corpus, start, batches):
    rows, pool = five.mixed_rows(1024), pool_of(five, corpus, LENGTHS + LONG)
    rows.compile()
    assert max(len(text.token_ids) for text, _ in pool) > 8000
    batcher = start(rows, batches=batches)
    for seed in range(500):
        check_mix(batcher, pool, np.random.default_rng((batches, seed)))
    assert batcher.is_alive


def test_token_states_are_those_of_encode(five, rows, start):
    backend, texts = private_backend(five.tokenizer), ["a text editor", "", "ein Spiel " * 60]
    task = resolve_task("classification", five.config, "task")
    work = Work(tokenize_texts(backend, texts, 0, task, Limits(8194, "none", str, "")), states=True)
    start(rows).submit(work)
    expected = five.encode(texts, "classification", output_value="token_embeddings")
    for result, states in zip(work.future.result(60), expected, strict=True):
        np.testing.assert_allclose(result, states, atol=1e-5)


def test_several_embeddings_of_one_text_are_means_of_its_token_states(five, rows, start):
    """What late chunking needs: the row is shared with a text that has one."""
    backend, text = private_backend(five.tokenizer), "a text editor for programmers, with many plugins " * 4
    ids, states = backend.encode(text).ids, five.encode(text, output_value="token_embeddings")
    pool_ids = np.sort(np.arange(len(ids)) % 3) + 1
    pool_ids[:2] = 0
    works = [Work([TokenizedText(ids, -1)]), Work([TokenizedText(ids, -1, pool_ids, 3)]), Work([TokenizedText(ids, -1)])]
    batcher = start(rows)
    for work in works:
        batcher.submit(work)
    plain, means, _ = (work.future.result(60)[0] for work in works)
    np.testing.assert_allclose(plain, states.mean(0), atol=1e-5)
    np.testing.assert_allclose(means, [states[pool_ids == i].mean(0) for i in (1, 2, 3)], atol=1e-5)


class Faulty(MixedRows):
    """Rows that raise, or give NaN in the whole row, where a token is in one of them."""

    def __init__(self, rows: MixedRows, token: int, *, raises: bool):
        self.rows, self.devices, self.token, self.raises = rows, rows.devices, token, raises

    def start(self, batch, adapter_ids):
        found = (batch.tokens == self.token).any(-1)
        if self.raises and found.any():
            raise RuntimeError("out of memory")
        started = self.rows.start(batch, adapter_ids)
        embeddings = np.array(started.embeddings)
        embeddings[found] = np.nan
        return Started(embeddings, started.states)


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("batches", [1, 2])
def test_an_exception_or_nan_fails_that_text_alone(five, rows, pool, start, raises, batches):
    batcher = start(Faulty(rows, 15_999, raises=raises), batches=batches)
    short = [(text, vector) for text, vector in pool if len(text.token_ids) < 100]
    works = [Work([text]) for text, _ in short[:20]]
    bad = [Work([short[0][0], TokenizedText([0, 15_999, 2], -1)]) for _ in range(3)]
    for work in (*works[:10], *bad, *works[10:]):
        batcher.submit(work)
    for work in bad:
        with pytest.raises(TextFailed) as failed:
            work.future.result(60)
        assert failed.value.index == 1
    for work, (_, vector) in zip(works, short, strict=False):
        np.testing.assert_allclose(unit(work.future.result(60)[0]), vector, atol=1e-6)
    assert batcher.is_alive and batcher.queued_tokens == 0


def test_a_lost_device_ends_the_thread_and_every_request(rows, start):
    batcher = start(Faulty(rows, 7, raises=True))
    works = [Work([TokenizedText([0, 7, 2], -1)]) for _ in range(FAILURES + 3)]
    for work in works:
        batcher.submit(work)
    wait_until(lambda: not batcher.is_alive)
    assert batcher.lost is not None
    assert all(work.future.exception(10) is not None for work in works)
    with pytest.raises(ApiError) as refused:
        batcher.submit(Work([TokenizedText([0, 2], -1)]))
    assert refused.value.status == 503


class Gate(MixedRows):
    """Rows that compute when they are told to."""

    def __init__(self, rows: MixedRows):
        self.rows, self.devices, self.open, self.started = rows, rows.devices, threading.Event(), []

    def start(self, batch, adapter_ids):
        self.started.append(batch)
        assert self.open.wait(60)
        return self.rows.start(batch, adapter_ids)


def short(*ids: int) -> Work:
    return Work([TokenizedText([0, *ids, 2], -1)])


def bulk(texts: int, tokens: int = 200) -> Work:
    return Work([TokenizedText([0, *[5] * (tokens - 2), 2], -1) for _ in range(texts)])


def test_a_query_overtakes_bulk_which_is_computed_in_slices(rows, start):
    gate = Gate(rows)
    batcher, work, query = start(gate), bulk(50), short(9)
    batcher.submit(work)
    wait_until(lambda: gate.started)
    batcher.submit(query)
    gate.open.set()
    work.future.result(60)
    query.future.result(60)
    first = next(i for i, batch in enumerate(gate.started) if (batch.tokens == 9).any())
    assert first == 1 and len(gate.started) > 5
    assert all(batch.tokens.size <= 1024 for batch in gate.started)


def test_a_flood_of_queries_does_not_starve_bulk():
    waiting, numbers = Waiting(1024, 1), count(10)
    waiting.add(bulk(40, 500))
    turns = []
    for _ in range(20):
        waiting.add(short(*[next(numbers)] * 200))
        waiting.add(short(*[next(numbers)] * 200))
        batch = waiting.next_batch()
        turns.append(any(entry.work.is_bulk for entry in batch.entries))
    assert 4 <= sum(turns) <= 6
    assert all(any(turns[i : i + 4]) for i in range(len(turns) - 3))


def test_what_a_query_leaves_free_is_filled_with_bulk():
    waiting = Waiting(1024, 1)
    waiting.add(bulk(40, 100))
    waiting.add(short(*range(10, 190)))
    batch = waiting.next_batch()
    assert not batch.entries[0].work.is_bulk and len(batch.entries) == 4
    assert sum(entry.tokens for entry in batch.entries) <= batch.plan.shape[1] == 512


def test_every_batch_has_a_compiled_shape_and_every_text_its_place_once(rows):
    rng, seen = np.random.default_rng(0), []
    for devices in (1, 4):
        waiting, works = Waiting(1024, devices), []
        for _ in range(60):
            lengths = rng.choice([2, 10, 60, 300, 900, 4000, 8194], rng.integers(1, 30))
            works.append(Work([TokenizedText([0] * int(n), -1, None, int(rng.integers(1, 4))) for n in lengths]))
            waiting.add(works[-1])
        works[5].end(ApiError(503, "gone"))
        shapes = {(b * devices, t) for b, t in rows.shapes}
        seen = []
        while (batch := waiting.next_batch()) is not None:
            assert batch.plan.shape in shapes
            held = [batch.entries[i] for row in batch.plan.rows for i in row]
            assert len(held) == len(batch.entries) and len(batch.plan.rows) <= batch.plan.shape[0]
            for row in batch.plan.rows:
                entries = [batch.entries[i] for i in row]
                assert sum(entry.tokens for entry in entries) <= batch.plan.shape[1]
                embeddings = sum(entry.work.texts[entry.text].embeddings for entry in entries)
                assert embeddings <= max(max_texts(batch.plan.shape[1]), 1)
            seen += [(entry.work.number, entry.text) for entry in held]
        expected = [(work.number, i) for work in works if not work.ended for i in range(len(work.texts))]
        assert sorted(seen) == sorted(expected)


def test_the_queue_is_bounded_in_tokens_and_says_when_to_come_back(rows, start):
    gate, options = Gate(rows), ServeOptions(names=("t",), max_queued_tokens=20_000, deadline=5.0)
    batcher = start(gate, options)
    with pytest.raises(ApiError) as refused:
        batcher.submit(bulk(101))
    assert refused.value.status == 413 and "20,200 tokens" in str(refused.value)
    works = [bulk(50) for _ in range(2)]
    for work in works:
        batcher.submit(work)
    with pytest.raises(ApiError) as refused:
        batcher.submit(bulk(10))
    assert refused.value.status == 429 and refused.value.retry_after == 1
    queries = [short(*[9] * 498) for _ in range(5)]  # an eighth on top is theirs
    for query in queries:
        batcher.submit(query)
    with pytest.raises(ApiError):
        batcher.submit(queries[0])
    assert batcher.queued_tokens == 22_500
    gate.open.set()
    assert [len(work.future.result(60)) for work in works] == [50, 50]
    assert batcher.queued_tokens == 0 or wait_until(lambda: batcher.queued_tokens == 0) is None


def test_what_the_measured_rate_cannot_do_in_time_is_refused_at_once(rows, start):
    gate = Gate(rows)
    batcher = start(gate, ServeOptions(names=("t",), deadline=2.0))
    batcher._rate = 1000.0
    batcher.submit(first := bulk(20))  # too much, too, but there is nothing before it
    with pytest.raises(ApiError) as refused:
        batcher.submit(bulk(5))
    assert refused.value.status == 429 and refused.value.retry_after == 4
    batcher.submit(query := short(1))  # a query waits for queries only
    gate.open.set()
    assert len(first.future.result(60)) == 20 and query.future.result(60)
    assert batcher._rate != 1000.0


def test_a_dropped_request_is_not_computed(rows, start):
    gate = Gate(rows)
    batcher, running, gone = start(gate), short(9), bulk(30)
    batcher.submit(running)
    wait_until(lambda: gate.started)
    batcher.submit(gone)
    batcher.drop(gone, "client_gone", ApiError(503, "gone"))
    assert batcher.queued_tokens == running.tokens
    gate.open.set()
    running.future.result(60)
    batcher.submit(after := short(8))
    after.future.result(60)
    assert not any((batch.tokens == 5).any() for batch in gate.started)
    assert batcher._metrics.registry.get_sample_value("jina_jax_dropped_total", {"reason": "client_gone"}) == 30


def test_a_batch_that_never_ends_is_seen(rows, start, monkeypatch):
    batcher = start(rows, ServeOptions(names=("t",), deadline=0.01))
    assert batcher.is_alive
    batcher._busy_since = time.perf_counter() - 1
    assert not batcher.is_alive
    batcher._busy_since = None


def test_lengths_of_rows():
    assert [row_length(n) for n in (1, 512, 513, 8194)] == [512, 512, 1024, 8320]
    with pytest.raises(ValueError, match="longest row holds 8320"):
        row_length(8321)

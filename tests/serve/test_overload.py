"""More requests than can be computed, and clients that leave."""

import asyncio
import concurrent.futures
import socket
import threading
import time

import httpx2 as httpx
import numpy as np
import pytest

from helpers.serving import serving, wait_until
from jina_jax.embed.mixed_rows import MixedRows


@pytest.fixture
def slow(monkeypatch):
    """Every batch takes 30 ms longer, so that the tests decide how much is too much."""
    start = MixedRows.start

    def started(self, batch, adapter_ids):
        time.sleep(0.03)
        return start(self, batch, adapter_ids)

    monkeypatch.setattr(MixedRows, "start", started)


@pytest.fixture
def small(five, slow):
    with serving(five, max_queued_tokens=16_000, max_batch_tokens=512, deadline=20.0) as server:
        yield server


TEXTS = ["an image editor for everyone " * 8] * 10
"""A bulk request: a queue of the fixture holds some of them."""


async def send(served, count: int) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=served.url, timeout=60, limits=limits) as client:
        return await asyncio.gather(*(client.post("/v1/embeddings", json={"input": TEXTS}) for _ in range(count)))


def test_what_is_too_much_gets_429_and_the_rest_its_vectors(small):
    responses = asyncio.run(send(small, 60))
    statuses = [response.status_code for response in responses]
    assert {*statuses} == {200, 429} and statuses.count(200) >= 3
    expected = small.embedder.encode(TEXTS)
    for response in responses:
        if response.status_code == 200:
            given = [item["embedding"] for item in response.json()["data"]]
            np.testing.assert_allclose(np.float32(given), expected, atol=1e-6)
        else:
            assert 1 <= int(response.headers["retry-after"]) <= 20
            assert response.json()["error"]["type"] == "rate_limit_error"
    assert small.metric("dropped_total", reason="overload") == statuses.count(429)
    wait_until(lambda: small.metric("queued_tokens") == 0)


def test_the_openai_client_gets_through_by_its_own_retries(small):
    openai = pytest.importorskip("openai")

    burst = threading.Thread(target=lambda: asyncio.run(send(small, 60)))
    burst.start()
    wait_until(lambda: small.metric("dropped_total", reason="overload") >= 1)
    refused = small.metric("dropped_total", reason="overload")
    with openai.OpenAI(base_url=f"{small.url}/v1", api_key="k", max_retries=6) as client:
        answer = client.embeddings.create(model="m", input=TEXTS)
    burst.join()
    assert len(answer.data) == len(TEXTS) and small.metric("dropped_total", reason="overload") >= refused


def test_a_request_past_its_deadline_is_dropped(five, slow):
    with serving(five, max_batch_tokens=512, deadline=0.3) as served:
        first = served.post("/v1/embeddings", input=TEXTS * 20)
        assert first.status_code == 503 and "deadline of 0.3 s" in first.text and first.headers["retry-after"] == "1"
        wait_until(lambda: served.metric("queued_tokens") == 0)
        assert served.metric("dropped_total", reason="deadline") > 100
        assert served.metric("batch_texts_count") < 20
        assert served.embeddings(input="a").shape == (1, 32)


def test_clients_that_hang_up_are_not_computed(five, monkeypatch):
    """100 clients leave while a batch is computed; the one that stays is answered."""
    start, gate = MixedRows.start, threading.Event()
    body = b'{"input": ["one text", "and another"]}'
    request = b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)

    def held(self, batch, adapter_ids):
        assert gate.wait(120)
        return start(self, batch, adapter_ids)

    with serving(five, max_batch_tokens=512, deadline=120.0) as served:
        monkeypatch.setattr(MixedRows, "start", held)
        address = served.url.removeprefix("http://").split(":")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            stays = pool.submit(served.embeddings, input=TEXTS)
            wait_until(lambda: served.metric("queued_requests") == 1)
            leave = [socket.create_connection((address[0], int(address[1]))) for _ in range(100)]
            for connection in leave:
                connection.sendall(request)
            wait_until(lambda: served.metric("queued_requests") == 101)
            for connection in leave:
                connection.close()
            wait_until(lambda: served.metric("dropped_total", reason="client_gone") == 200)
            gate.set()
            np.testing.assert_allclose(stays.result(), five.encode(TEXTS), atol=1e-6)
        wait_until(lambda: served.metric("requests_total", route="/v1/embeddings", status="499") == 100)
        assert served.metric("queued_tokens") == 0 and served.metric("batch_texts_sum") == len(TEXTS)


@pytest.mark.slow
def test_tenfold_overload_for_a_minute_keeps_memory_steady(small):
    """Accepted requests end within the deadline, and the process does not grow."""
    psutil = pytest.importorskip("psutil")
    process, ends, times, sizes = psutil.Process(), time.monotonic() + 60, [], []
    asyncio.run(send(small, 60))
    while time.monotonic() < ends:
        began = time.monotonic()
        responses = asyncio.run(send(small, 60))
        assert {response.status_code for response in responses} <= {200, 429, 503}
        times.append(time.monotonic() - began)
        sizes.append(process.memory_info().rss)
    assert max(times) < 2 * small.state.options.deadline
    assert np.mean(sizes[-5:]) < 1.05 * np.mean(sizes[:5]) + 20e6

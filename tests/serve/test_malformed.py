"""Requests that no client should send: each is a 4xx that names what is wrong, and the next good
request is right."""

import json
import random
import re
import socket

import numpy as np
import pytest

from helpers.serving import serving, wait_until

ROUTES = {
    "/v1/embeddings": "input",
    "/v2/embed": "texts",
    "/v1/embed": "texts",
    "/embed": "inputs",
    "/embed_all": "inputs",
    "/tokenize": "inputs",
    "/similarity": "inputs",
}
WRONG = [None, True, 0, -1, 1.5, 1e300, 2**70, [], {}, [[]], [{}], [None], [1], [[1]], ["a", 1], ["a", ["b"]], [True]]
NO_LIST = [*WRONG, "", "nope"]
FIELDS = {
    "/v1/embeddings": {
        "task": [0, "nope", ["separation"], {}],
        "dimensions": [0, -1, 1.5, 256.0, "256", True, 33, 2**70, [8]],
        "embedding_type": ["int4", 5, ["float", "binary"], {}],
        "encoding_format": ["utf-8", False],
        "truncate": ["true", 1, "END", []],
        "normalized": ["no", 0],
        "late_chunking": ["yes", 2],
        "model": [5, ["m"], {}, False],
    },
    "/v2/embed": {
        "input_type": ["nope", 3, "image"],
        "embedding_types": ["float", [], ["int3"], [3]],
        "truncate": [True, "end"],
    },
    "/embed": {"prompt_name": [3, "nope"], "truncate": ["yes"], "truncation_direction": ["up", 3], "dimensions": [0, "8", 99]},
}
FIELDS |= {"/v1/embed": FIELDS["/v2/embed"], "/embed_all": FIELDS["/embed"], "/tokenize": {"prompt_name": [1, "x"]}}
FIELDS["/similarity"] = {"parameters": [3, "a", ["a"], {"truncate": 3}, {"prompt_name": "nope"}]}


def good(route: str) -> dict:
    if route == "/similarity":
        return {"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}}
    return {ROUTES[route]: ["a", "b", "c"], "model": "m"}


def malformed(rng: random.Random) -> tuple[str, bytes, str]:
    """A route, a body that is wrong in one way, and a pattern that its error must have."""
    route = rng.choice([*ROUTES])
    name, body = ROUTES[route], good(route)
    kind = rng.choice(["texts", "field", "item", "surrogate", "bytes", "json", "deep", "many", "long"])
    if kind == "texts":
        needs_list = route in ("/v1/embed", "/v2/embed", "/similarity")
        body[name] = rng.choice(NO_LIST if needs_list else WRONG)
        return route, json.dumps(body).encode(), name
    if kind == "field":
        field = rng.choice([*FIELDS[route]])
        body[field] = rng.choice(FIELDS[route][field])
        return route, json.dumps(body).encode(), "truncate|prompt_name|parameters" if field == "parameters" else field
    if kind in ("item", "surrogate", "long") and route != "/similarity":
        index, wrong = rng.randrange(3), [5, None, True, ["b"], [1, 2], {"image": "x"}, {"text": 5}]
        long = "word " * rng.choice([9000, 500_000])
        body[name][index] = {"item": rng.choice(wrong), "surrogate": "x\ud83dy", "long": long}[kind]
        if route in ("/v2/embed", "/v1/embed"):
            body["truncate"] = "NONE"
        if kind == "long" and route == "/tokenize":
            body[name][index] = "word " * 500_000
        return route, json.dumps(body).encode(), re.escape(f"{name}[{index}]")
    data = json.dumps(body).encode()
    if kind == "many" and route != "/similarity":
        body[name] = ["a"] * rng.choice([2049, 20_000])
        return route, json.dumps(body).encode(), f"{name} holds .* texts; the limit is 2,048"
    if kind == "deep":
        depth = rng.choice([50, 2000, 100_000])
        return route, b'{"%s":' % name.encode() + b"[" * depth + b"]" * depth + b"}", f"{name}|not valid JSON"
    if kind == "json":
        other = rng.choice(
            [b"[]", b"3", b'"a"', b"null", b"true", b"NaN", b"", b"\xef\xbb\xbf" + data, b"a=b&c=d", data + b"}"]
        )
        return route, other, "JSON"
    cut = rng.randrange(1, len(data) - 1)
    broken = rng.choice([data[:cut], data[:cut] + b"\xff\xfe" + data[cut:], data[:cut] + b"\x00" + data[cut:]])
    return route, broken, "JSON|must|missing|is no|not valid"


def check(served, rng: random.Random) -> None:
    route, body, pattern = malformed(rng)
    headers = {"content-type": rng.choice(["application/json", "text/plain", "application/x-www-form-urlencoded"])}
    response = served.http.post(route, content=body, headers=headers)
    context = f"{route} {body[:200]!r} -> {response.status_code} {response.text[:300]}"
    assert 400 <= response.status_code < 500, context
    answer = response.json()
    message = answer["error"]["message"] if isinstance(answer.get("error"), dict) else answer.get("error") or answer["message"]
    assert re.search(pattern, message), context
    assert "Traceback" not in response.text and 'File "' not in response.text and len(response.text) < 4000, context


def check_good(served) -> None:
    np.testing.assert_allclose(served.embeddings(input=["a", "b"]), served.embedder.encode(["a", "b"]), atol=1e-6)


def test_malformed_requests(served):
    rng = random.Random(0)
    for number in range(300):
        check(served, rng)
        if number % 50 == 0:
            check_good(served)
    check_good(served)
    assert served.metric("compilations_since_ready") == 0


@pytest.mark.slow
def test_ten_thousand_malformed_requests(served):
    rng = random.Random(1)
    for number in range(10_000):
        check(served, rng)
        if number % 500 == 0:
            check_good(served)


def test_large_and_compressed_bodies(five):
    with serving(five, max_body=100_000, max_batch_tokens=512) as served:
        for chunked in (False, True):
            content = b'{"input": "%s"}' % (b"x" * 200_000)
            pieces = (content[i : i + 10_000] for i in range(0, len(content), 10_000))
            response = served.http.post("/v1/embeddings", content=pieces if chunked else content)
            assert response.status_code == 413 and "100,000 bytes (--max-body)" in response.json()["error"]["message"]
        response = served.http.post("/v1/embeddings", content=b"x", headers={"content-encoding": "gzip"})
        assert response.status_code == 415
        check_good(served)


def raw(served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def test_slow_and_truncated_bodies(five):
    with serving(five, deadline=1.0, max_batch_tokens=512) as served:
        head = b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{"
        with raw(served) as slow:
            slow.sendall(head)
            answer = slow.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408") and b"within 1 s" in answer
        for _ in range(20):
            with raw(served) as gone:
                gone.sendall(head)
        with raw(served) as junk:
            junk.sendall(b"\x16\x03\x01\x00 not HTTP at all\r\n\r\n")
            assert junk.recv(65536).startswith(b"HTTP/1.1 400")
        check_good(served)
        wait_until(lambda: served.metric("requests_total", route="/v1/embeddings", status="499") == 20)


def test_without_a_valid_key_nothing_is_computed(five):
    with serving(five, keys=("one", "two"), max_batch_tokens=512) as served:
        wrong = [{}, {"authorization": "Bearer three"}, {"authorization": "one"}, {"authorization": "Basic one"}]
        wrong += [{"authorization": "Bearer"}, {"authorization": "Bearer one,two"}, {"x-api-key": "one"}]
        for route in ROUTES:
            for headers in wrong:
                response = served.http.post(route, json=good(route), headers=headers)
                assert response.status_code == 401 and "valid key" in response.text
        assert served.http.get("/v1/models").status_code == served.http.get("/info").status_code == 401
        assert served.metric("batch_texts_count") == 0 and served.metric("tokenizer_seconds_count") == 0
        for key in ("one", "two"):
            response = served.http.post("/embed", json=good("/embed"), headers={"authorization": f"bearer {key}"})
            assert response.status_code == 200
        assert all(served.http.get(path).status_code == 200 for path in ("/health", "/ready", "/metrics"))


def test_a_page_of_an_allowed_origin_may_call(five):
    with serving(five, cors_origins=("https://a.example",), max_batch_tokens=512) as served:
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
        allowed = served.http.options("/v1/embeddings", headers=asked | {"origin": "https://a.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert served.http.options("/v1/embeddings", headers=asked | {"origin": "https://b.example"}).status_code == 400

"""What the server counts, in Prometheus' format. Every series exists from the start, with 0."""

import threading

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

ROUTES = (
    "/v1/embeddings",
    "/v1/models",
    "/v2/embed",
    "/v1/embed",
    "/embed",
    "/embed_all",
    "/similarity",
    "/tokenize",
    "/info",
    "other",
)
"""Values of the label `route`; probes are not counted."""

DROPPED = ("overload", "deadline", "client_gone", "shutdown", "failed")
"""Reasons for which texts are not computed: requests that are refused for overload count once."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_COMPILATION = "/jax/core/compile/backend_compile_duration"
_compilations: dict[str, int] = {}
"""Programs that each thread has compiled, by its name."""


class Metrics:
    """The series of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        _listen()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"jina_jax_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"jina_jax_{name}", text, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"jina_jax_{name}", text, registry=self.registry, buckets=buckets)

        self.requests = counter("requests", "Requests by route and status.", "route", "status")
        self.texts = counter("texts", "Texts of answered requests.")
        self.tokens = counter("tokens", "Tokens of answered requests, with instructions and special tokens.")
        self.truncated = counter("truncated_texts", "Texts that were cut.")
        self.dropped = counter("dropped", "Texts that were accepted or refused and not computed, by reason.", "reason")
        self.slots = counter("slots", "Token slots that were computed, filled or not.")
        self.filled = counter("slots_filled", "Token slots that held a token.")
        self.queued_tokens = gauge("queued_tokens", "Tokens of requests that are accepted and not computed yet.")
        self.queued_requests = gauge("queued_requests", "Requests that are accepted and not answered yet.")
        self.ready = gauge("ready", "Whether requests are taken: 1 or 0.")
        self.tokenizer_seconds = histogram("tokenizer_seconds", "Tokenising of a request.")
        self.queue_seconds = histogram("queue_seconds", "From a request's tokens to its first batch.")
        self.compute_seconds = histogram("compute_seconds", "Computation of a batch.")
        self.request_seconds = histogram("request_seconds", "From a request's first byte to its answer.")
        self.batch_texts = histogram("batch_texts", "Texts of a batch.", tuple(2.0**i for i in range(10)))
        self.batch_filled = histogram("batch_filled_ratio", "Filled slots of a batch.", tuple(i / 10 for i in range(1, 11)))
        compilations = gauge("compilations_since_ready", "Programs compiled by the thread that computes: 0, or a fault.")
        compilations.set_function(lambda: _compilations.get("jax", 0))
        for route in ROUTES:
            self.requests.labels(route, "200")
        for reason in DROPPED:
            self.dropped.labels(reason)

    def observe_batch(self, seconds: float, *, texts: int, tokens: int, slots: int) -> None:
        """Counts a computed batch."""
        self.compute_seconds.observe(seconds)
        self.batch_texts.observe(texts)
        self.batch_filled.observe(tokens / slots)
        self.slots.inc(slots)
        self.filled.inc(tokens)

    def text(self) -> bytes:
        """Returns all series as Prometheus reads them."""
        return generate_latest(self.registry)


def _listen() -> None:
    """Counts compilations from now on; JAX keeps a listener for good, so there is one."""
    if _listening.acquire(blocking=False):
        jax.monitoring.register_event_duration_secs_listener(_count_compilation)


def _count_compilation(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == _COMPILATION:
        name = threading.current_thread().name
        _compilations[name] = _compilations.get(name, 0) + 1


_listening = threading.Lock()
"""Held once the listener is there."""

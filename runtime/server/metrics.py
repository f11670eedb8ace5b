"""What a server counts, in Prometheus' text form."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from embedge.runtime.server.queue import Batch, Queue

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)
_REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server; nothing that a client sends becomes a label."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "embedge_requests", "Requests answered.", ["path", "status"], registry=registry
        )
        self._request_seconds = Histogram(
            "embedge_request_seconds",
            "From a request's arrival to its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._tokens = Counter(
            "embedge_tokens", "Tokens run.", ["model", "precision", "task"], registry=registry
        )
        self._inputs = Counter(
            "embedge_inputs",
            "Texts and images run.",
            ["model", "precision", "task"],
            registry=registry,
        )
        self._run_seconds = Counter(
            "embedge_run_seconds",
            "Seconds that batches ran.",
            ["model", "precision"],
            registry=registry,
        )
        self._batch_tokens = Histogram(
            "embedge_batch_tokens", "Tokens of a batch.", buckets=_TOKENS, registry=registry
        )
        self._batch_requests = Histogram(
            "embedge_batch_requests",
            "Requests joined in a batch.",
            buckets=_REQUESTS,
            registry=registry,
        )
        self._answered: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._gone = Counter(
            "embedge_clients_gone", "Requests whose client went away.", registry=registry
        )
        self._reloads = Counter("embedge_reloads", "Bundles opened anew.", registry=registry)

    def watch(self, queue: Queue) -> None:
        """Shows a queue's tokens."""
        waiting = Gauge(
            "embedge_queued_tokens", "Tokens that wait or run.", registry=self._registry
        )
        waiting.set_function(lambda: queue.tokens)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Counts a request; ``path`` is the route's."""
        if (path, status) not in self._answered:
            of_path = self._request_seconds.labels(path)
            self._answered[path, status] = self._requests.labels(path, status), of_path
        requests, request_seconds = self._answered[path, status]
        requests.inc()
        request_seconds.observe(seconds)

    def ran(self, batch: Batch) -> None:
        """Counts a batch."""
        kind = batch.kind
        precision = kind.model.embedder.precision
        labels = kind.model.name, precision, kind.task
        self._tokens.labels(*labels).inc(batch.tokens)
        self._inputs.labels(*labels).inc(batch.inputs)
        self._run_seconds.labels(kind.model.name, precision).inc(batch.seconds)
        self._batch_tokens.observe(batch.tokens)
        self._batch_requests.observe(batch.requests)

    def client_gone(self) -> None:
        """Counts a request whose client went away."""
        self._gone.inc()

    def reloaded(self, count: int) -> None:
        """Counts bundles that were opened anew."""
        self._reloads.inc(count)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)

"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Numbers:
    """Counters of one server. routes: the paths that there are; folder: what is below it counts as
    one; others count as 'other'."""

    def __init__(self, routes: frozenset[str], folder: str) -> None:
        self._routes, self._folder, self.answered = routes, folder, 0
        self._registry = CollectorRegistry()
        own: dict[str, Any] = dict(registry=self._registry)
        labels = ("path", "status")
        self._requests = Counter("coca_jax_requests", "Requests answered.", labels, **own)
        self._seconds = Histogram(
            "coca_jax_request_seconds",
            "From a request to its answer.",
            ("path",),
            buckets=_SECONDS,
            **own,
        )
        self._sizes = Histogram(
            "coca_jax_batch_items", "Items that ran together.", buckets=_SIZES, **own
        )
        self._waiting = Gauge(
            "coca_jax_waiting_items", "Items that wait to be decoded, or for a batch.", **own
        )

    def waiting(self, count: Callable[[], int]) -> None:
        """Where the number of waiting items is read."""
        self._waiting.set_function(count)

    def request(self, path: str, status: int, seconds: float) -> None:
        """One request was answered."""
        if path not in self._routes:
            path = self._folder if path.startswith(self._folder) else "other"
        self.answered += 1
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, size: int) -> None:
        """A batch of so many items was run."""
        self._sizes.observe(size)

    def text(self) -> tuple[bytes, str]:
        """All of them, and their content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

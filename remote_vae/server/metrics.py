"""``GET /metrics``: what a server did, for Prometheus. Without prometheus-client, as in a host, nothing is counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from remote_vae.vae.at_work import Op

# Seconds; a small picture on a card takes 5 ms, a film minutes.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PICTURES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Ended(Protocol):
    """What is counted of a call that came to its end: its place."""

    op: Op
    model: str
    stages: dict[str, float]


def metrics() -> Metrics | None:
    """Counters that are all 0; None: prometheus-client is not installed."""
    try:
        return Metrics()
    except ImportError:
        return None


class Metrics:
    """The counters of one server, in a registry of its own.

    Labels are of the server's making alone: names of its VAEs, its routes, statuses. A client cannot make new ones.

    Raises:
        ImportError: prometheus-client is not installed.
    """

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "remote_vae_requests",
            "Requests that were answered; status 499: the client hung up before.",
            ("model", "route", "status"),
            registry=registry,
        )
        self._stages = Histogram(
            "remote_vae_stage_seconds",
            "Seconds of a call by stage: read, decode_request, queue, predict, answer, send.",
            ("model", "route", "stage"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._batches = Histogram(
            "remote_vae_batch_pictures",
            "Pictures that the VAE worked on at once.",
            ("model", "route"),
            buckets=_PICTURES,
            registry=registry,
        )
        self._work = Counter(
            "remote_vae_work_seconds", "Seconds that a VAE was at work.", ("model", "route"), registry=registry
        )
        self._no_memory = Counter(
            "remote_vae_out_of_memory", "Times that a device had no memory for a call.", ("model", "route"), registry=registry
        )
        self._received = Counter("remote_vae_received_bytes", "Of bodies.", ("model", "route"), registry=registry)
        self._sent = Counter("remote_vae_sent_bytes", "Of bodies.", ("model", "route"), registry=registry)
        self._running = Gauge("remote_vae_running", "Calls that are at work.", registry=registry)
        self._waiting = Gauge("remote_vae_waiting", "Calls in the queue.", registry=registry)

    # --- the engine's watcher ------------------------------------------------------------------------------------------

    def call_ended(self, place: Ended, status: int, bytes_in: int, bytes_out: int) -> None:
        """A call came to its end."""
        labels = (place.model, place.op)
        self._requests.labels(*labels, str(status)).inc()
        for stage, seconds in place.stages.items():
            self._stages.labels(*labels, stage).observe(seconds)
        self._received.labels(*labels).inc(bytes_in)
        self._sent.labels(*labels).inc(bytes_out)

    def batch_done(self, model: str, op: Op, pictures: int, seconds: float) -> None:
        """A VAE has worked on so many pictures at once."""
        self._batches.labels(model, op).observe(pictures)
        self._work.labels(model, op).inc(seconds)

    def out_of_memory(self, model: str, op: Op) -> None:
        """A device had no memory for a call, or for its batch."""
        self._no_memory.labels(model, op).inc()

    # --- the app's ------------------------------------------------------------------------------------------------------

    def refused(self, route: str, status: int) -> None:
        """A request was refused by its head, before it was anybody's call."""
        self._requests.labels("", route, str(status)).inc()

    def text(self, health: Mapping[str, Any]) -> tuple[bytes, str]:
        """What Prometheus reads, and its content type. ``health``: how many calls are running and waiting."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        self._running.set(float(health["running"]))
        self._waiting.set(float(health["waiting"]))
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

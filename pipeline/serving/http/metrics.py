"""Metrics of the scoring service for Prometheus, at `GET /metrics`.

A scrape reaches one replica, and the next scrape perhaps another. So every series carries the replica's name, and the
counters of two replicas are never mixed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serving.scoring_service import ScoringService

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class ServiceMetrics:
    """The metrics of one replica."""

    def __init__(self, service: ScoringService, *, replica: str) -> None:
        self.replica = replica
        self._registry = CollectorRegistry()
        self._registry.register(ServiceCollector(service, replica))
        self.requests = Counter(
            "vrm_requests", "HTTP requests.", ["route", "status", "replica"], registry=self._registry
        )
        self.seconds = Histogram(
            "vrm_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["route", "replica"],
            buckets=SECONDS,
            registry=self._registry,
        )

    def text(self) -> str:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry).decode()


class ServiceCollector(Collector):
    """Reads the service's own counts at each scrape, so that the scoring code need not know of Prometheus."""

    def __init__(self, service: ScoringService, replica: str) -> None:
        self._service = service
        self._replica = replica

    def collect(self) -> Iterator[Metric]:
        service, labels, values = self._service, ["replica"], [self._replica]
        counts = service.counts

        pending = GaugeMetricFamily("vrm_pending_rows", "Responses that wait to be scored.", labels=labels)
        pending.add_metric(values, service.admission.pending_rows)
        yield pending

        cached = GaugeMetricFamily("vrm_cache_entries", "Scores remembered.", labels=labels)
        cached.add_metric(values, len(service.cache))
        yield cached

        lookups = CounterMetricFamily("vrm_cache_lookups", "Responses looked up.", labels=["result", *labels])
        lookups.add_metric(["hit", *values], service.cache.hits)
        lookups.add_metric(["miss", *values], service.cache.misses)
        yield lookups

        reward = SummaryMetricFamily("vrm_reward", "Posterior mean of every response scored.", labels=labels)
        reward.add_metric(values, counts.rows, counts.reward_sum)
        yield reward

        reward_std = SummaryMetricFamily("vrm_reward_std", "Posterior standard deviation of the same.", labels=labels)
        reward_std.add_metric(values, counts.rows, counts.reward_std_sum)
        yield reward_std

        model = InfoMetricFamily("vrm_model", "The model that is served.", labels=labels)
        model.add_metric(values, {"fingerprint": service.fingerprint, "head": service.model.head})
        yield model


class Measured:
    """Counts and times each HTTP request under the pattern of its route; all unknown paths are one route."""

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = "none", time.perf_counter()

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        finally:
            route = scope["route"].path if "route" in scope else "other"
            self._metrics.requests.labels(route, status, self._metrics.replica).inc()
            self._metrics.seconds.labels(route, self._metrics.replica).observe(time.perf_counter() - started)

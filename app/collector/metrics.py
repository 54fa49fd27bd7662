"""Metrics for Prometheus, on a separate port. No label contains what a client sent."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.collector.health import Health
from app.collector.inbox import Inbox
from app.collector.outcomes import Outcomes

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


def commits(registry: CollectorRegistry | None) -> Histogram:
    """Return the histogram of the seconds that commits take; without a registry it is not shown."""
    return Histogram(
        "consentos_collector_commit_seconds",
        "How long the successful commits of heartbeats took.",
        buckets=_BUCKETS,
        registry=registry,
    )


def register(
    registry: CollectorRegistry, *, outcomes: Outcomes, inbox: Inbox, health: Health
) -> None:
    """Add the metrics of requests, inbox, counting and process to ``registry``."""
    registry.register(_Numbers(outcomes, inbox, health))
    ProcessCollector(registry=registry)


def listen(registry: CollectorRegistry, host: str, port: int) -> None:
    """Serve the metrics of ``registry`` on a port, in threads that end with the process.

    Raises:
        OSError: the port cannot be listened on.
    """
    start_http_server(port, host, registry)


class _Numbers(Collector):
    """Reads each number when it is requested."""

    def __init__(self, outcomes: Outcomes, inbox: Inbox, health: Health) -> None:
        self._outcomes = outcomes
        self._inbox = inbox
        self._health = health

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "consentos_collector_requests",
            "Requests to store a heartbeat since the process began, by outcome.",
            labels=["outcome"],
        )
        for outcome, count in self._outcomes.totals().items():
            requests.add_metric([outcome], count)
        yield requests
        yield GaugeMetricFamily(
            "consentos_collector_inbox_waiting",
            "Heartbeats and deletions that wait for their commit.",
            self._inbox.waiting,
        )
        yield GaugeMetricFamily(
            "consentos_collector_ready",
            "1 if /readyz answers 200, 0 if it answers 503.",
            0 if self._health.reasons() else 1,
        )
        age = self._health.counted_for
        if age is not None:
            yield GaugeMetricFamily(
                "consentos_collector_counted_age_seconds",
                "Seconds since the end of the last counted day.",
                age,
            )

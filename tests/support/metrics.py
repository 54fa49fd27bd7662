"""A collector's metrics."""

import httpx
from prometheus_client.parser import text_string_to_metric_families


def samples(port: int) -> dict[str, float]:
    """Return each metric of a port by its name and label."""
    found = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
    return {
        "/".join((sample.name, *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(found.text)
        for sample in family.samples
    }


def waiting(port: int) -> float:
    """Return how many heartbeats and deletions wait in the collector's inbox."""
    return samples(port)["consentos_collector_inbox_waiting"]

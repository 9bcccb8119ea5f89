"""Reads values back out of metrics, so that whoever shows them agrees with Prometheus."""

from __future__ import annotations

from prometheus_client.registry import Collector


def by_label(collector: Collector, suffix: str = "") -> dict[str, float]:
    """A metric's values by its last label, "" where it has none; `suffix` picks a histogram's sums."""
    values = {}
    for family in collector.collect():
        for sample in family.samples:
            if sample.name.endswith("_created") or (suffix and not sample.name.endswith(suffix)):
                continue
            values[next(reversed(sample.labels.values()), "")] = sample.value
    return values

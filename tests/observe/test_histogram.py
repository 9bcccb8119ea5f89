"""The array histogram exposes what prometheus_client's own would."""

from __future__ import annotations

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from daemon.observe.histogram import ArrayHistogram

BUCKETS = (0, 1, 3, 10.5)
VALUES = [0, 0.5, 1, 1, 2.5, 3, 10.5, 11, 1e9]


def samples(registry: CollectorRegistry) -> set[tuple[str, tuple[tuple[str, str], ...], float]]:
    """The samples of a scrape, without the times when a series began."""
    return {
        (sample.name, tuple(sorted(sample.labels.items())), sample.value)
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@pytest.mark.parametrize("label", [None, "layer"])
def test_it_exposes_what_one_observation_at_a_time_would(label):
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    names = (label,) if label else ()
    histogram = ArrayHistogram("things", "Some.", names, buckets=BUCKETS, registry=ours)
    oracle = Histogram("things", "Some.", names, buckets=BUCKETS, registry=theirs)
    if label:
        histogram, oracle = histogram.labels("7"), oracle.labels("7")
    for value in VALUES:
        oracle.observe(value)
    histogram.observe(np.array(VALUES[:4]))
    histogram.observe(VALUES[4:-1])
    histogram.observe([])
    histogram.observe(VALUES[-1])
    assert samples(ours) == samples(theirs)

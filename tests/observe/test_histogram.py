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
    histogram = ArrayHistogram("things", "Some.", BUCKETS, label, registry=ours)
    oracle = Histogram("things", "Some.", (label,) if label else (), buckets=BUCKETS, registry=theirs)
    for value in VALUES:
        (oracle.labels("7") if label else oracle).observe(value)
    name = ("7",) if label else ()
    histogram.observe(np.array(VALUES[:4]), *name)
    histogram.observe(VALUES[4:], *name)
    assert samples(ours) == samples(theirs)


def test_without_a_label_it_starts_at_zero():
    registry = CollectorRegistry()
    ArrayHistogram("things", "Some.", BUCKETS, registry=registry)
    assert registry.get_sample_value("things_count") == 0
    assert registry.get_sample_value("things_bucket", {"le": "+Inf"}) == 0


def test_a_name_is_registered_once():
    registry = CollectorRegistry()
    ArrayHistogram("things", "Some.", BUCKETS, registry=registry)
    with pytest.raises(ValueError, match="Duplicated"):
        ArrayHistogram("things", "Some.", BUCKETS, registry=registry)

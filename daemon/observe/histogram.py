"""A Prometheus histogram that takes arrays: one step for the many observations of a device batch.

Knows nothing about what is observed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, metrics
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class ArrayHistogram(Collector):
    """Registers itself as `name`, with at most one label. Safe to observe and to scrape from any thread.

    Each series tells when it began, as prometheus_client's own do, unless that was told not to.
    """

    def __init__(
        self,
        name: str,
        text: str,
        buckets: tuple[float, ...],
        label: str | None = None,
        *,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._name = name
        self._text = text
        self._bounds = np.array([*buckets, np.inf])
        self._label = label
        self._lock = threading.Lock()
        self._counts: dict[str, npt.NDArray[np.int64]] = {}  # by value of the label, a count per bucket
        self._sums: dict[str, float] = {}
        self._created: dict[str, float] = {}  # Unix time
        self._clock = clock
        if label is None:
            self.observe([])  # a series that starts at 0 has a rate from its first event on
        registry.register(self)

    def observe(self, values: npt.ArrayLike, label: str = "") -> None:
        """Count (n,) finite values under one value of the label."""
        numbers = np.asarray(values, np.float64)
        buckets = np.searchsorted(self._bounds, numbers)  # the first whose upper bound holds the value
        counts = np.bincount(buckets, minlength=len(self._bounds))
        with self._lock:
            self._counts[label] = counts + self._counts.get(label, 0)
            self._sums[label] = float(numbers.sum()) + self._sums.get(label, 0.0)
            self._created.setdefault(label, self._clock())

    def describe(self) -> Iterator[HistogramMetricFamily]:
        yield HistogramMetricFamily(self._name, self._text, labels=self._labels)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The observations so far, in the exposition's terms: cumulative counts by upper bound."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        with self._lock:
            counts, sums, created = dict(self._counts), dict(self._sums), dict(self._created)
        for label, count in counts.items():
            labels = [label] if self._label else []
            bounds = map(floatToGoString, self._bounds)
            buckets = list(zip(bounds, np.cumsum(count).tolist(), strict=True))
            family.add_metric(labels, buckets, sums[label])
            if getattr(metrics, "_use_created", True):
                named = dict(zip(self._labels, labels, strict=True))
                family.add_sample(f"{self._name}_created", named, created[label])
        yield family

    @property
    def _labels(self) -> list[str]:
        return [self._label] if self._label else []

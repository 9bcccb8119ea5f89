"""A Prometheus histogram that takes arrays: one step for the many observations of a device batch.

Knows nothing about what is observed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from prometheus_client import Histogram


class ArrayHistogram(Histogram):
    """`prometheus_client.Histogram`, but `observe` takes (n,) finite values."""

    def observe(self, amount: npt.ArrayLike, exemplar: dict[str, str] | None = None) -> None:
        """Count the values, in the sum and the counts per bucket that the base class keeps."""
        values = np.atleast_1d(np.asarray(amount, np.float64))
        places = np.searchsorted(self._upper_bounds, values)  # the first bucket that holds the value
        self._sum.inc(float(values.sum()))
        for bucket, count in zip(
            self._buckets, np.bincount(places, minlength=len(self._buckets)), strict=True
        ):
            if count:
                bucket.inc(int(count))

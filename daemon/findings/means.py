"""Means over pairs with 95% intervals that respect clusters, many columns at once.

Student's t with the cluster-robust error of a ratio of totals: the regression of `regression.py` on an
intercept alone, so that a difference as it is, at equal length and among pairs of equal length are judged
alike. `STATISTICS.md` has its coverage beside that of five cluster bootstraps, which cover less where a
feature is rare.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from daemon.findings.results import FloatArray
from daemon.findings.sparse import Columns, sums, sums_of_powers

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Intervals:
    """k numbers with their 95% intervals; NaN where there are none."""

    value: FloatArray
    low: FloatArray
    high: FloatArray

    def where(self, enough: npt.NDArray[np.bool_]) -> Intervals:
        """Blank the intervals elsewhere: too little is known there."""
        return Intervals(self.value, np.where(enough, self.low, np.nan), np.where(enough, self.high, np.nan))


def mean_intervals(totals: Columns, sizes: FloatArray) -> Intervals:
    """Return the mean over pairs of each of k columns: `totals` (clusters, k) over `sizes` (clusters,) pairs.

    Liang and Zeger (1986), as CR1 with G - 1 degrees of freedom for G clusters that have pairs.
    """
    k, n, clusters = totals.shape[1], float(sizes.sum()), np.count_nonzero(sizes)
    value = sums(totals) / n if n else np.full(k, np.nan)
    if clusters < 2:
        return Intervals(value, np.full(k, np.nan), np.full(k, np.nan))
    squares = sums_of_powers(totals, 2)
    # sum over clusters of (total - value * size)^2
    spread = squares - 2 * value * (totals.T @ sizes) + value**2 * (sizes**2).sum()
    spread[spread < 1e-12 * squares] = 0  # rounding alone
    error = np.sqrt(spread * clusters / (clusters - 1)) / n
    reach = special.stdtrit(clusters - 1, (1 + CONFIDENCE) / 2) * error
    return Intervals(value, value - reach, value + reach)

"""Intervals by the cluster bootstrap: clusters, not pairs, are drawn again.

Field and Welsh (2007). Every feature is estimated from the same draws, so that a whole dictionary is one
product of a sparse matrix with the draws' weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import special

from daemon.findings.results import FloatArray
from daemon.findings.sparse import Columns, sums, sums_of_powers

CONFIDENCE = 0.95
COLUMNS_AT_ONCE = 1024  # bounds the memory of the draws


@dataclass(frozen=True, slots=True)
class Intervals:
    """k numbers with their 95% intervals; NaN where there are none."""

    value: FloatArray
    low: FloatArray
    high: FloatArray


@lru_cache(maxsize=2)
def bootstrap_weights(n_clusters: int, resamples: int, seed: int) -> npt.NDArray[np.float32]:
    """Return how often each resample draws each cluster: (n_clusters, resamples)."""
    rng = np.random.default_rng(seed)
    weights = np.empty((resamples, n_clusters), dtype=np.float32)
    for resample in weights:
        resample[:] = np.bincount(rng.integers(0, n_clusters, n_clusters), minlength=n_clusters)
    transposed = np.ascontiguousarray(weights.T)
    transposed.flags.writeable = False
    return transposed


def mean_intervals(totals: Columns, sizes: FloatArray, weights: npt.NDArray[np.float32]) -> Intervals:
    """Return the mean over pairs of each of k columns: `totals` (clusters, k) over `sizes` (clusters,) pairs.

    Bias-corrected and accelerated (Efron 1987); the acceleration is the skewness of the clusters' influence.
    """
    k = totals.shape[1]
    n = float(sizes.sum())
    clusters = np.count_nonzero(sizes)
    if clusters < 2:
        value = sums(totals) / n if n else np.full(k, np.nan)
        return Intervals(value, np.full(k, np.nan), np.full(k, np.nan))
    value = sums(totals) / n
    acceleration = _skewness(totals, sizes, value) / 6
    drawn = sizes.astype(np.float32) @ weights  # pairs in each resample
    low, high = np.empty(k), np.empty(k)
    single = totals.astype(np.float32)
    for first in range(0, k, COLUMNS_AT_ONCE):
        part = slice(first, first + COLUMNS_AT_ONCE)
        with np.errstate(divide="ignore", invalid="ignore"):
            means = (single[:, part].T @ weights) / drawn
        low[part], high[part] = _bca(means[:, drawn > 0], value[part], acceleration[part])
    return Intervals(value, low, high)


def _skewness(totals: Columns, sizes: FloatArray, value: FloatArray) -> FloatArray:
    """Return sum u^3 / (sum u^2)^(3/2) of the influence u = total - value * size of each cluster (k,)."""
    squares = sums_of_powers(totals, 2)
    second = squares - 2 * value * (totals.T @ sizes) + value**2 * (sizes**2).sum()
    third = (
        sums_of_powers(totals, 3)
        - 3 * value * (totals.power(2).T @ sizes)
        + 3 * value**2 * (totals.T @ sizes**2)
        - value**3 * (sizes**3).sum()
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        skewness = third / second**1.5
    return np.where(second > 1e-12 * squares, skewness, 0.0)


def _bca(means: FloatArray, value: FloatArray, acceleration: FloatArray) -> tuple[FloatArray, FloatArray]:
    draws = means.shape[1]
    below = (means < value[:, None].astype(means.dtype)).sum(axis=1)
    equal = (means == value[:, None].astype(means.dtype)).sum(axis=1)
    share = np.clip((below + equal / 2) / draws, 0.5 / draws, 1 - 0.5 / draws)
    bias = special.ndtri(share)
    means.sort(axis=1)
    ends = []
    for probability in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2):
        z = bias + special.ndtri(probability)
        at = special.ndtr(bias + z / (1 - acceleration * z))
        place = np.clip(at * (draws + 1) - 1, 0, draws - 1)
        lower = np.floor(place).astype(np.int64)
        upper = np.minimum(lower + 1, draws - 1)
        rows = np.arange(len(means))
        ends.append(means[rows, lower] + (place - lower) * (means[rows, upper] - means[rows, lower]))
    return ends[0].astype(np.float64), ends[1].astype(np.float64)

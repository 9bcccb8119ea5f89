"""The matched-pairs rank-biserial correlation with its interval.

(sum of positive ranks - sum of negative ranks) / sum of ranks (Kerby 2014): nearly the share of couples of
pairs whose differences add up to more than zero, less the share that add up to less (Tukey's Walsh averages).
Its error is that of a U-statistic (Hoeffding 1948), by clusters.
"""

from __future__ import annotations

import numpy as np
from scipy import special

from daemon.findings.means import CONFIDENCE, Intervals
from daemon.findings.paired_tests import RankedColumns
from daemon.findings.results import FloatArray, IntArray
from daemon.findings.sparse import (
    Columns,
    column_numbers,
    fires,
    stored,
    sum_rows,
    sums,
    sums_of_powers,
    with_values,
)


def rank_biserials(
    differences: Columns, ranked: RankedColumns, cluster: IntArray, n_clusters: int
) -> Intervals:
    """Return the rank-biserial of each column's nonzero differences (n, k); NaN where there are none."""
    count = stored(differences).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = sums(ranked.ranks) / (count * (count + 1) / 2)
    influence = projections(differences, ranked)
    by_cluster = sum_rows(influence, cluster, n_clusters)
    sizes = sum_rows(fires(differences), cluster, n_clusters)
    mean = np.divide(sums(influence), count, out=np.zeros_like(count), where=count > 0)
    # sum over clusters of (total - mean * size)^2
    squares = (
        sums_of_powers(by_cluster, 2)
        - 2 * mean * sums(by_cluster.multiply(sizes).tocsc())
        + mean**2 * sums_of_powers(sizes, 2)
    )
    informative = stored(sizes)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = 4 * np.maximum(squares, 0) / count**2 * informative / (informative - 1)
    return _score_intervals(value, variance, informative.astype(np.float64))


def projections(differences: Columns, ranked: RankedColumns) -> Columns:
    """Return for each difference the mean sign of its sum with every other of its column."""
    column, runs, run = column_numbers(differences), ranked.runs, ranked.runs.run
    sign = np.sign(differences.data)
    before = np.concatenate([[0.0], np.cumsum(sign)])
    end = runs.first + runs.length
    smaller = runs.first[run] - differences.indptr[column]  # sizes below, whose sum takes this one's sign
    larger = before[differences.indptr[1:][column]] - before[end[run]]  # signs of sizes above
    alike = (runs.length[run] + sign * (before[end] - before[runs.first])[run]) / 2  # same size, same sign
    return with_values(differences, (sign * (smaller + alike) + larger) / stored(differences)[column])


def _score_intervals(value: FloatArray, variance: FloatArray, clusters: FloatArray) -> Intervals:
    """Wilson's score interval (1927) of the share (1 + value) / 2, at the size that explains its variance.

    With Student's t for few clusters.
    """
    share = (1 + value) / 2
    z = special.stdtrit(np.maximum(clusters - 1, 1), (1 + CONFIDENCE) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        explained = share * (1 - share) / (variance / 4)
    # All signs alike leave no variance: then the size is the number of clusters.
    size = np.where(np.isfinite(explained), explained, clusters)
    size = np.clip(size, 1, 4 * np.maximum(clusters, 1))
    middle = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    reach = z / (1 + z**2 / size) * np.sqrt(share * (1 - share) / size + z**2 / (4 * size**2))
    enough = clusters >= 2
    low = np.where(enough, 2 * (middle - reach) - 1, np.nan)
    high = np.where(enough, 2 * (middle + reach) - 1, np.nan)
    return Intervals(value, np.minimum(low, value), np.maximum(high, value))

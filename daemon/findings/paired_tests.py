"""Tests of paired differences, many features at once: firing by McNemar, magnitude by Wilcoxon.

Both are one test: a sum of signed numbers, whose signs are random under the null hypothesis that the two
labels of a pair could be swapped. Where every pair is a cluster of its own they are exact McNemar (McNemar
1947, as a binomial test) and Wilcoxon's signed-rank test (Wilcoxon 1945) with zeros dropped, as
`scipy.stats.wilcoxon` computes it. Where pairs share a cluster, pairs are not independent: the numbers are
summed within clusters and the sum is compared with the sum of their squares, which is its exact variance when
signs of whole clusters are random: clustered McNemar (Durkalski et al. 2003) and clustered signed ranks
(Rosner, Glynn and Lee 2006), with a continuity correction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import special

from daemon.findings.results import BoolArray, FloatArray, IntArray
from daemon.findings.sparse import (
    Columns,
    Runs,
    column_numbers,
    ordered_by,
    runs_of,
    signs,
    stored,
    sum_rows,
    sums_of_powers,
    with_values,
)

EXACT_UP_TO = 50  # differences without ties, as scipy does
EXACT_TIED_UP_TO = 13  # with ties


@dataclass(frozen=True, slots=True)
class RankedColumns:
    """Differences by rank of size; arrays have one entry for each of k columns."""

    ranks: Columns  # (n, k) rank of |difference| among those that are not zero, with the difference's sign
    runs: Runs  # of equal sizes
    tied: BoolArray  # (k,) whether two sizes are equal


def by_size(differences: Columns) -> Columns:
    """Return the same columns with the stored values in the order of their sizes, as ranking needs them."""
    return ordered_by(differences, np.abs(differences.data))


def signed_ranks(differences: Columns) -> RankedColumns:
    """Rank the sizes of each column's values, which are `by_size`; equal sizes share their mean rank."""
    runs = runs_of(differences, np.abs(differences.data))
    column = column_numbers(differences)
    ranks = (runs.mean_place - differences.indptr[column]) * np.sign(differences.data)
    tied = np.zeros(differences.shape[1], dtype=bool)
    tied[column[runs.first[runs.length > 1]]] = True
    return RankedColumns(with_values(differences, ranks), runs, tied)


@dataclass(frozen=True, slots=True)
class SignFlipTests:
    """The two tests of k features, prepared so that labels can be swapped again and again."""

    firing: Columns  # (clusters, k) negative texts that fire - positive ones
    ranks: Columns  # (clusters, k) signed ranks, summed
    tied: BoolArray  # (k,)
    clustered: bool  # whether a cluster has several pairs

    def p_values(self, flips: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
        """Return the p-values of firing and of magnitude: (k,), or (k, draws) under flips (clusters, draws).

        A feature without informative clusters has 1.
        """
        if flips is None:
            flips = np.ones((self.firing.shape[0], 1))
            firing, ranks = self._firing_p(flips), self._ranks_p(flips)
            return firing[:, 0], ranks[:, 0]
        return self._firing_p(flips), self._ranks_p(flips)

    def informative(self) -> tuple[IntArray, IntArray]:
        """Return how many clusters say something about firing, and about magnitude: (k,) each."""
        return stored(self.firing), stored(self.ranks)

    def _firing_p(self, flips: FloatArray) -> FloatArray:
        total = self.firing.T @ flips
        if self.clustered:
            return _normal_p(np.abs(total) - 1, sums_of_powers(self.firing, 2)[:, None])
        return mcnemar_p(total, stored(self.firing)[:, None])

    def _ranks_p(self, flips: FloatArray) -> FloatArray:
        total = self.ranks.T @ flips
        squares = sums_of_powers(self.ranks, 2)[:, None]
        if self.clustered:
            return _normal_p(np.abs(total) - 1, squares)
        p = _normal_p(np.abs(total), squares)
        count = stored(self.ranks)
        few = np.flatnonzero(~self.tied & (count <= EXACT_UP_TO))
        if len(few):
            table = _signed_rank_table()
            n = count[few][:, None]
            smaller = np.rint((n * (n + 1) / 2 - np.abs(total[few])) / 2).astype(np.int64)
            p[few] = np.minimum(1, 2 * table[n, smaller])
        for column in np.flatnonzero(self.tied & (count <= EXACT_TIED_UP_TO)):
            stored_ranks = self.ranks.data[self.ranks.indptr[column] : self.ranks.indptr[column + 1]]
            p[column] = _tied_p(np.abs(stored_ranks), total[column])
        return p


def sign_flip_tests(
    firing: Columns, differences: Columns, cluster: IntArray, n_clusters: int
) -> tuple[SignFlipTests, RankedColumns]:
    """Prepare both tests of differences (n, k) that are `by_size`; also return the ranks of the pairs."""
    ranked = signed_ranks(differences)
    tests = SignFlipTests(
        firing=sum_rows(firing, cluster, n_clusters),
        ranks=sum_rows(ranked.ranks, cluster, n_clusters),
        tied=ranked.tied,
        clustered=bool(len(cluster)) and int(np.bincount(cluster[cluster >= 0], minlength=1).max()) > 1,
    )
    return tests, ranked


def wilcoxon_only(differences: Columns, cluster: IntArray, n_clusters: int) -> tuple[FloatArray, IntArray]:
    """Return p (k,) of magnitude alone and the number of informative clusters (k,), of values `by_size`."""
    tests, _ = sign_flip_tests(signs(differences), differences, cluster, n_clusters)
    return tests.p_values()[1], stored(tests.ranks)


def mcnemar_p(total: npt.NDArray[np.floating], discordant: IntArray) -> FloatArray:
    """Return exact two-sided p of `total` = plus - minus among `discordant` = plus + minus pairs."""
    fewer = np.rint((discordant - np.abs(total)) / 2)
    p: FloatArray = np.minimum(1, 2 * special.bdtr(fewer, np.broadcast_to(discordant, total.shape), 0.5))
    return np.where(discordant > 0, p, 1.0)


def _normal_p(size: FloatArray, variance: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.maximum(size, 0) / np.sqrt(variance)
    return np.where(variance > 0, 2 * special.ndtr(-z), 1.0)


@lru_cache(maxsize=1)
def _signed_rank_table() -> FloatArray:
    """Return P(sum of positive ranks <= t) at [n, t] for n up to EXACT_UP_TO."""
    largest = EXACT_UP_TO * (EXACT_UP_TO + 1) // 2
    table = np.ones((EXACT_UP_TO + 1, largest + 1))
    mass = np.zeros(largest + 1)
    mass[0] = 1
    for n in range(1, EXACT_UP_TO + 1):
        shifted = np.zeros_like(mass)
        shifted[n:] = mass[: largest + 1 - n]
        mass = (mass + shifted) / 2
        table[n] = np.cumsum(mass)
    return table


def _tied_p(ranks: FloatArray, total: FloatArray) -> FloatArray:
    """Return exact p (draws,) of sums `total` of few tied ranks, by the distribution over all signs."""
    doubled = np.rint(2 * ranks).astype(np.int64)  # mean ranks are halves
    mass = np.ones(1)
    for rank in doubled:
        mass = (np.append(mass, np.zeros(rank)) + np.append(np.zeros(rank), mass)) / 2
    at_most = np.cumsum(mass)
    smaller = np.rint((doubled.sum() - np.abs(2 * total)) / 2).astype(np.int64)
    p: FloatArray = np.minimum(1, 2 * at_most[smaller])
    return p

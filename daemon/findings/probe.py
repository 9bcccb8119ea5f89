"""How well a linear probe tells the two texts of a held-out pair apart.

Sees differences only. Every pair gives one difference, negative - positive, with the label 1; its mirror with
the label -1 adds nothing to a probe without intercept, so neither side is favoured and chance is exactly one
half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.sparse
from scipy import special

from daemon.findings.means import CONFIDENCE
from daemon.findings.results import Estimate, FloatArray, IntArray, Pairs, ProbeResult

Float32Array: TypeAlias = npt.NDArray[np.float32]

FOLDS = 5
MIN_CLUSTERS = 20
PENALTIES = (1e-2, 1e-1, 1.0)  # times the mean squared singular value
MAX_WIDTH = 2048  # where there are more pairs and more regressors: those regressors that most pairs have
MAX_ENTRIES = 2**26  # of pairs times regressors, 256 MiB: with more pairs fewer regressors are kept
MIN_WIDTH = 256
MOST_REPEATS = 10  # divisions into folds
LEAST_REPEATS = 3
REPEATED_PAIRS = 10_000  # pairs times divisions, about: of many pairs the division matters less


def probe_pairs(differences: Any, pairs: Pairs, name: str, seed: int = 0) -> ProbeResult:
    """Cross-validate a ridge probe on within-pair differences (n, d), dense or CSR, by clusters.

    Least squares to the labels is the direction of linear discriminant analysis (Fisher 1936), ridge its
    regularised form (Friedman 1989). Of five folds of whole clusters each is held out once; the penalty is
    the one that does best on the next fold when trained on the other three. A pair is told rightly where the
    probe's value is above zero; a tie counts half. The accuracy is the mean over several divisions into
    folds, which the numbers of the clusters decide and not the order of the pairs.
    """
    n, matched = pairs.n, int(pairs.matched.sum())
    if pairs.n_clusters < MIN_CLUSTERS:
        reason = (
            f"too few pairs: {pairs.n_clusters} with different references, at least {MIN_CLUSTERS} needed"
        )
        return ProbeResult(name, None, None, n, matched, reason)
    x = _regressors(differences)
    finite = np.isfinite(x).all(axis=1)
    if not finite.all():
        reason = f"{int((~finite).sum())} of {n} differences are not finite"
        return ProbeResult(name, None, None, n, matched, reason)
    order = _order(x, pairs)
    x, cluster, equal = x[order], pairs.cluster[order], pairs.matched[order]
    repeats = int(np.clip(REPEATED_PAIRS // n, LEAST_REPEATS, MOST_REPEATS))
    rng = np.random.default_rng([seed, 2])
    folds = [rng.permutation(pairs.n_clusters)[cluster] % FOLDS for _ in range(repeats)]
    correct = np.array([_told(score) for score in _held_out_scores(x, folds)])
    return ProbeResult(
        name=name,
        accuracy=share_with_interval(correct, cluster),
        matched=share_with_interval(correct[:, equal], cluster[equal]),
        n=n,
        n_matched=matched,
    )


def share_with_interval(correct: FloatArray, cluster: IntArray) -> Estimate | None:
    """Return the mean of `correct` (divisions, n) with Wilson's interval (1927) at the effective size (Korn
    and Graubard 1998).

    The effective size is that of independent pairs whose mean has the variance that is seen: of one division,
    by clusters and no less than that of independent pairs, and that of the divisions' mean.
    """
    divisions, n = correct.shape
    if n == 0:
        return None
    share, size = float(correct.mean()), float(n)
    independent = share * (1 - share) / n
    if 0 < share < 1:
        seen = [max(_variance(one, cluster), independent) for one in correct]
        between = float(correct.mean(axis=1).var(ddof=1)) / divisions if divisions > 1 else 0.0
        size = share * (1 - share) / (float(np.mean(seen)) + between)
    size = max(size, 1.0)
    z = float(special.ndtri((1 + CONFIDENCE) / 2))
    middle = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    reach = z / (1 + z**2 / size) * np.sqrt(share * (1 - share) / size + z**2 / (4 * size**2))
    return Estimate(share, max(0.0, float(middle - reach)), min(1.0, float(middle + reach)))


def _variance(correct: FloatArray, cluster: IntArray) -> float:
    """Return the variance of the mean (n,) by clusters; 0 where each is of one pair."""
    n, share = len(correct), float(correct.mean())
    _, numbered = np.unique(cluster, return_inverse=True)
    clusters = int(numbered.max()) + 1
    if not 1 < clusters < n:
        return 0.0
    totals = np.bincount(numbered, correct - share)
    return float((totals**2).sum() / n**2 * clusters / (clusters - 1))


def _order(x: Float32Array, pairs: Pairs) -> IntArray:
    """Return the order of the pairs by cluster and content, so that sums don't depend on that of folders."""
    order: IntArray = np.lexsort(
        (x.sum(axis=1), x[:, 0] if x.shape[1] else pairs.d_tokens, pairs.d_tokens, pairs.cluster)
    )
    return order


def _regressors(differences: Any) -> Float32Array:
    """Return dense (n, d); of sparse columns, which may be very many, the most frequent.

    Dense columns are scaled to a mean square of 1, which knows no label; activations have one unit already.
    """
    if scipy.sparse.issparse(differences):
        columns = differences.tocsc()
        count = np.diff(columns.indptr)
        width = max(MIN_WIDTH, MAX_ENTRIES // columns.shape[0])
        width = width if columns.shape[0] <= MAX_WIDTH else min(width, MAX_WIDTH)
        widest = np.sort(np.argsort(-count, kind="stable")[:width])
        sparse: Float32Array = columns[:, widest[count[widest] > 0]].astype(np.float32).toarray()
        return sparse
    x = np.asarray(differences, dtype=np.float64).reshape(len(differences), -1)
    scale = np.sqrt((x**2).mean(axis=0))
    scaled: Float32Array = (x[:, scale != 0] / scale[scale != 0]).astype(np.float32)
    return scaled


def _held_out_scores(x: Float32Array, folds: list[IntArray]) -> Iterator[FloatArray]:
    """Yield for each division the value of each pair's difference, from the probe without its fold."""
    kernel = x @ x.T if x.shape[1] > len(x) else None
    for fold in folds:
        if x.shape[1] == 0:
            yield np.zeros(len(x))
        else:
            yield _scores(_Primal.of(x, fold) if kernel is None else _Dual(x, fold, kernel), fold)


def _scores(fits: _Primal | _Dual, fold: IntArray) -> FloatArray:
    score = np.zeros(len(fold))
    for held_out in range(FOLDS):
        inner = (held_out + 1) % FOLDS
        scores = [fits.score((held_out, inner), inner, penalty) for penalty in PENALTIES]
        right = [float(_told(values).mean()) for values in scores]
        # Of penalties that do equally well the largest.
        best = max(range(len(PENALTIES)), key=lambda at: (right[at], PENALTIES[at]))
        score[fold == held_out] = fits.score((held_out,), held_out, PENALTIES[best])
    return score


def _told(score: FloatArray) -> FloatArray:
    return np.where(score == 0, 0.5, score > 0).astype(np.float64)


@dataclass(frozen=True, slots=True)
class _Primal:
    """Solves (X'X + penalty) w = X'1, from one Gram matrix for each fold."""

    x: Float32Array
    fold: IntArray
    grams: tuple[Float32Array, ...]
    targets: tuple[Float32Array, ...]

    @classmethod
    def of(cls, x: Float32Array, fold: IntArray) -> _Primal:
        parts = [x[fold == each] for each in range(FOLDS)]
        return cls(x, fold, tuple(p.T @ p for p in parts), tuple(p.sum(axis=0) for p in parts))

    def score(self, without: tuple[int, ...], tested: int, penalty: float) -> FloatArray:
        """Return the values of the tested fold's pairs, trained on all folds but `without`."""
        trained = [each for each in range(FOLDS) if each not in without]
        gram = self.grams[trained[0]].copy()
        for each in trained[1:]:
            gram += self.grams[each]
        target = np.sum([self.targets[each] for each in trained], axis=0)
        values: FloatArray = (self.x[self.fold == tested] @ _solve(gram, target, penalty)).astype(np.float64)
        return values


@dataclass(frozen=True, slots=True)
class _Dual:
    """Solves (XX' + penalty) a = 1, w = X'a: the same probe, from a matrix of pairs."""

    x: Float32Array
    fold: IntArray
    kernel: Float32Array  # (n, n)

    def score(self, without: tuple[int, ...], tested: int, penalty: float) -> FloatArray:
        """Return the values of the tested fold's pairs, trained on all folds but `without`."""
        train, test = np.flatnonzero(~np.isin(self.fold, without)), np.flatnonzero(self.fold == tested)
        weights = _solve(self.kernel[np.ix_(train, train)], np.ones(len(train), np.float32), penalty)
        values: FloatArray = (self.kernel[np.ix_(test, train)] @ weights).astype(np.float64)
        return values


def _solve(matrix: Float32Array, target: Float32Array, penalty: float) -> Float32Array:
    """Solve by Cholesky, overwriting the matrix."""
    scale = max(float(np.trace(matrix)) / len(matrix), 1e-6)
    matrix[np.diag_indices(len(matrix))] += np.float32(penalty * scale)
    # Transposed, which a symmetric matrix does not mind, so that LAPACK need not copy it.
    factor = scipy.linalg.cho_factor(matrix.T, overwrite_a=True, check_finite=False)
    solved: Float32Array = scipy.linalg.cho_solve(factor, target, check_finite=False)
    return solved

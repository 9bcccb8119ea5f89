"""How well a linear probe tells the two texts of a held-out pair apart.

Sees differences only. Every pair gives one difference, negative - positive, with the label 1; its mirror with
the label -1 adds nothing to a probe without intercept, so neither side is favoured and chance is exactly one
half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.sparse
from scipy import special

from daemon.findings.results import Estimate, FloatArray, IntArray, Pairs, ProbeResult

Float32Array: TypeAlias = npt.NDArray[np.float32]

FOLDS = 5
MIN_CLUSTERS = 20
PENALTIES = (1e-2, 1e-1, 1.0)  # times the mean squared singular value
MAX_WIDTH = 2048  # where there are more pairs and more regressors: those regressors that most pairs have
MAX_ENTRIES = 2**26  # of pairs times regressors, 256 MiB: with more pairs fewer regressors are kept
MIN_WIDTH = 256


def probe_pairs(differences: Any, pairs: Pairs, name: str, seed: int = 0) -> ProbeResult:
    """Cross-validate a ridge probe on within-pair differences (n, d), dense or CSR, by clusters.

    Least squares to the labels is the direction of linear discriminant analysis (Fisher 1936), ridge its
    regularised form (Friedman 1989). Of five folds of whole clusters each is held out once; the penalty is
    the one that does best on the next fold when trained on the other three. A pair is told rightly where the
    probe's value is above zero; a tie counts half.
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
    fold = np.random.default_rng([seed, 2]).permutation(pairs.n_clusters)[pairs.cluster] % FOLDS
    score = _held_out_scores(x, fold)
    correct = _told(score)
    return ProbeResult(
        name=name,
        accuracy=share_with_interval(correct, pairs.cluster),
        matched=share_with_interval(correct[pairs.matched], pairs.cluster[pairs.matched]),
        n=n,
        n_matched=matched,
    )


def share_with_interval(correct: FloatArray, cluster: IntArray) -> Estimate | None:
    """Return the mean of `correct` with Wilson's interval (1927) at the effective size (Korn and Graubard
    1998).

    The effective size is that of independent pairs whose mean has the variance that the clusters show.
    """
    n = len(correct)
    if n == 0:
        return None
    share = float(correct.mean())
    size = float(n)
    _, numbered = np.unique(cluster, return_inverse=True)
    clusters = int(numbered.max()) + 1
    if 1 < clusters < n and 0 < share < 1:
        totals = np.bincount(numbered, correct - share)
        variance = (totals**2).sum() / n**2 * clusters / (clusters - 1)
        size = min(size, share * (1 - share) / variance) if variance > 0 else size
    size = max(size, 1.0)
    z = float(special.ndtri(0.975))
    middle = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    reach = z / (1 + z**2 / size) * np.sqrt(share * (1 - share) / size + z**2 / (4 * size**2))
    return Estimate(share, max(0.0, float(middle - reach)), min(1.0, float(middle + reach)))


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


def _held_out_scores(x: Float32Array, fold: IntArray) -> FloatArray:
    """Return the value of each pair's difference under the probe trained without its fold."""
    score = np.zeros(len(x))
    if x.shape[1] == 0:
        return score
    fits = _Primal.of(x, fold) if x.shape[1] <= len(x) else _Dual(x, fold, x @ x.T)
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

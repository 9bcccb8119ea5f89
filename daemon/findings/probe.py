"""How well a linear probe tells the two texts of a held-out pair apart.

Sees differences only. Every pair gives one difference, negative - positive, with the label 1; its mirror with
the label -1 adds nothing to a probe without intercept, so neither side is favoured and chance is exactly one
half.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.sparse
from scipy import special

from daemon.findings.results import BoolArray, Estimate, FloatArray, IntArray, Pairs, ProbeResult

FOLDS = 5
MIN_CLUSTERS = 20
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean square of a singular value
MAX_WIDTH = 4096  # of more regressors, those that most pairs have


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
    correct = np.where(score == 0, 0.5, score > 0).astype(np.float64)
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


def _regressors(differences: Any) -> npt.NDArray[np.float32]:
    """Return dense (n, d), scaled to a mean square of 1, of at most MAX_WIDTH columns."""
    x: npt.NDArray[np.float32]
    if scipy.sparse.issparse(differences):
        columns = differences.tocsc()
        count = np.diff(columns.indptr)
        widest = np.sort(np.argsort(-count, kind="stable")[:MAX_WIDTH])
        x = columns[:, widest[count[widest] > 0]].astype(np.float32).toarray()
    else:
        x = np.array(differences, dtype=np.float32).reshape(len(differences), -1)
        x = x[:, (x != 0).any(axis=0)]
    scale = float(np.sqrt(np.mean(x.astype(np.float64) ** 2))) if x.size else 0.0
    if np.isfinite(scale) and scale > 0:
        x /= np.float32(scale)
    return x


def _held_out_scores(x: npt.NDArray[np.float32], fold: IntArray) -> FloatArray:
    """Return the value of each pair's difference under the probe trained without its fold."""
    score = np.zeros(len(x))
    if x.shape[1] == 0:
        return score
    solve = _primal if x.shape[1] <= len(x) else _dual
    for held_out in range(FOLDS):
        inner = (held_out + 1) % FOLDS
        chosen = _best_penalty(x, fold, held_out, inner, solve)
        test = fold == held_out
        score[test] = solve(x, fold != held_out, test, (chosen,))[0]
    return score


def _best_penalty(x: npt.NDArray[np.float32], fold: IntArray, held_out: int, inner: int, solve: Any) -> float:
    """Return the penalty that tells most pairs of the inner fold rightly; of equals the largest."""
    train, validate = (fold != held_out) & (fold != inner), fold == inner
    scores = solve(x, train, validate, PENALTIES)
    right = [float(np.where(score == 0, 0.5, score > 0).mean()) for score in scores]
    best = max(range(len(PENALTIES)), key=lambda at: (right[at], PENALTIES[at]))
    return PENALTIES[best]


def _primal(
    x: npt.NDArray[np.float32], train: BoolArray, test: BoolArray, penalties: tuple[float, ...]
) -> list[FloatArray]:
    """Solve (X'X + penalty) w = X'1 by Cholesky."""
    rows = x[train]
    gram, target = rows.T @ rows, rows.sum(axis=0)
    return [x[test] @ _solve(gram, target, penalty) for penalty in penalties]


def _dual(
    x: npt.NDArray[np.float32], train: BoolArray, test: BoolArray, penalties: tuple[float, ...]
) -> list[FloatArray]:
    """Solve (XX' + penalty) a = 1, w = X'a: the same probe, from a matrix of pairs."""
    rows = x[train]
    kernel, ones = rows @ rows.T, np.ones(len(rows), dtype=np.float32)
    across = x[test] @ rows.T
    return [across @ _solve(kernel, ones, penalty) for penalty in penalties]


def _solve(matrix: npt.NDArray[np.float32], target: npt.NDArray[Any], penalty: float) -> npt.NDArray[Any]:
    penalised = matrix.copy()
    scale = max(float(np.trace(matrix)) / len(matrix), 1e-6)
    penalised[np.diag_indices(len(matrix))] += np.float32(penalty * scale)
    solved: npt.NDArray[Any] = scipy.linalg.solve(penalised, target, assume_a="pos", overwrite_a=True)
    return solved

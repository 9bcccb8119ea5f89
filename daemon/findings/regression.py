"""One coefficient of a least-squares regression, for many columns at once, with cluster-robust errors.

The covariance is the sandwich of Liang and Zeger (1986) with the small-sample factor G / (G - 1) * (n - 1) /
(n - k), CR1, and Student's t of G - 1 degrees of freedom for G clusters (Cameron and Miller 2015), which is
what statsmodels gives for `cov_type="cluster"` with `use_t`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special

from daemon.findings.results import BoolArray, FloatArray, IntArray, Pairs
from daemon.findings.sparse import Columns, sum_rows, sums_of_powers, take_rows

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Coefficients:
    """One coefficient of each of k regressions; NaN where it is not determined."""

    value: FloatArray
    low: FloatArray
    high: FloatArray
    p: FloatArray


@dataclass(frozen=True, slots=True)
class Design:
    """What columns are regressed on; the coefficient of its first regressor is what is wanted."""

    rows: BoolArray  # (all rows,) those in which every regressor is defined
    regressors: FloatArray  # (n, r) of these rows
    cluster: IntArray  # (n,) from 0, without gaps

    @property
    def n_clusters(self) -> int:
        return int(self.cluster.max(initial=-1)) + 1

    @property
    def identified(self) -> bool:
        """Whether the regressors tell the coefficient apart, with clusters left to judge its error by."""
        n, r = self.regressors.shape
        if n <= r or self.n_clusters <= r:
            return False
        scale = np.sqrt((self.regressors**2).sum(axis=0))
        return bool(np.linalg.matrix_rank(self.regressors / scale) == r)


def design(wanted: FloatArray, controls: FloatArray, cluster: IntArray) -> Design:
    """Regress on `wanted` (n,) beside `controls` (n, c), of which those that are zero throughout are left
    out.
    """
    rows = np.isfinite(wanted) & np.isfinite(controls).all(axis=1)
    kept = controls[rows]
    kept = kept[:, (kept != 0).any(axis=0)]
    _, numbered = np.unique(cluster[rows], return_inverse=True)
    return Design(rows, np.column_stack([wanted[rows], kept]), numbered.astype(np.int64))


def at_equal_length(pairs: Pairs) -> Design:
    """Regress a difference on the differences in tokens and log-probability.

    None is centred: the intercept is the difference that is left where both are zero.
    """
    controls = [pairs.d_tokens] if pairs.d_log_prob is None else [pairs.d_tokens, pairs.d_log_prob]
    return design(np.ones(pairs.n), np.column_stack(controls).astype(np.float64), pairs.cluster)


def fit(columns: Columns, model: Design) -> Coefficients:
    """Regress each of the columns (all rows, k) on the design; return its first coefficient.

    The scores of the coefficient are a_i (y_i - x_i b), where its estimate is sum_i a_i y_i. Their squares by
    cluster are expanded, so that only the stored values of y are visited.
    """
    k = columns.shape[1]
    if not model.identified:
        missing = np.full(k, np.nan)
        return Coefficients(missing, missing.copy(), missing.copy(), missing.copy())
    x, groups = model.regressors, model.n_clusters
    y = columns if model.rows.all() else take_rows(columns, model.rows)
    n, r = x.shape
    inverse = np.linalg.pinv(x)  # (r, n)
    coefficients = np.asarray(y.T @ inverse.T)  # (k, r)
    weighted = y.multiply(inverse[0][:, None]).tocsc()
    by_cluster = sum_rows(weighted, model.cluster, groups)  # (groups, k)
    design_by_cluster = np.zeros((groups, r))
    np.add.at(design_by_cluster, model.cluster, inverse[0][:, None] * x)
    squares = sums_of_powers(by_cluster, 2)
    cross = (np.asarray(by_cluster.T @ design_by_cluster) * coefficients).sum(axis=1)
    own = np.einsum("kr,rs,ks->k", coefficients, design_by_cluster.T @ design_by_cluster, coefficients)
    meat = squares - 2 * cross + own
    meat[meat < 1e-24 * squares] = 0  # the fit is exact up to rounding
    error = np.sqrt(meat * groups / (groups - 1) * (n - 1) / (n - r))
    value = coefficients[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(value) / error
    p = np.where(error > 0, 2 * special.stdtr(groups - 1, -t), np.where(value == 0, 1.0, 0.0))
    reach = special.stdtrit(groups - 1, (1 + CONFIDENCE) / 2) * error
    return Coefficients(value, value - reach, value + reach, p)

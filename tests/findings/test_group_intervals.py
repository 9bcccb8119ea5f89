"""Intervals of groups, against scipy, statsmodels and roots found by bisection."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import statsmodels.api as sm
from scipy import optimize, stats
from statsmodels.stats.proportion import proportion_confint

from daemon.findings.group_intervals import (
    MIN_EXPECTED,
    activation_intervals,
    adjusted_intervals,
    group_regression,
    wilson,
)
from daemon.findings.sparse import as_columns, fires

CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def made(seed: int, n: int = 200, size: int = 60, features: int = 12):
    rng = np.random.default_rng(seed)
    fired = rng.random((n, features)) < np.geomspace(0.02, 0.9, features)
    activations = fired * rng.lognormal(0, 0.6, (n, features))
    inside = rng.permutation(n) < size
    return (
        as_columns(scipy.sparse.csc_matrix(activations)),
        inside,
        np.rint(rng.normal(30, 6, n) + 4 * inside),
    )


def test_without_tokens_the_regression_is_welchs() -> None:
    activations, inside, _ = made(0)
    found = group_regression(activations, inside)
    ends = found.intervals()
    for f, y in enumerate(activations.toarray().T):
        welch = stats.ttest_ind(y[inside], y[~inside], equal_var=False).confidence_interval()
        np.testing.assert_allclose([ends.low[f], ends.high[f]], [welch.low, welch.high], **CLOSE)


def test_with_tokens_the_error_is_hc2() -> None:
    activations, inside, tokens = made(1)
    found = group_regression(activations, inside, tokens)
    for f, y in enumerate(activations.toarray().T):
        design = np.column_stack([inside, np.ones(len(y)), tokens, tokens**2])
        fitted = sm.OLS(y, design).fit(cov_type="HC2")
        np.testing.assert_allclose(
            [found.value[f], found.error[f]], [fitted.params[0], fitted.bse[0]], **CLOSE
        )


def test_of_two_lengths_there_is_no_square() -> None:
    activations, inside, tokens = made(1)
    two = np.where(tokens > 31, 40.0, 20.0)
    found = group_regression(activations, inside, two)
    y = activations.toarray()[:, -1]
    fitted = sm.OLS(y, np.column_stack([inside, np.ones(200), two])).fit(cov_type="HC2")
    np.testing.assert_allclose(
        [found.value[-1], found.error[-1]], [fitted.params[0], fitted.bse[0]], rtol=1e-7
    )
    alike, plain = (
        group_regression(activations, inside, np.full(200, 3.0)),
        group_regression(activations, inside),
    )
    np.testing.assert_array_equal(alike.error, plain.error)


def test_a_group_that_its_lengths_give_away_has_no_error() -> None:
    activations, inside, _ = made(2)
    found = group_regression(activations, inside, np.where(inside, 5.0, 9.0))
    assert np.isnan(found.error).all()
    assert np.isnan(group_regression(activations, np.arange(200) < 1).error).all()


def score_roots(y: np.ndarray) -> tuple[float, float, float]:
    """The mean, and where (mean - m)^2 = t^2 (phi m - m^2) / n on either side, by bisection."""
    mean, phi = y.mean(), np.mean(y**2) / y.mean()
    t = stats.t.ppf(0.975, np.sum(y > 0))

    def off(m: float) -> float:
        return float((mean - m) ** 2 - t**2 * (phi * m - m**2) / len(y))

    return mean, optimize.brentq(off, 0, mean, xtol=1e-14), optimize.brentq(off, mean, phi, xtol=1e-14)


def test_activation_intervals_are_the_roots_put_together() -> None:
    activations, inside, tokens = made(3)
    found = activation_intervals(activations, fires(activations), inside)
    shifted = adjusted_intervals(
        found, group_regression(activations, inside), group_regression(activations, inside, tokens)
    )
    given = 0
    for f, y in enumerate(activations.toarray().T):
        if (y > 0).mean() * inside.sum() < MIN_EXPECTED:
            assert np.isnan([found.low[f], found.high[f], shifted.low[f]]).all()
            continue
        (a, a_low, a_high), (b, b_low, b_high) = score_roots(y[inside]), score_roots(y[~inside])
        np.testing.assert_allclose(found.value[f], a - b, **CLOSE)
        np.testing.assert_allclose(found.low[f], a - b - np.hypot(a - a_low, b_high - b), **CLOSE)
        np.testing.assert_allclose(found.high[f], a - b + np.hypot(a_high - a, b - b_low), **CLOSE)
        assert shifted.low[f] < shifted.value[f] < shifted.high[f]
        given += 1
    assert 3 < given < 12


def test_a_side_in_which_nothing_fires_has_a_width() -> None:
    activations, inside, _ = made(4)
    dense = activations.toarray()
    dense[inside] = 0
    columns = as_columns(scipy.sparse.csc_matrix(dense))
    found = activation_intervals(columns, fires(columns), inside)
    assert found.high[-1] < 0
    alone = stats.t.interval(0.95, 139, dense[~inside, -1].mean(), stats.sem(dense[~inside, -1]))
    assert found.high[-1] - found.low[-1] > alone[1] - alone[0]


def test_activations_below_zero_have_no_interval() -> None:
    activations, inside, _ = made(5)
    activations.data[activations.indptr[11]] *= -1
    found = activation_intervals(activations, fires(activations), inside)
    assert np.isnan(found.low[11])
    assert not np.isnan(found.low[10])


def test_wilson_is_statsmodels() -> None:
    for seen in (0, 3, 20):
        low, high = wilson(np.array([seen / 20]), 20)
        np.testing.assert_allclose(
            [low[0], high[0]], proportion_confint(seen, 20, method="wilson"), rtol=1e-8, atol=1e-12
        )

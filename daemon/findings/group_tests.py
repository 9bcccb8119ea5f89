"""Tests of a feature between the units inside a group and outside it, as they are and at equal length.

Each pair of tests looks at two parts of an activation, whether a unit fires and how much it does where it
fires: given how often a feature fires the two are independent (a two-part test, Lachenbruch 1976), and no
normal approximation meets thousands of tied zeros.
"""

from __future__ import annotations

import numpy as np
from scipy import special, stats

from daemon.findings.results import BoolArray, FloatArray, IntArray
from daemon.findings.sparse import Columns, column_numbers, runs_of, stored

MIN_PART = 9  # firing units inside and outside, for the normal approximation of Mann-Whitney
PRIOR = 0.04  # precision of the log-odds per standard deviation of tokens: keeps them finite
STEPS = 50
TOLERANCE = 1e-6  # share of the group that its lengths must leave open
COLUMN_VALUES = 1 << 21  # of numbers of tokens times features fitted at a time


def fisher_exact(inside: IntArray, n_inside: int, outside: IntArray, n_outside: int) -> FloatArray:
    """Return two-sided p (k,) of as many firing samples inside and outside, as `scipy.stats.fisher_exact`
    does.

    The sum of all tables' probabilities that are at most that of the one seen, with the margins as they are.
    """
    total = inside + outside
    p = np.ones(len(total))
    n = n_inside + n_outside
    log_factorial = special.gammaln(np.arange(n + 1) + 1.0)

    def log_choose(of: int | IntArray, some: IntArray) -> FloatArray:
        return np.asarray(log_factorial[of] - log_factorial[some] - log_factorial[of - some])

    for firing in np.unique(total):
        possible = np.arange(max(0, firing - n_outside), min(firing, n_inside) + 1)
        log_mass = log_choose(n_inside, possible) + log_choose(n_outside, firing - possible)
        mass = np.exp(log_mass - log_choose(n, np.asarray(firing)))
        order = np.argsort(mass)
        at_most = np.cumsum(mass[order])
        here = total == firing
        seen = mass[inside[here] - possible[0]] * (1 + 1e-7)  # what is equal but for rounding is equal
        p[here] = at_most[np.searchsorted(mass[order], seen, side="right") - 1]
    return np.minimum(p, 1)


def mann_whitney_of_firing(activations: Columns, inside: BoolArray) -> FloatArray:
    """Return two-sided p (k,) of the activations inside against those outside; NaN where too few fire.

    The stored values are in their order. Normal approximation with ties and continuity corrected, as
    `scipy.stats.mannwhitneyu(method="asymptotic")`.
    """
    k, column = activations.shape[1], column_numbers(activations)
    runs = runs_of(activations, activations.data)
    rank = runs.mean_place - activations.indptr[column]
    is_inside = inside[activations.indices].astype(np.float64)
    n, n1 = stored(activations).astype(np.float64), np.bincount(column, is_inside, minlength=k)
    n2 = n - n1
    u1 = np.bincount(column, rank * is_inside, minlength=k) - n1 * (n1 + 1) / 2
    length = runs.length.astype(np.float64)
    ties = np.bincount(column[runs.first], length**3 - length, minlength=k)
    with np.errstate(divide="ignore", invalid="ignore"):
        deviation = np.sqrt(n1 * n2 / 12 * ((n + 1) - ties / (n * (n - 1))))
        z = (np.maximum(u1, n1 * n2 - u1) - n1 * n2 / 2 - 0.5) / deviation
    p = np.minimum(1, 2 * special.ndtr(-z))
    return np.where(np.minimum(n1, n2) >= MIN_PART, np.where(deviation > 0, p, 1.0), np.nan)


def firing_at_equal_length(fired: Columns, inside: BoolArray, n_tokens: FloatArray) -> FloatArray:
    """Return two-sided p (k,) of how many units (u, k) fire inside, given their tokens; NaN where it can't
    be told.

    Each feature's log-odds of firing are linear in the tokens and fitted to all units alike, as if no group
    were there (a score test, Rao 1948). The count inside then has a known mean and variance, and its tail is
    that of the binomial distribution of this mean and variance: no normal approximation makes rare firing
    too bold. The tail's z is scaled by what the fitted slope takes from the variance.
    """
    k, total = fired.shape[1], stored(fired)
    tokens, place = np.unique(n_tokens, return_inverse=True)
    scale = float(n_tokens.std()) or 1.0
    if not np.isfinite(tokens).all():
        return np.full(k, np.nan)
    x = (tokens - n_tokens.mean()) / scale
    units = np.bincount(place, minlength=len(x)).astype(np.float64)
    units_inside = np.bincount(place, inside, minlength=len(x)).astype(np.float64)
    sums = np.asarray(fired.T @ ((n_tokens - n_tokens.mean()) / scale))
    seen = np.asarray(fired.T @ inside.astype(np.float64))
    p = np.full(k, np.nan)
    varied = np.flatnonzero((total > 0) & (total < len(inside)))
    width = max(1, COLUMN_VALUES // len(x))
    for start in range(0, len(varied), width):
        some = varied[start : start + width]
        rate = _logistic(x, units, total[some].astype(np.float64), sums[some])
        p[some] = _score_test(rate, x, units, units_inside, seen[some])
    return p


def _logistic(x: FloatArray, units: FloatArray, total: FloatArray, sums: FloatArray) -> FloatArray:
    """Return the fitted rates (tokens, k) by Newton's method; the slope has a normal prior."""
    n = units.sum()
    intercept, slope = special.logit(total / n), np.zeros(len(total))
    rate: FloatArray = np.zeros((len(x), len(total)))
    for _ in range(STEPS):
        rate = special.expit(intercept + x[:, None] * slope)
        weight = units[:, None] * rate * (1 - rate)
        off = total - units @ rate
        tilt = sums - (units * x) @ rate - PRIOR * slope
        w0, w1, w2 = weight.sum(axis=0), x @ weight, (x**2) @ weight + PRIOR
        determinant = np.maximum(w0 * w2 - w1**2, 1e-12)
        up, turn = (w2 * off - w1 * tilt) / determinant, (w0 * tilt - w1 * off) / determinant
        step = np.maximum(np.abs(up), np.abs(turn))
        shorter = np.minimum(1, 2 / np.maximum(step, 1e-300))
        intercept, slope = intercept + shorter * up, slope + shorter * turn
        if step.max(initial=0) < 1e-8:
            break
    return rate


def _score_test(
    rate: FloatArray, x: FloatArray, units: FloatArray, units_inside: FloatArray, seen: FloatArray
) -> FloatArray:
    mean = units_inside @ rate
    variance = rate * (1 - rate)
    own, whole = units_inside @ variance, units @ variance
    with np.errstate(divide="ignore", invalid="ignore"):
        given_total = own - own**2 / whole
        centre = (units * x) @ variance / whole
        tilted = ((units * x**2) @ variance) - centre**2 * whole
        shared = ((units_inside * x) @ variance) - centre * own
        left = given_total - np.where(tilted > 1e-9 * whole, shared**2 / tilted, 0)
        chance = np.clip(1 - given_total / mean, 1e-9, 1 - 1e-9)
        trials = np.maximum(mean / chance, seen)
        above = np.where(seen > 0, special.betainc(np.maximum(seen, 1e-9), trials - seen + 1, chance), 1.0)
        below = np.where(
            trials > seen, special.betaincc(seen + 1, np.maximum(trials - seen, 1e-9), chance), 1.0
        )
        tail = np.clip(np.minimum(above, below), 1e-300, 0.5)
        z = special.ndtri(tail) * np.sqrt(given_total / left)
    known = (left > TOLERANCE * given_total) & (given_total > 0)
    return np.where(known, np.minimum(1, 2 * special.ndtr(z)), np.nan)


def magnitude_at_equal_length(activations: Columns, inside: BoolArray, n_tokens: FloatArray) -> FloatArray:
    """Return two-sided p (k,) of the activations (u, k) of the units that fire, given their tokens.

    Regression of their ranks on belonging to the group and the tokens (Conover and Iman 1982), with the error
    HC2 and Student's t as Welch's. The stored values are in their order. NaN where too few fire.
    """
    k, column = activations.shape[1], column_numbers(activations)
    rank = runs_of(activations, activations.data).mean_place - activations.indptr[column]
    rows = activations.indices
    return _rank_regression(column, k, rank, inside[rows], n_tokens[rows])


def column_at_equal_length(values: FloatArray, inside: BoolArray, n_tokens: FloatArray) -> float:
    """Return the same p of one number for each unit (u,)."""
    rank = stats.rankdata(values)
    return float(_rank_regression(np.zeros(len(rank), np.int64), 1, rank, inside, n_tokens)[0])


def _rank_regression(
    column: IntArray, k: int, rank: FloatArray, inside: BoolArray, n_tokens: FloatArray
) -> FloatArray:
    """Return p (k,) of k regressions at once; every array but the result has an entry for each value."""

    def total(values: FloatArray) -> FloatArray:
        return np.bincount(column, values, minlength=k).astype(np.float64)

    n = np.maximum(total(np.ones(len(column))), 1)
    x = inside.astype(np.float64)
    n_inside = total(x)

    def centred(values: FloatArray) -> FloatArray:
        return np.asarray(values - (total(values) / n)[column])

    tokens = centred(n_tokens)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = total(tokens**2)
        uneven = spread > 0

        def freed(values: FloatArray) -> FloatArray:
            slope = np.where(uneven, total(values * tokens) / spread, 0)
            return np.asarray(values - slope[column] * tokens)

        own, left = freed(centred(x)), freed(centred(rank))
        own_spread = total(own**2)
        value = total(own * left) / own_spread
        residual = left - value[column] * own
        of_tokens = np.where(uneven[column], tokens**2 / spread[column], 0)
        leverage = 1 / n[column] + of_tokens + own**2 / own_spread[column]
        weighted = (own / own_spread[column]) ** 2 * residual**2 / np.maximum(1 - leverage, 1e-9)
        first, second = total(weighted * x), total(weighted * (1 - x))
        error = np.sqrt(first + second)
        n_outside = n - n_inside
        df = (first + second) ** 2 / (first**2 / (n_inside - 2) + second**2 / (n_outside - 2))
        p = 2 * special.stdtr(df, -np.abs(value) / error)
    p = np.where(error > 0, p, np.where(np.abs(value) > 1e-9, 0.0, 1.0))
    enough = np.minimum(n_inside, n_outside) >= MIN_PART
    known = enough & (own_spread > TOLERANCE * n_inside * n_outside / n)
    return np.where(known & ~np.isnan(p), p, np.nan)

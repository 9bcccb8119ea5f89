"""95% intervals of a difference between the units inside a group and outside it.

Of firing rates Newcombe's (1998, method 10), from Wilson's interval (1927) of either rate. Of activations the
same for means of numbers most of which are zero: where phi is the mean square of the activations over their
mean m, the variance of one is phi m - m^2, with phi = 1 for a rate. So the score interval of either mean is a
quadratic in m, and it has a width where no unit fires.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import special

from daemon.findings.means import CONFIDENCE, Intervals
from daemon.findings.results import BoolArray, FloatArray, IntArray
from daemon.findings.sparse import Columns, stored, sums, sums_of_powers, take_rows, with_values

UPPER = (1 + CONFIDENCE) / 2
OWN_SIZE = 5  # firing units from which the size of a side's activations is its own
POWERS = 2  # of the tokens: an activation need not rise evenly with them
MIN_EXPECTED = 12  # firing units that the smaller side has on average if the group makes no difference


@dataclass(frozen=True, slots=True)
class GroupRegression:
    """What belonging to a group adds to each of k columns, with its standard error; NaN where unknown."""

    value: FloatArray
    error: FloatArray
    df: FloatArray

    def intervals(self) -> Intervals:
        reach = special.stdtrit(self.df, UPPER) * self.error
        reach = np.where(self.error == 0, 0.0, reach)
        return Intervals(self.value, self.value - reach, self.value + reach)


def group_regression(
    columns: Columns, inside: BoolArray, n_tokens: FloatArray | None = None
) -> GroupRegression:
    """Regress each of the columns (u, k) on belonging to the group, beside an intercept, the tokens and
    their square.

    The error is HC2 (MacKinnon and White 1985), each side's part of it with a degree of freedom for each of
    its units but one, put together by Satterthwaite (1946). Without tokens that is Welch's t (1947).
    """
    x = np.column_stack([inside.astype(np.float64), *_controls(n_tokens, len(inside))])
    k, (n, r) = columns.shape[1], x.shape
    n_inside, n_outside = int(inside.sum()), int((~inside).sum())
    if min(n_inside, n_outside) < 2 or n <= r or not np.isfinite(x).all() or not _independent(x):
        return GroupRegression(*(np.full(k, np.nan) for _ in range(3)))
    inverse = np.linalg.pinv(x)  # (r, n)
    leverage = np.einsum("rn,nr->n", inverse, x)
    weight = inverse[0] ** 2 / np.maximum(1 - leverage, 1e-9)
    coefficients = np.asarray(columns.T @ inverse.T)  # (k, r)
    squares = with_values(columns, columns.data**2)
    parts = []
    for side in (inside, ~inside):
        of_side = np.where(side, weight, 0)
        cross = (np.asarray(columns.T @ (of_side[:, None] * x)) * coefficients).sum(axis=1)
        own = np.einsum("kr,rs,ks->k", coefficients, x.T @ (of_side[:, None] * x), coefficients)
        total = np.asarray(squares.T @ of_side)
        part = total - 2 * cross + own
        parts.append(np.where(part < 1e-12 * (total + own), 0, part))  # rounding alone
    variance = parts[0] + parts[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        df = variance**2 / (parts[0] ** 2 / (n_inside - 1) + parts[1] ** 2 / (n_outside - 1))
    return GroupRegression(coefficients[:, 0], np.sqrt(variance), df)


def _controls(n_tokens: FloatArray | None, n: int) -> Iterator[FloatArray]:
    """Yield an intercept, and as many powers of the tokens as there are lengths to tell them apart."""
    yield np.ones(n)
    if n_tokens is None:
        return
    lengths = len(np.unique(n_tokens))
    z = (n_tokens - n_tokens.mean()) / (n_tokens.std() or 1.0)
    for power in range(1, min(lengths, POWERS + 1)):
        yield z**power


def _independent(x: FloatArray) -> bool:
    scale = np.sqrt((x**2).sum(axis=0))
    return bool((scale > 0).all() and np.linalg.matrix_rank(x / scale, tol=1e-6) == x.shape[1])


def activation_intervals(activations: Columns, fired: Columns, inside: BoolArray) -> Intervals:
    """Return the difference of the mean activations (k,) of units (u, k); no interval where too few fire.

    Few is decided without regard to which units are inside: where the smaller side would have fewer than
    MIN_EXPECTED firing units at the rate of all. None either for activations below zero.
    """
    n, total = len(inside), stored(fired).astype(np.float64)
    pooled = _phi(activations)
    ends = []
    for side in (inside, ~inside):
        own, units = take_rows(activations, side), max(int(side.sum()), 1)
        firing = stored(take_rows(fired, side)).astype(np.float64)
        phi, df = _phi(own), firing
        # Too few activations to tell their size by: that of all, if it is larger.
        few = firing < OWN_SIZE
        phi, df = np.where(few, np.fmax(phi, pooled), phi), np.where(few, np.maximum(total, 1), df)
        mean = sums(own) / units
        ends.append((mean, *_score_ends(mean, phi, units, special.stdtrit(df, UPPER))))
    low, high = _difference_ends(ends[0], ends[1])
    negative = np.bincount(_columns_below_zero(activations), minlength=activations.shape[1]) > 0
    expected = total * min(int(inside.sum()), int((~inside).sum())) / n
    return Intervals(ends[0][0] - ends[1][0], low, high).where((expected >= MIN_EXPECTED) & ~negative)


def adjusted_intervals(raw: Intervals, plain: GroupRegression, adjusted: GroupRegression) -> Intervals:
    """Return the difference at equal length: the arms of the raw interval, wider as the error is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        wider = np.where(plain.error > 0, adjusted.error / plain.error, np.nan)
    low = adjusted.value - (raw.value - raw.low) * wider
    high = adjusted.value + (raw.high - raw.value) * wider
    return Intervals(adjusted.value, low, high)


def newcombe(inside: IntArray, n_inside: int, outside: IntArray, n_outside: int) -> Intervals:
    """Return the difference of two rates (k,), given how many units of either side fire."""
    first, second = inside / n_inside, outside / n_outside
    low, high = _difference_ends((first, *wilson(first, n_inside)), (second, *wilson(second, n_outside)))
    return Intervals(first - second, low, high)


def wilson(share: FloatArray, n: float) -> tuple[FloatArray, FloatArray]:
    """Return the score interval of a share among n (Wilson 1927)."""
    z = float(special.ndtri(UPPER))
    return _score_ends(share, np.ones_like(share), n, np.full_like(share, z))


def _score_ends(mean: FloatArray, phi: FloatArray, n: float, t: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return both m with (mean - m)^2 = t^2 (phi m - m^2) / n."""
    c = t**2 / n
    middle = mean + c * phi / 2
    reach = np.sqrt(np.maximum(middle**2 - (1 + c) * mean**2, 0))
    return (middle - reach) / (1 + c), (middle + reach) / (1 + c)


def _phi(activations: Columns) -> FloatArray:
    """Return the mean square over the mean of each column; NaN where nothing fires."""
    total = sums(activations)
    nothing = np.full(activations.shape[1], np.nan)
    return np.divide(sums_of_powers(activations, 2), total, out=nothing, where=total > 0)


def _difference_ends(
    first: tuple[FloatArray, FloatArray, FloatArray], second: tuple[FloatArray, FloatArray, FloatArray]
) -> tuple[FloatArray, FloatArray]:
    """Put the intervals of two independent numbers together (Zou and Donner 2008)."""
    (a, a_low, a_high), (b, b_low, b_high) = first, second
    low = a - b - np.sqrt((a - a_low) ** 2 + (b_high - b) ** 2)
    return low, a - b + np.sqrt((a_high - a) ** 2 + (b - b_low) ** 2)


def _columns_below_zero(columns: Columns) -> IntArray:
    numbers: IntArray = np.repeat(np.arange(columns.shape[1]), np.diff(columns.indptr))[columns.data < 0]
    return numbers

"""Many tests at once: several tests of one thing combined, and the false discovery rate over all things."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import stats

from daemon.findings.results import FloatArray


def simes(first: FloatArray, second: FloatArray) -> FloatArray:
    """Combine two tests of the same feature into one p-value; NaN where neither could be made.

    min(2 p_(1), p_(2)): Simes (1986), valid for tests that are positively dependent (Sarkar 1998), as two
    tests of one difference are. With one test alone its own p. Features, not tests, are what is discovered:
    combining first holds the false discovery rate over features (Benjamini and Bogomolov 2014).
    """
    low, high = np.fmin(first, second), np.fmax(first, second)
    both = ~(np.isnan(first) | np.isnan(second))
    combined: FloatArray = np.where(both, np.minimum(2 * low, high), low)
    return combined


def false_discovery_rates(p: FloatArray, method: Literal["bh", "by"] = "bh") -> FloatArray:
    """Return the adjusted p-values of all that are not NaN, in place; NaN stays.

    Benjamini and Hochberg (1995) for independent or positively dependent tests, Benjamini and Yekutieli
    (2001) for any dependence.
    """
    q = np.full(p.shape, np.nan)
    defined = ~np.isnan(p)
    if defined.any():
        q[defined] = stats.false_discovery_control(np.clip(p[defined], 0, 1), method=method)
    return q


def controlled_q(p: FloatArray, adjusted_p: FloatArray) -> FloatArray:
    """Return the false discovery rate of "differs, and differs at equal length".

    A thing that fails either is a null: the larger p-value is valid for that union (Berger 1982,
    intersection-union test), whichever of the two it fails. Things that can't be adjusted count as failing.
    """
    larger = np.where(np.isnan(adjusted_p), 1.0, np.maximum(p, np.nan_to_num(adjusted_p, nan=1.0)))
    return false_discovery_rates(np.where(np.isnan(p), np.nan, larger))

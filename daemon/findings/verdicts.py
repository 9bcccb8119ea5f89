"""Decide whether a difference holds, from its tests and its controls."""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from daemon.findings.multiplicity import controlled_q
from daemon.findings.results import BoolArray, FloatArray, IntArray, Verdict

INFORMATIVE_MATCHED = 20  # matched pairs that differ; with fewer their sign says little


def matched_agrees(
    sign: FloatArray, mean: FloatArray, low: FloatArray, high: FloatArray, informative: IntArray
) -> BoolArray:
    """Return whether pairs of equal length are not against a difference of this sign (k,).

    Against it is an interval that lies on the other side of zero, and where at least
    INFORMATIVE_MATCHED of them differ, a mean of the other sign.
    """
    opposite = np.where(sign > 0, high < 0, low > 0)
    turned = (informative >= INFORMATIVE_MATCHED) & (np.sign(mean) == -sign)
    agrees: BoolArray = ~(opposite | turned)
    return agrees


def verdicts(
    p: FloatArray,
    q: FloatArray,
    adjusted_p: FloatArray,
    same_sign: BoolArray,
    matched_agrees: BoolArray,
    target: float,
) -> npt.NDArray[np.str_]:
    """Return a Verdict for each thing tested together; NaN in `p` is "few".

    "holds" needs the false discovery rate of "differs, and differs at equal length" (`controlled_q`) at most
    the target, the same sign at equal length, and pairs of equal length that are not against it.
    """
    found = np.nan_to_num(q, nan=1.0) <= target
    controlled = np.nan_to_num(controlled_q(p, adjusted_p), nan=1.0) <= target
    holds = found & controlled & same_sign & matched_agrees
    return np.select([np.isnan(p), holds, found], ["few", "holds", "controls"], "none")


def as_verdict(name: str) -> Verdict:
    """Return an array's string as a Verdict."""
    return cast(Verdict, str(name))

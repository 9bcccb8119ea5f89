"""One number per pair, such as a column of the analysis, compared between the two texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from daemon.findings.means import Intervals, mean_intervals
from daemon.findings.multiplicity import false_discovery_rates
from daemon.findings.paired_features import PairedSettings, d_z
from daemon.findings.paired_tests import by_size, signed_ranks, wilcoxon_only
from daemon.findings.rank_biserial import rank_biserials
from daemon.findings.regression import Coefficients, at_equal_length, fit
from daemon.findings.results import BoolArray, ControlledDifference, Estimate, FloatArray, Pairs
from daemon.findings.sparse import Columns, column_of, sum_rows, take_rows
from daemon.findings.verdicts import as_verdict, matched_agrees, verdicts


def paired_column(
    difference: FloatArray, pairs: Pairs, settings: PairedSettings | None = None
) -> ControlledDifference:
    """Compare one number between the two texts of each pair, given its difference (n,); NaN pairs are left
    out.

    For some of the pairs, such as a group, give NaN for the others. `q` and `verdict` are those of this
    column alone: `fdr_columns` sets them for all that are tested together.
    """
    settings = settings or PairedSettings()
    defined = np.isfinite(difference)
    chosen = Pairs(
        cluster=pairs.cluster[defined],
        d_tokens=pairs.d_tokens[defined],
        d_log_prob=None if pairs.d_log_prob is None else pairs.d_log_prob[defined],
        group=pairs.group[defined],
        group_names=pairs.group_names,
    )
    column = by_size(column_of(np.asarray(difference, dtype=np.float64)[defined]))
    clusters = pairs.n_clusters  # those of all pairs
    p, informative = wilcoxon_only(column, chosen.cluster, clusters)
    testable = bool(informative[0] >= settings.min_informative)
    adjusted = fit(column, at_equal_length(chosen))
    matched = take_rows(column, chosen.matched)
    matched_p, matched_informative = wilcoxon_only(matched, chosen.cluster[chosen.matched], clusters)
    finding = ControlledDifference(
        n=chosen.n,
        n_clusters=len(np.unique(chosen.cluster)),
        raw=_estimate(_mean(column, chosen, np.ones(chosen.n, dtype=bool), clusters)),
        p=float(p[0]) if testable else None,
        q=None,
        rank_biserial=_estimate(rank_biserials(column, signed_ranks(column), chosen.cluster, clusters)),
        deviation=float(np.std(difference[defined], ddof=1)) if chosen.n > 1 else None,
        d_z=_number(d_z(column)[0]),
        adjusted=_estimate(adjusted),
        adjusted_p=_number(adjusted.p[0]),
        matched=_estimate(_mean(column, chosen, chosen.matched, clusters)),
        matched_p=float(matched_p[0]) if matched_informative[0] >= settings.min_informative else None,
        n_matched=int(chosen.matched.sum()),
        verdict="few",
    )
    return fdr_columns([finding], settings)[0]


def fdr_columns(
    differences: Sequence[ControlledDifference], settings: PairedSettings | None = None
) -> list[ControlledDifference]:
    """Set the false discovery rate and the verdict of all columns that are tested together."""
    settings = settings or PairedSettings()
    if not differences:
        return []
    p = np.array([_or_nan(difference.p) for difference in differences])
    q = false_discovery_rates(p)
    adjusted_p = np.array([_or_nan(difference.adjusted_p) for difference in differences])
    raw, adjusted = _Ends.of([d.raw for d in differences]), _Ends.of([d.adjusted for d in differences])
    matched = _Ends.of([d.matched for d in differences])
    sign = np.sign(raw.value)
    # A column has few ties at zero, so nearly every matched pair is informative.
    n_matched = np.array([difference.n_matched for difference in differences])
    agrees = matched_agrees(sign, matched.value, matched.low, matched.high, n_matched)
    decided = verdicts(p, q, adjusted_p, np.sign(adjusted.value) == sign, agrees, settings.target)
    return [
        replace(difference, q=_number(rate), verdict=as_verdict(verdict))
        for difference, rate, verdict in zip(differences, q, decided, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Ends:
    value: FloatArray
    low: FloatArray
    high: FloatArray

    @classmethod
    def of(cls, estimates: Sequence[Estimate | None]) -> _Ends:
        rows = [(e.value, e.low, e.high) if e else (np.nan,) * 3 for e in estimates]
        return cls(*np.array(rows, dtype=np.float64).T)


def _mean(column: Columns, pairs: Pairs, rows: BoolArray, clusters: int) -> Intervals:
    sizes = np.bincount(pairs.cluster[rows], minlength=clusters).astype(np.float64)
    totals = sum_rows(column, np.where(rows, pairs.cluster, -1), clusters)
    return mean_intervals(totals, sizes)


def _estimate(intervals: Intervals | Coefficients) -> Estimate | None:
    """Return the first of k numbers; None where it or its interval is not defined."""
    value, low, high = (float(end[0]) for end in (intervals.value, intervals.low, intervals.high))
    return Estimate(value, low, high) if np.isfinite([value, low, high]).all() else None


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value

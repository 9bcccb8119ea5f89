"""Orders and cuts what the page's tables show, and finds the scale that their bars share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from daemon.findings import cells, numbers
from daemon.findings.results import (
    ColumnFinding,
    ControlledDifference,
    Estimate,
    FeatureDetail,
    GroupedColumn,
    GroupedFeatures,
    IntArray,
    PairedFeatures,
    Prevalence,
    Report,
)
from daemon.findings.sentences import VERDICT_ORDER

SHOWN_FEATURES = 500
PRINTED_FEATURES = 100  # on paper, unless more are found
PRINTED_DETAILS = 10  # features that are open on paper
SHOWN_GROUPED = 60  # features of one group and text
SHOWN_GHOSTS = 40
SHOWN_PREVALENT = 60
SHOWN_GROUP_COLUMNS = 1200  # rows of columns by group, all groups together
SHOWN_SHAPES = 500
GHOST_FIRINGS = 5


AnyColumn = TypeVar("AnyColumn", ColumnFinding, GroupedColumn)


@dataclass(frozen=True, slots=True)
class FeatureRow:
    """One feature, compared between the two texts of the pairs."""

    rank: int
    sae: int
    feature: int
    only_positive: int
    only_negative: int
    rate_positive: float
    rate_negative: float
    firing: Estimate | None
    firing_p: float
    activation: Estimate | None
    activation_p: float
    rank_biserial: Estimate | None
    d_z: float
    q: float
    q_dependent: float
    adjusted: Estimate | None
    adjusted_p: float
    matched: Estimate | None
    matched_p: float
    found_on_half: bool
    held_out: Estimate | None
    agreeing: int | None  # groups with the sign of all
    groups: int
    verdict: str

    @property
    def spread(self) -> float:
        """Return standard deviation of the paired difference in activation."""
        return spread(self.activation, self.d_z)


@dataclass(frozen=True, slots=True)
class GroupedRow:
    """One feature, compared between a group and all others."""

    sae: int
    feature: int
    rate_inside: float
    rate_outside: float
    firing: Estimate | None
    activation: Estimate | None
    adjusted: Estimate | None
    q: float
    verdict: str


def spread(mean: Estimate | None, d_z: float | None) -> float:
    """Return the standard deviation that a mean and its d_z imply; NaN where they imply none."""
    if mean is None or d_z is None or not math.isfinite(d_z) or d_z == 0:
        return math.nan
    return abs(mean.value / d_z)


def standardised(one: Estimate | None, spread: float) -> Estimate | None:
    """Return an estimate in standard deviations."""
    if one is None or not spread > 0:
        return None
    return Estimate(one.value / spread, one.low / spread, one.high / spread)


def in_deviations(
    difference: ControlledDifference,
) -> tuple[Estimate | None, Estimate | None, Estimate | None]:
    """Return raw, adjusted and matched differences in standard deviations of the raw one."""
    width = difference.deviation or math.nan
    raw, adjusted, matched = (
        standardised(one, width) for one in (difference.raw, difference.adjusted, difference.matched)
    )
    return raw, adjusted, matched


def ranked(features: PairedFeatures) -> IntArray:
    """Return the tested features' indices: those that hold first, then by q, then by effect."""
    verdicts = np.array([VERDICT_ORDER[str(one)] for one in features.verdict])
    effect = np.nan_to_num(np.abs(features.rank_biserial))
    order = np.lexsort((-effect, np.nan_to_num(features.q, nan=2.0), verdicts))
    kept: IntArray = order[features.tested[order]]
    return kept


def feature_rows(features: PairedFeatures, indices: npt.NDArray[np.int64]) -> Iterator[FeatureRow]:
    for rank, index in enumerate(indices.tolist(), 1):
        yield feature_row(features, index, rank)


def feature_row(features: PairedFeatures, i: int, rank: int) -> FeatureRow:
    f = features
    share, groups = float(f.groups_agreeing[i]), int(f.groups_counted[i])
    return FeatureRow(
        rank=rank,
        sae=int(f.sae[i]),
        feature=int(f.feature[i]),
        only_positive=int(f.only_positive[i]),
        only_negative=int(f.only_negative[i]),
        rate_positive=float(f.rate_positive[i]),
        rate_negative=float(f.rate_negative[i]),
        firing=numbers.estimate(f.firing[i], f.firing_low[i], f.firing_high[i]),
        firing_p=float(f.firing_p[i]),
        activation=numbers.estimate(f.activation[i], f.activation_low[i], f.activation_high[i]),
        activation_p=float(f.activation_p[i]),
        rank_biserial=numbers.estimate(f.rank_biserial[i], f.rank_biserial_low[i], f.rank_biserial_high[i]),
        d_z=float(f.d_z[i]),
        q=float(f.q[i]),
        q_dependent=float(f.q_dependent[i]),
        adjusted=numbers.estimate(f.adjusted[i], f.adjusted_low[i], f.adjusted_high[i]),
        adjusted_p=float(f.adjusted_p[i]),
        matched=numbers.estimate(f.matched[i], f.matched_low[i], f.matched_high[i]),
        matched_p=float(f.matched_p[i]),
        found_on_half=bool(f.found_on_half[i]),
        held_out=numbers.estimate(f.held_out[i], f.held_out_low[i], f.held_out_high[i]),
        agreeing=round(share * groups) if math.isfinite(share) and groups else None,
        groups=groups,
        verdict=str(f.verdict[i]),
    )


def row_of(features: PairedFeatures | None, detail: FeatureDetail) -> FeatureRow | None:
    """Return the statistics of a feature that is shown in detail."""
    if features is None:
        return None
    places = np.flatnonzero((features.sae == detail.sae) & (features.feature == detail.feature))
    return feature_row(features, int(places[0]), 0) if len(places) else None


def ghosts(features: PairedFeatures) -> IntArray:
    """Return features that fire on negative texts alone, `GHOST_FIRINGS` times or more, most first."""
    places = np.flatnonzero((features.rate_positive == 0) & (features.only_negative >= GHOST_FIRINGS))
    kept: IntArray = places[np.argsort(-features.only_negative[places], kind="stable")]
    return kept


def per_dictionary(features: PairedFeatures, n_dictionaries: int, verdicts: Sequence[str]) -> list[int]:
    """Return how many features of each dictionary have one of the verdicts."""
    counts = np.bincount(features.sae[np.isin(features.verdict, verdicts)], minlength=n_dictionaries)
    return [int(one) for one in counts]


def grouped_rows(grouped: GroupedFeatures) -> list[GroupedRow]:
    """Return the features that are found in one group, those that hold first."""
    g = grouped
    verdicts = np.array([VERDICT_ORDER[str(one)] for one in g.verdict])
    order = np.lexsort((np.nan_to_num(g.q, nan=2.0), verdicts))
    found = [int(i) for i in order if str(g.verdict[i]) in ("holds", "controls")]
    return [
        GroupedRow(
            sae=int(g.sae[i]),
            feature=int(g.feature[i]),
            rate_inside=float(g.rate_inside[i]),
            rate_outside=float(g.rate_outside[i]),
            firing=numbers.estimate(g.firing[i], g.firing_low[i], g.firing_high[i]),
            activation=numbers.estimate(g.activation[i], g.activation_low[i], g.activation_high[i]),
            adjusted=numbers.estimate(g.adjusted[i], g.adjusted_low[i], g.adjusted_high[i]),
            q=float(g.q[i]),
            verdict=str(g.verdict[i]),
        )
        for i in found
    ]


def prevalent(one: Prevalence) -> list[tuple[int, int, float, float]]:
    """Return (dictionary, feature, share of samples, mean activation) of the most frequent features."""
    order = np.argsort(-np.nan_to_num(one.rate), kind="stable")[:SHOWN_PREVALENT]
    return [
        (int(one.sae[i]), int(one.feature[i]), float(one.rate[i]), float(one.mean_active[i]))
        for i in order
        if one.rate[i] > 0
    ]


def first_found(findings: Sequence[AnyColumn], most: int) -> list[AnyColumn]:
    """Return all of these columns in their order; of more than `most` those found first, then by q."""
    if len(findings) <= most:
        return list(findings)

    def rank(place: int) -> tuple[int, float]:
        one = findings[place]
        judged = one.difference if isinstance(one, ColumnFinding) else one
        return VERDICT_ORDER[str(judged.verdict)], 2.0 if judged.q is None else judged.q

    return [findings[place] for place in sorted(sorted(range(len(findings)), key=rank)[:most])]


def rows_per_group(report: Report) -> int:
    """Return how many columns of each group its table shows."""
    compared = {one.group for one in report.columns if one.group is not None}
    return SHOWN_GROUP_COLUMNS // max(len(compared), 1)


def metric(finding: ColumnFinding) -> str:
    """Return a column's name without its dictionary's."""
    return finding.column.removeprefix(f"{finding.sae}_") if finding.sae else finding.column


def widest_of(findings: Sequence[ColumnFinding]) -> float:
    """Return the scale, in standard deviations, that the bars of these columns share."""
    return cells.widest(one for finding in findings for one in in_deviations(finding.difference))


def widest_feature(rows: Sequence[FeatureRow]) -> float:
    """Return the scale, in standard deviations, that the bars of these features share."""
    return cells.widest(
        standardised(one, row.spread) for row in rows for one in (row.activation, row.adjusted, row.matched)
    )


def shown_in_detail(details: Sequence[FeatureDetail]) -> dict[tuple[int, int], FeatureDetail]:
    return {(one.sae, one.feature): one for one in details}

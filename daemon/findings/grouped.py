"""Features and columns compared between one group of samples and all others.

The unit is a distinct text, inside or outside (`units.py`). Firing is tested by Fisher's exact test (Fisher
1935), magnitude by Mann-Whitney (Mann and Whitney 1947) among the units that fire, both again at equal length
(`group_tests.py`). Intervals are given where they are right (`group_intervals.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np
import numpy.typing as npt
from scipy import stats

from daemon.findings.group_intervals import (
    GroupRegression,
    activation_intervals,
    adjusted_intervals,
    group_regression,
    newcombe,
)
from daemon.findings.group_tests import (
    MIN_PART,
    column_at_equal_length,
    firing_at_equal_length,
    fisher_exact,
    magnitude_at_equal_length,
    mann_whitney_of_firing,
)
from daemon.findings.means import Intervals
from daemon.findings.multiplicity import false_discovery_rates, simes
from daemon.findings.results import (
    Estimate,
    FloatArray,
    GroupedColumn,
    GroupedFeatures,
    IntArray,
)
from daemon.findings.sparse import Columns, as_columns, column_of, fires, ordered_by, stored
from daemon.findings.units import Samples, Units, compared_groups, units_of
from daemon.findings.verdicts import as_verdict, verdicts

SKEWNESS = 10  # units for each square of the skewness


@dataclass(frozen=True, slots=True)
class ActivationBlock:
    """Consecutive features of one dictionary: their activations in one text of every sample."""

    sae: int
    first: int
    activations: Columns  # (n, k)


@dataclass(frozen=True, slots=True)
class GroupedSettings:
    """What is fixed before the tests."""

    target: float = 0.05  # false discovery rate
    min_firing: int = 10  # of all units
    min_group: int = 20  # units that a group needs, and its complement


@dataclass(frozen=True, slots=True)
class _Part:
    """One block in one group; arrays have one entry for each of its features."""

    sae: IntArray
    feature: IntArray
    rate_inside: FloatArray
    rate_outside: FloatArray
    firing: Intervals  # difference of the rates
    firing_p: FloatArray
    activation: Intervals  # difference of the means
    activation_p: FloatArray  # of the test of magnitude
    adjusted: Intervals
    adjusted_p: FloatArray  # of both tests at equal length
    p: FloatArray  # of both tests


def grouped_features(
    blocks: Iterable[ActivationBlock], samples: Samples, settings: GroupedSettings | None = None
) -> tuple[GroupedFeatures, ...]:
    """Compare every feature between each group and all other samples that have one.

    A group has a result where it and its complement have at least `min_group` units; of two groups there is
    one result. The false discovery rate is over all features of all groups.
    """
    settings = settings or GroupedSettings()
    units = {group: units_of(samples, group) for group in compared_groups(samples, settings.min_group)}
    parts: dict[int, list[_Part]] = {group: [] for group in units}
    for block in blocks:
        whole = replace(block, activations=as_columns(block.activations))
        for group in units:
            parts[group].append(_part(whole, units[group], settings))
    if not any(parts.values()):
        return ()
    every = [part for group in units for part in parts[group]]
    p = np.concatenate([part.p for part in every])
    q = false_discovery_rates(p)
    decided = np.split(_verdicts(every, p, q, settings), len(units))
    return tuple(
        _result(parts[group], samples, group, units[group], rates, verdict)
        for group, rates, verdict in zip(units, np.split(q, len(units)), decided, strict=True)
    )


def grouped_column(
    values: FloatArray,
    samples: Samples,
    group: int,
    labels: GroupedColumn,
    settings: GroupedSettings | None = None,
) -> GroupedColumn:
    """Fill `labels` with the comparison of one column (n,) between a group and all others; NaN is left out.

    `q` and `verdict` are those of this column alone: `fdr_grouped_columns` sets them for all tested together.
    Intervals need `min_group` units on either side, and as many as the column's skewness asks for.
    """
    settings = settings or GroupedSettings()
    units = units_of(samples, group, np.isfinite(values))
    y, inside = units.mean_of(values), units.inside
    column = column_of(y)
    raw, adjusted = group_regression(column, inside), group_regression(column, inside, units.n_tokens)
    smaller = min(units.n_inside, units.n_outside)
    p, adjusted_p = None, np.nan
    if smaller >= MIN_PART:
        p = float(stats.mannwhitneyu(y[inside], y[~inside], method="asymptotic").pvalue)
        adjusted_p = column_at_equal_length(y, inside, units.n_tokens)
    enough = smaller >= max(settings.min_group, skewed_least(y))
    filled = replace(
        labels,
        text=samples.text,
        group=samples.group_names[group],
        n_inside=units.n_inside,
        n_outside=units.n_outside,
        mean_inside=float(y[inside].mean()) if inside.any() else None,
        difference=_estimate(raw, enough),
        p=p,
        adjusted=_estimate(adjusted, enough),
        adjusted_p=_number(adjusted_p),
        against=samples.group_names[1 - group] if len(samples.group_names) == 2 else None,
        same_sign=bool(np.sign(raw.value[0]) == np.sign(adjusted.value[0])),
    )
    return fdr_grouped_columns([filled], settings)[0]


def skewed_least(values: FloatArray) -> float:
    """Return the size of a sample whose mean has a right t interval, given the skewness of all units (u,).

    Cochran's rule (1977, section 2.15) with a smaller factor, that suits Student's t.
    """
    deviation = values - values.mean() if len(values) else values
    spread = float((deviation**2).sum())
    if spread == 0:
        return 0.0
    return SKEWNESS * len(values) * float((deviation**3).sum()) ** 2 / spread**3


def fdr_grouped_columns(
    columns: Sequence[GroupedColumn], settings: GroupedSettings | None = None
) -> list[GroupedColumn]:
    """Set the false discovery rate and the verdict of all columns and groups that are tested together."""
    settings = settings or GroupedSettings()
    if not columns:
        return []
    p = np.array([np.nan if column.p is None else column.p for column in columns])
    adjusted_p = np.array([np.nan if c.adjusted_p is None else c.adjusted_p for c in columns])
    same_sign = np.array([column.same_sign for column in columns])
    q = false_discovery_rates(p)
    always = np.ones(len(columns), dtype=bool)
    decided = verdicts(p, q, adjusted_p, same_sign, always, settings.target)
    return [
        replace(column, q=_number(rate), verdict=as_verdict(verdict))
        for column, rate, verdict in zip(columns, q, decided, strict=True)
    ]


def _part(block: ActivationBlock, units: Units, settings: GroupedSettings) -> _Part:
    inside, k = units.inside, block.activations.shape[1]
    means = units.means(block.activations)
    active = units.firing(block.activations, means)
    fired, by_size = fires(active), ordered_by(active, active.data)
    total = stored(fired)
    within = np.rint(fired.T @ inside.astype(np.float64)).astype(np.int64)
    enough = total >= settings.min_firing
    firing_p = fisher_exact(within, units.n_inside, total - within, units.n_outside)
    firing_p = np.where(enough & (total < units.n), firing_p, np.nan)
    activation_p = np.where(enough, mann_whitney_of_firing(by_size, inside), np.nan)
    p = simes(firing_p, activation_p)
    tested = ~np.isnan(p)
    plain = group_regression(means, inside)
    adjusted = group_regression(means, inside, units.n_tokens)
    activation = activation_intervals(means, fired, inside).where(tested)
    adjusted_p = simes(
        firing_at_equal_length(fired, inside, units.n_tokens),
        magnitude_at_equal_length(by_size, inside, units.n_tokens),
    )
    return _Part(
        sae=np.full(k, block.sae, dtype=np.int64),
        feature=np.arange(block.first, block.first + k, dtype=np.int64),
        rate_inside=within / units.n_inside,
        rate_outside=(total - within) / units.n_outside,
        firing=newcombe(within, units.n_inside, total - within, units.n_outside).where(tested),
        firing_p=firing_p,
        activation=activation,
        activation_p=activation_p,
        adjusted=adjusted_intervals(activation, plain, adjusted),
        adjusted_p=np.where(tested & ~np.isnan(adjusted.value), adjusted_p, np.nan),
        p=p,
    )


def _verdicts(
    parts: list[_Part], p: FloatArray, q: FloatArray, settings: GroupedSettings
) -> npt.NDArray[np.str_]:
    adjusted_p = np.concatenate([part.adjusted_p for part in parts])
    raw = np.concatenate([part.activation.value for part in parts])
    adjusted = np.concatenate([part.adjusted.value for part in parts])
    always = np.ones(len(p), dtype=bool)
    return verdicts(p, q, adjusted_p, np.sign(raw) == np.sign(adjusted), always, settings.target)


def _result(
    parts: list[_Part],
    samples: Samples,
    group: int,
    units: Units,
    q: FloatArray,
    decided: npt.NDArray[np.str_],
) -> GroupedFeatures:
    def joined(*path: str) -> npt.NDArray[np.float64]:
        return np.concatenate([attrgetter(".".join(path))(part) for part in parts])

    names = samples.group_names
    return GroupedFeatures(
        group=names[group],
        text=samples.text,
        n_inside=units.n_inside,
        n_outside=units.n_outside,
        sae=joined("sae").astype(np.int64),
        feature=joined("feature").astype(np.int64),
        tested=~np.isnan(joined("p")),
        rate_inside=joined("rate_inside"),
        rate_outside=joined("rate_outside"),
        firing=joined("firing", "value"),
        firing_low=joined("firing", "low"),
        firing_high=joined("firing", "high"),
        firing_p=joined("firing_p"),
        activation=joined("activation", "value"),
        activation_low=joined("activation", "low"),
        activation_high=joined("activation", "high"),
        activation_p=joined("activation_p"),
        q=q,
        adjusted=joined("adjusted", "value"),
        adjusted_low=joined("adjusted", "low"),
        adjusted_high=joined("adjusted", "high"),
        adjusted_p=joined("adjusted_p"),
        verdict=decided,
        against=names[1 - group] if len(names) == 2 else None,
    )


def _estimate(fitted: GroupRegression, enough: bool) -> Estimate | None:
    ends = fitted.intervals()
    value, low, high = float(ends.value[0]), float(ends.low[0]), float(ends.high[0])
    return Estimate(value, low, high) if enough and np.isfinite([value, low, high]).all() else None


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

"""Features and columns compared between one group of samples and all others.

The sample is the unit. Firing is tested by Fisher's exact test (Fisher 1935), magnitude by Mann-Whitney (Mann
and Whitney 1947) among the samples that fire: given how often a feature fires the two are independent (a
two-part test, Lachenbruch 1976), and no normal approximation meets thousands of tied zeros. Where several
samples share a cluster, both are replaced by cluster-robust regression.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from daemon.findings.multiplicity import false_discovery_rates, simes
from daemon.findings.regression import Coefficients, Design, design, fit
from daemon.findings.results import (
    BoolArray,
    Estimate,
    FloatArray,
    GroupedColumn,
    GroupedFeatures,
    IntArray,
)
from daemon.findings.sparse import (
    Columns,
    as_columns,
    column_numbers,
    column_of,
    fires,
    ordered_by,
    runs_of,
    stored,
)
from daemon.findings.verdicts import as_verdict, verdicts

MIN_PART = 9  # firing samples inside and outside, for the normal approximation of Mann-Whitney


@dataclass(frozen=True, slots=True)
class Samples:
    """The n samples that are compared by group, in one of their texts."""

    cluster: IntArray  # (n,) from 0
    n_tokens: FloatArray  # (n,) of the text
    group: IntArray  # (n,) index into `group_names`; -1 where the sample has no value
    group_names: tuple[str, ...]
    text: str

    @property
    def clustered(self) -> bool:
        return len(self.cluster) > 0 and int(np.bincount(self.cluster).max()) > 1


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
    min_firing: int = 10  # of the n samples
    min_group: int = 20  # samples that a group needs, and its complement


@dataclass(frozen=True, slots=True)
class _Part:
    """One block in one group; arrays have one entry for each of its features."""

    sae: IntArray
    feature: IntArray
    rate_inside: FloatArray
    rate_outside: FloatArray
    firing: Coefficients  # difference of the rates
    activation: Coefficients  # difference of the means
    activation_p: FloatArray  # of the test of magnitude
    adjusted: Coefficients
    p: FloatArray  # of both tests


def grouped_features(
    blocks: Iterable[ActivationBlock], samples: Samples, settings: GroupedSettings | None = None
) -> tuple[GroupedFeatures, ...]:
    """Compare every feature between each group and all other samples.

    A group has a result where it and its complement have at least `min_group` samples. The false discovery
    rate is over all features of all groups.
    """
    settings = settings or GroupedSettings()
    sizes = np.bincount(samples.group[samples.group >= 0], minlength=len(samples.group_names))
    n = len(samples.group)
    groups = [g for g, size in enumerate(sizes) if min(size, n - size) >= settings.min_group]
    parts: dict[int, list[_Part]] = {group: [] for group in groups}
    for block in blocks:
        activations = as_columns(block.activations)
        ordered = replace(block, activations=ordered_by(activations, activations.data))
        for group in groups:
            parts[group].append(_part(ordered, samples, group, settings))
    if not groups or not parts[groups[0]]:
        return ()
    p = [np.concatenate([part.p for part in parts[group]]) for group in groups]
    q = np.split(false_discovery_rates(np.concatenate(p)), len(groups))
    decided = np.split(_verdicts([part for group in groups for part in parts[group]], settings), len(groups))
    return tuple(
        _result(parts[group], samples, group, p[at], q[at], decided[at]) for at, group in enumerate(groups)
    )


def grouped_column(
    values: FloatArray,
    samples: Samples,
    group: int,
    labels: GroupedColumn,
) -> GroupedColumn:
    """Fill `labels` with the comparison of one column (n,) between a group and all others; NaN is left out.

    `q` and `verdict` are those of this column alone: `fdr_grouped_columns` sets them for all tested together.
    """
    defined = np.isfinite(values)
    inside = samples.group[defined] == group
    y = np.asarray(values, dtype=np.float64)[defined]
    column, cluster = column_of(y), samples.cluster[defined]
    raw = fit(column, _difference(inside, None, cluster))
    adjusted = fit(column, _difference(inside, samples.n_tokens[defined], cluster))
    enough = min(int(inside.sum()), int((~inside).sum())) >= MIN_PART
    p = None
    if enough and samples.clustered:
        p = _number(raw.p[0])
    elif enough:
        p = float(stats.mannwhitneyu(y[inside], y[~inside], method="asymptotic").pvalue)
    filled = replace(
        labels,
        text=samples.text,
        group=samples.group_names[group],
        n_inside=int(inside.sum()),
        n_outside=int((~inside).sum()),
        mean_inside=float(y[inside].mean()) if inside.any() else None,
        difference=_estimate(raw),
        p=p,
        adjusted=_estimate(adjusted),
        adjusted_p=_number(adjusted.p[0]),
    )
    return fdr_grouped_columns([filled])[0]


def fdr_grouped_columns(
    columns: Sequence[GroupedColumn], settings: GroupedSettings | None = None
) -> list[GroupedColumn]:
    """Set the false discovery rate and the verdict of all columns and groups that are tested together."""
    settings = settings or GroupedSettings()
    if not columns:
        return []
    p = np.array([np.nan if column.p is None else column.p for column in columns])
    adjusted_p = np.array([np.nan if c.adjusted_p is None else c.adjusted_p for c in columns])
    raw = np.array([c.difference.value if c.difference else np.nan for c in columns])
    adjusted = np.array([c.adjusted.value if c.adjusted else np.nan for c in columns])
    q = false_discovery_rates(p)
    always = np.ones(len(columns), dtype=bool)
    decided = verdicts(p, q, adjusted_p, np.sign(raw) == np.sign(adjusted), always, settings.target)
    return [
        replace(column, q=_number(rate), verdict=as_verdict(verdict))
        for column, rate, verdict in zip(columns, q, decided, strict=True)
    ]


def _part(block: ActivationBlock, samples: Samples, group: int, settings: GroupedSettings) -> _Part:
    activations = block.activations
    n, k = activations.shape
    inside = samples.group == group
    n_inside = int(inside.sum())
    fired = fires(activations)
    total = stored(activations)
    within = np.rint(fired.T @ inside.astype(np.float64)).astype(np.int64)
    plain = _difference(inside, None, samples.cluster)
    firing, activation = fit(fired, plain), fit(activations, plain)
    adjusted = fit(activations, _difference(inside, samples.n_tokens, samples.cluster))
    enough = total >= settings.min_firing
    magnitude = activation.p
    if not samples.clustered:
        firing = _newcombe(within, n_inside, total - within, n - n_inside)
        magnitude = mann_whitney_of_firing(activations, inside)
    firing_p = np.where(enough & (total < n), firing.p, np.nan)
    magnitude = np.where(enough, magnitude, np.nan)
    return _Part(
        sae=np.full(k, block.sae, dtype=np.int64),
        feature=np.arange(block.first, block.first + k, dtype=np.int64),
        rate_inside=within / n_inside,
        rate_outside=(total - within) / (n - n_inside),
        firing=replace(firing, p=firing_p),
        activation=activation,
        activation_p=magnitude,
        adjusted=adjusted,
        p=simes(firing_p, magnitude),
    )


def _difference(inside: BoolArray, n_tokens: FloatArray | None, cluster: IntArray) -> Design:
    """Regress on belonging to the group, beside an intercept and the tokens."""
    controls = [np.ones(len(inside))]
    if n_tokens is not None and len(n_tokens):
        centred = np.asarray(n_tokens, dtype=np.float64) - np.nanmean(n_tokens)
        controls.append(centred)
    return design(inside.astype(np.float64), np.column_stack(controls), cluster)


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


def _newcombe(inside: IntArray, n_inside: int, outside: IntArray, n_outside: int) -> Coefficients:
    """Return the difference of two rates with its interval, and Fisher's p.

    Hybrid score interval (Newcombe 1998, method 10), from Wilson's interval of each rate.
    """
    first, second = inside / n_inside, outside / n_outside
    first_low, first_high = wilson(first, n_inside)
    second_low, second_high = wilson(second, n_outside)
    value = first - second
    low = value - np.sqrt((first - first_low) ** 2 + (second_high - second) ** 2)
    high = value + np.sqrt((first_high - first) ** 2 + (second - second_low) ** 2)
    return Coefficients(value, low, high, fisher_exact(inside, n_inside, outside, n_outside))


def wilson(share: FloatArray, n: float) -> tuple[FloatArray, FloatArray]:
    """Return the score interval of a share among n (Wilson 1927)."""
    z = float(special.ndtri(0.975))
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return middle - reach, middle + reach


def _verdicts(parts: list[_Part], settings: GroupedSettings) -> npt.NDArray[np.str_]:
    p = np.concatenate([part.p for part in parts])
    adjusted_p = np.concatenate([part.adjusted.p for part in parts])
    raw = np.concatenate([part.activation.value for part in parts])
    adjusted = np.concatenate([part.adjusted.value for part in parts])
    always = np.ones(len(p), dtype=bool)
    q = false_discovery_rates(p)
    return verdicts(p, q, adjusted_p, np.sign(raw) == np.sign(adjusted), always, settings.target)


def _result(
    parts: list[_Part],
    samples: Samples,
    group: int,
    p: FloatArray,
    q: FloatArray,
    decided: npt.NDArray[np.str_],
) -> GroupedFeatures:
    def joined(name: str, end: str = "") -> npt.NDArray[np.float64]:
        arrays = [getattr(part, name) for part in parts]
        return np.concatenate([getattr(array, end) if end else array for array in arrays])

    tested = ~np.isnan(p)

    def end_of(name: str, end: str) -> FloatArray:
        return np.where(tested, joined(name, end), np.nan)

    inside = samples.group == group
    return GroupedFeatures(
        group=samples.group_names[group],
        text=samples.text,
        n_inside=int(inside.sum()),
        n_outside=int((~inside).sum()),
        sae=joined("sae").astype(np.int64),
        feature=joined("feature").astype(np.int64),
        tested=tested,
        rate_inside=joined("rate_inside"),
        rate_outside=joined("rate_outside"),
        firing=joined("firing", "value"),
        firing_low=end_of("firing", "low"),
        firing_high=end_of("firing", "high"),
        firing_p=joined("firing", "p"),
        activation=joined("activation", "value"),
        activation_low=end_of("activation", "low"),
        activation_high=end_of("activation", "high"),
        activation_p=joined("activation_p"),
        q=q,
        adjusted=joined("adjusted", "value"),
        adjusted_low=end_of("adjusted", "low"),
        adjusted_high=end_of("adjusted", "high"),
        adjusted_p=end_of("adjusted", "p"),
        verdict=decided,
    )


def _estimate(fitted: Coefficients) -> Estimate | None:
    value, low, high = float(fitted.value[0]), float(fitted.low[0]), float(fitted.high[0])
    return Estimate(value, low, high) if np.isfinite([value, low, high]).all() else None


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

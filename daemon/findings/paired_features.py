"""Every feature of every dictionary, compared between the two texts of a pair.

Takes features in blocks, so that memory is bounded by a block; what is decided over all features together,
false discovery rates and verdicts, is decided at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from daemon.findings.means import Intervals, mean_intervals
from daemon.findings.multiplicity import false_discovery_rates, simes
from daemon.findings.paired_tests import SignFlipTests, by_size, sign_flip_tests
from daemon.findings.rank_biserial import rank_biserials
from daemon.findings.regression import Coefficients, Design, at_equal_length, fit
from daemon.findings.results import BoolArray, FloatArray, IntArray, PairedFeatures, Pairs, SwapControl
from daemon.findings.sparse import (
    Columns,
    as_columns,
    fires,
    keep_rows,
    stored,
    subtract,
    sum_rows,
    sums,
    sums_of_powers,
)
from daemon.findings.verdicts import matched_agrees, verdicts


@dataclass(frozen=True, slots=True)
class FeatureBlock:
    """Consecutive features of one dictionary: the activations of both texts of every pair."""

    sae: int  # index into the study's dictionaries
    first: int  # index of the first feature in its dictionary
    positive: Columns  # (n, k), 0 where the text does not fire the feature
    negative: Columns  # (n, k)


@dataclass(frozen=True, slots=True)
class PairedSettings:
    """What is fixed before the tests."""

    target: float = 0.05  # false discovery rate
    min_firing: int = 10  # of the 2n texts: with fewer a feature is not tested
    min_informative: int = 6  # clusters that differ: with fewer no test can reach 0.05
    min_group_pairs: int = 20  # pairs that a group needs to count
    swaps: int = 20  # draws of swapped labels
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Study:
    """What is the same for every block."""

    pairs: Pairs
    settings: PairedSettings
    discovery: BoolArray  # (n,) pairs of the half of the clusters on which features are found
    design: Design
    flips: FloatArray  # (clusters, draws)

    @classmethod
    def of(cls, pairs: Pairs, settings: PairedSettings) -> _Study:
        clusters = pairs.n_clusters
        rng = np.random.default_rng([settings.seed, 1])
        discovery = np.zeros(clusters, dtype=bool)
        discovery[rng.permutation(clusters)[: (clusters + 1) // 2]] = True
        flips = rng.choice([-1.0, 1.0], size=(clusters, settings.swaps))
        return cls(pairs, settings, discovery[pairs.cluster], at_equal_length(pairs), flips)


@dataclass(frozen=True, slots=True)
class _Subset:
    """The features of one block among some of the pairs."""

    mean: Intervals
    p: FloatArray  # (k,) of both tests
    informative: IntArray  # (k,) clusters that differ


@dataclass(frozen=True, slots=True)
class _BlockResult:
    """The features of one block; the order is that of the columns."""

    sae: IntArray
    feature: IntArray
    only_positive: IntArray
    only_negative: IntArray
    rate_positive: FloatArray
    rate_negative: FloatArray
    firing: Intervals
    firing_p: FloatArray
    activation: Intervals
    activation_p: FloatArray
    rank_biserial: Intervals
    d_z: FloatArray
    adjusted: Coefficients
    matched: _Subset
    discovery: _Subset
    held_out: _Subset
    groups_agreeing: FloatArray
    groups_counted: IntArray
    swapped_p: FloatArray  # (k, draws)


def paired_features(
    blocks: Iterable[FeatureBlock], pairs: Pairs, settings: PairedSettings | None = None
) -> tuple[PairedFeatures, SwapControl]:
    """Compare every feature between the two texts; also do so with labels swapped at random.

    A feature is tested where at least `min_firing` of the texts fire it and `min_informative` clusters
    differ; neither depends on which text is which, so the filter does not favour either answer (Bourgon et
    al. 2010).
    """
    settings = settings or PairedSettings()
    study = _Study.of(pairs, settings)
    results = [_block(block, study) for block in blocks]
    return _assemble(results, settings), _swap_control(results, settings)


def _block(block: FeatureBlock, study: _Study) -> _BlockResult:
    pairs, settings, n = study.pairs, study.settings, study.pairs.n
    positive, negative = as_columns(block.positive), as_columns(block.negative)
    block = replace(block, positive=positive, negative=negative)
    fired = stored(positive), stored(negative)
    firing = subtract(fires(negative), fires(positive))
    difference = by_size(subtract(negative, positive))
    k = difference.shape[1]
    enough = fired[0] + fired[1] >= settings.min_firing
    tests, ranked = sign_flip_tests(firing, difference, pairs.cluster, pairs.n_clusters)
    firing_p, activation_p = _filtered(tests, settings, enough)
    tested = ~np.isnan(simes(firing_p, activation_p))
    sizes = np.bincount(pairs.cluster, minlength=pairs.n_clusters).astype(np.float64)
    totals = sum_rows(difference, pairs.cluster, pairs.n_clusters)
    adjusted = fit(difference, study.design)
    mean = mean_intervals(totals, sizes).where(tested)
    groups_agreeing, groups_counted = _groups(difference, mean.value, study)

    def among(rows: BoolArray) -> _Subset:
        return _subset(block, firing, difference, rows, study)

    return _BlockResult(
        sae=np.full(k, block.sae, dtype=np.int64),
        feature=np.arange(block.first, block.first + k, dtype=np.int64),
        only_positive=(stored(firing) - np.rint(sums(firing)).astype(np.int64)) // 2,
        only_negative=(stored(firing) + np.rint(sums(firing)).astype(np.int64)) // 2,
        rate_positive=fired[0] / n if n else np.full(k, np.nan),
        rate_negative=fired[1] / n if n else np.full(k, np.nan),
        firing=mean_intervals(tests.firing, sizes).where(tested),
        firing_p=firing_p,
        activation=mean,
        activation_p=activation_p,
        rank_biserial=rank_biserials(difference, ranked, pairs.cluster, pairs.n_clusters).where(tested),
        d_z=d_z(difference),
        adjusted=replace(
            adjusted,
            low=np.where(tested, adjusted.low, np.nan),
            high=np.where(tested, adjusted.high, np.nan),
            p=np.where(tested, adjusted.p, np.nan),
        ),
        matched=among(pairs.matched),
        discovery=among(study.discovery),
        held_out=among(~study.discovery),
        groups_agreeing=groups_agreeing,
        groups_counted=groups_counted,
        swapped_p=_swapped_p(tests, settings, enough, study.flips),
    )


def _subset(
    block: FeatureBlock, firing: Columns, difference: Columns, rows: BoolArray, study: _Study
) -> _Subset:
    """Estimate and test the features among some of the pairs, under the same filter."""
    pairs, clusters = study.pairs, study.pairs.n_clusters
    kept = keep_rows(difference, rows)
    tests, _ = sign_flip_tests(keep_rows(firing, rows), kept, pairs.cluster, clusters)
    fired = stored(keep_rows(block.positive, rows)) + stored(keep_rows(block.negative, rows))
    totals = sum_rows(kept, pairs.cluster, clusters)
    sizes = np.bincount(pairs.cluster[rows], minlength=clusters).astype(np.float64)
    informative = stored(totals)
    return _Subset(
        mean=mean_intervals(totals, sizes).where(informative >= study.settings.min_informative),
        p=simes(*_filtered(tests, study.settings, fired >= study.settings.min_firing)),
        informative=informative,
    )


def _filtered(
    tests: SignFlipTests, settings: PairedSettings, enough: BoolArray
) -> tuple[FloatArray, FloatArray]:
    """Return both p-values, NaN where the filter forbids the test."""
    firing_p, activation_p = tests.p_values()
    firing_informative, activation_informative = tests.informative()
    least = settings.min_informative
    return (
        np.where(enough & (firing_informative >= least), firing_p, np.nan),
        np.where(enough & (activation_informative >= least), activation_p, np.nan),
    )


def _swapped_p(
    tests: SignFlipTests, settings: PairedSettings, enough: BoolArray, flips: FloatArray
) -> FloatArray:
    firing_p, activation_p = tests.p_values(flips)
    firing_informative, activation_informative = tests.informative()
    least = settings.min_informative
    firing_p[~(enough & (firing_informative >= least))] = np.nan
    activation_p[~(enough & (activation_informative >= least))] = np.nan
    return simes(firing_p, activation_p)


def d_z(differences: Columns) -> FloatArray:
    """Return the mean of each column over its standard deviation (Cohen 1988); NaN where it has none."""
    n = differences.shape[0]
    if n < 2:
        return np.full(differences.shape[1], np.nan)
    mean = sums(differences) / n
    squares = sums_of_powers(differences, 2)
    variance = (squares - n * mean**2) / (n - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(variance > 1e-12 * squares / n, mean / np.sqrt(variance), np.nan)


def _groups(difference: Columns, mean: FloatArray, study: _Study) -> tuple[FloatArray, IntArray]:
    """Return the share of the groups whose mean has the sign of all, and of how many.

    A group counts where it has enough pairs and its mean is not zero: one in which a feature is silent, or
    differs as much either way, neither agrees nor disagrees.
    """
    pairs, k = study.pairs, difference.shape[1]
    sizes = np.bincount(pairs.group[pairs.group >= 0], minlength=len(pairs.group_names))
    enough = np.flatnonzero(sizes >= study.settings.min_group_pairs)
    if not len(enough):
        return np.full(k, np.nan), np.zeros(k, dtype=np.int64)
    signs = np.sign(sum_rows(difference, pairs.group, len(sizes)).toarray()[enough])
    counted = (signs != 0).sum(axis=0)
    agreeing = ((signs == np.sign(mean)) & (signs != 0)).sum(axis=0)
    known = (counted > 0) & (mean != 0)
    return np.where(known, agreeing / np.maximum(counted, 1), np.nan), counted.astype(np.int64)


def _assemble(results: list[_BlockResult], settings: PairedSettings) -> PairedFeatures:
    def joined(*path: str) -> npt.NDArray[np.float64]:
        arrays: list[npt.NDArray[np.float64]] = [attrgetter(".".join(path))(result) for result in results]
        return np.concatenate(arrays or [np.zeros(0)])

    def joined_int(*path: str) -> IntArray:
        return joined(*path).astype(np.int64)

    p = simes(joined("firing_p"), joined("activation_p"))
    q = false_discovery_rates(p)
    sign = np.sign(joined("activation", "value"))
    agrees = matched_agrees(
        sign,
        joined("matched", "mean", "value"),
        joined("matched", "mean", "low"),
        joined("matched", "mean", "high"),
        joined_int("matched", "informative"),
    )
    same_sign = np.sign(joined("adjusted", "value")) == sign
    half_q = false_discovery_rates(joined("discovery", "p"))
    return PairedFeatures(
        sae=joined_int("sae"),
        feature=joined_int("feature"),
        tested=~np.isnan(p),
        only_positive=joined_int("only_positive"),
        only_negative=joined_int("only_negative"),
        rate_positive=joined("rate_positive"),
        rate_negative=joined("rate_negative"),
        firing=joined("firing", "value"),
        firing_low=joined("firing", "low"),
        firing_high=joined("firing", "high"),
        firing_p=joined("firing_p"),
        activation=joined("activation", "value"),
        activation_low=joined("activation", "low"),
        activation_high=joined("activation", "high"),
        activation_p=joined("activation_p"),
        rank_biserial=joined("rank_biserial", "value"),
        rank_biserial_low=joined("rank_biserial", "low"),
        rank_biserial_high=joined("rank_biserial", "high"),
        d_z=joined("d_z"),
        q=q,
        q_dependent=false_discovery_rates(p, "by"),
        adjusted=joined("adjusted", "value"),
        adjusted_low=joined("adjusted", "low"),
        adjusted_high=joined("adjusted", "high"),
        adjusted_p=joined("adjusted", "p"),
        matched=joined("matched", "mean", "value"),
        matched_low=joined("matched", "mean", "low"),
        matched_high=joined("matched", "mean", "high"),
        matched_p=joined("matched", "p"),
        found_on_half=np.nan_to_num(half_q, nan=1.0) <= settings.target,
        held_out=joined("held_out", "mean", "value"),
        held_out_low=joined("held_out", "mean", "low"),
        held_out_high=joined("held_out", "mean", "high"),
        groups_agreeing=joined("groups_agreeing"),
        groups_counted=joined_int("groups_counted"),
        verdict=verdicts(p, q, joined("adjusted", "p"), same_sign, agrees, settings.target),
    )


def _swap_control(results: list[_BlockResult], settings: PairedSettings) -> SwapControl:
    p = np.concatenate([result.swapped_p for result in results] or [np.zeros((0, settings.swaps))])
    rates = np.column_stack([false_discovery_rates(draw) for draw in p.T]) if len(p) else p
    found = (np.nan_to_num(rates, nan=1.0) <= settings.target).sum(axis=0)
    return SwapControl(found=found.astype(np.int64), target=settings.target)

"""The statistics of pairs equal plain scipy, pandas and statsmodels, one feature at a time."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.multitest import multipletests

from daemon.findings.paired_columns import fdr_columns, paired_column
from daemon.findings.paired_features import FeatureBlock, PairedSettings, paired_features
from daemon.findings.results import PairedFeatures, Pairs

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def make_pairs(n: int, seed: int = 0, *, clustered: bool = False, log_prob: bool = False) -> Pairs:
    rng = np.random.default_rng(seed)
    cluster = np.sort(rng.integers(0, n * 2 // 3, n)) if clustered else np.arange(n)
    cluster = np.unique(cluster, return_inverse=True)[1]
    return Pairs(
        cluster=cluster,
        d_tokens=np.rint(rng.normal(1, 2, n)),
        d_log_prob=rng.normal(0, 1, n) if log_prob else None,
        group=rng.integers(-1, 3, n),
        group_names=("a", "b", "c"),
    )


def make_activations(n: int, features: int, seed: int, *, levels: bool = False, signed: bool = False):
    """Features of many rates, some of which differ; with few `levels` sizes are tied."""
    rng = np.random.default_rng(seed)
    rate = np.geomspace(0.02, 1.0, features)
    texts = []
    for side in range(2):
        tilt = 1 + 0.6 * side * (np.arange(features) % 3 == 0)
        active = rng.random((n, features)) < np.minimum(rate * tilt, 1)
        size = rng.lognormal(0.2 * side * (np.arange(features) % 4 == 0), 0.5, (n, features))
        if levels:
            size = np.ceil(size)
        if signed:
            size *= rng.choice([-1, 1], size.shape)
        texts.append(active * size)
    return texts


def blocks_of(positive: np.ndarray, negative: np.ndarray, width: int) -> list[FeatureBlock]:
    return [
        FeatureBlock(
            sae=0,
            first=first,
            positive=scipy.sparse.csc_matrix(positive[:, first : first + width]),
            negative=scipy.sparse.csc_matrix(negative[:, first : first + width]),
        )
        for first in range(0, positive.shape[1], width)
    ]


def clustered_p(totals: pd.Series) -> float:
    spread = math.sqrt((totals**2).sum())
    return 2 * stats.norm.sf(max(abs(totals.sum()) - 1, 0) / spread) if spread else 1.0


def plain_firing_p(positive: pd.Series, negative: pd.Series, cluster: np.ndarray) -> tuple[float, int]:
    change = (negative != 0).astype(int) - (positive != 0).astype(int)
    totals = change.groupby(cluster).sum()
    informative = int((totals != 0).sum())
    if len(totals) == len(change):
        plus, minus = int((change > 0).sum()), int((change < 0).sum())
        return stats.binomtest(plus, plus + minus).pvalue if plus + minus else 1.0, informative
    return clustered_p(totals), informative


def plain_activation_p(difference: pd.Series, cluster: np.ndarray) -> tuple[float, int]:
    nonzero = difference[difference != 0]
    ranks = nonzero.abs().rank() * np.sign(nonzero)
    totals = ranks.groupby(cluster[nonzero.index]).sum()
    informative = int((totals != 0).sum())
    if len(np.unique(cluster)) == len(cluster):
        return (stats.wilcoxon(nonzero).pvalue if len(nonzero) else 1.0), informative
    return clustered_p(totals), informative


def plain_intercept(difference: np.ndarray, pairs: Pairs, rows: np.ndarray, controls: list[np.ndarray]):
    design = np.column_stack([np.ones(rows.sum()), *(control[rows] for control in controls)])
    return sm.OLS(difference[rows], design).fit(
        cov_type="cluster", cov_kwds={"groups": pairs.cluster[rows]}, use_t=True
    )


def plain_rank_biserial(difference: pd.Series) -> float:
    nonzero = difference[difference != 0]
    ranks = nonzero.abs().rank()
    return float((ranks * np.sign(nonzero)).sum() / ranks.sum()) if len(nonzero) else math.nan


def simes_of(first: float, second: float) -> float:
    defined = sorted(p for p in (first, second) if not math.isnan(p))
    return min((len(defined) * p / (at + 1) for at, p in enumerate(defined)), default=math.nan)


def plain_p(positive: np.ndarray, negative: np.ndarray, cluster: np.ndarray) -> tuple[float, float]:
    """Both tests under the filter."""
    before, after = pd.Series(positive), pd.Series(negative)
    firing, firing_informative = plain_firing_p(before, after, cluster)
    activation, activation_informative = plain_activation_p(after - before, cluster)
    enough = (before != 0).sum() + (after != 0).sum() >= 10
    return (
        firing if enough and firing_informative >= 6 else math.nan,
        activation if enough and activation_informative >= 6 else math.nan,
    )


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("kind", ["plain", "levels", "signed"])
@pytest.mark.parametrize("n", [24, 120])
def test_features_equal_plain_computation(n: int, kind: str, clustered: bool) -> None:
    pairs = make_pairs(n, clustered=clustered, log_prob=kind == "signed")
    features = 5 if kind == "levels" else 12  # scipy enumerates all signs of few tied ranks, which takes long
    positive, negative = make_activations(n, features, 5, levels=kind == "levels", signed=kind == "signed")
    found, _ = paired_features(blocks_of(positive, negative, 4), pairs)
    assert found.feature.tolist() == list(range(features))
    combined = []
    for f in range(features):
        firing_p, activation_p = plain_p(positive[:, f], negative[:, f], pairs.cluster)
        np.testing.assert_allclose(found.firing_p[f], firing_p, **CLOSE)
        np.testing.assert_allclose(found.activation_p[f], activation_p, **CLOSE)
        combined.append(simes_of(firing_p, activation_p))
        check_effects(found, f, positive[:, f], negative[:, f], pairs)
        same = pairs.matched
        matched_p = simes_of(*plain_p(positive[same, f], negative[same, f], pairs.cluster[same]))
        np.testing.assert_allclose(found.matched_p[f], matched_p, **CLOSE)
    tested = ~np.isnan(combined)
    np.testing.assert_array_equal(found.tested, tested)
    for method, rates in (("fdr_bh", found.q), ("fdr_by", found.q_dependent)):
        expected = multipletests(np.array(combined)[tested], method=method)[1]
        np.testing.assert_allclose(rates[tested], expected, **CLOSE)
    larger = np.maximum(np.array(combined)[tested], found.adjusted_p[tested])
    held = multipletests(larger, alpha=0.05, method="fdr_bh")[0]
    assert not (found.verdict[tested] == "holds")[~held].any()


def check_effects(
    found: PairedFeatures, f: int, positive: np.ndarray, negative: np.ndarray, pairs: Pairs
) -> None:
    difference = negative - positive
    fired = (negative != 0).astype(float) - (positive != 0)
    assert found.only_negative[f] == (fired > 0).sum()
    assert found.only_positive[f] == (fired < 0).sum()
    assert found.rate_negative[f] == (negative != 0).mean()
    everything = np.ones(pairs.n, dtype=bool)
    controls = [pairs.d_tokens] if pairs.d_log_prob is None else [pairs.d_tokens, pairs.d_log_prob]
    cases = [
        ("firing", fired, everything, []),
        ("activation", difference, everything, []),
        ("adjusted", difference, everything, controls),
        ("matched", difference, pairs.matched, []),
    ]
    for name, values, rows, regressors in cases:
        model = plain_intercept(values, pairs, rows, regressors)
        np.testing.assert_allclose(getattr(found, name)[f], model.params[0], **CLOSE)
        low = getattr(found, f"{name}_low")[f]
        if not np.isnan(low):
            ends = (low, getattr(found, f"{name}_high")[f])
            np.testing.assert_allclose(ends, model.conf_int()[0], **CLOSE)
            if name == "adjusted":
                np.testing.assert_allclose(found.adjusted_p[f], model.pvalues[0], **CLOSE)
    np.testing.assert_allclose(found.rank_biserial[f], plain_rank_biserial(pd.Series(difference)), **CLOSE)
    deviation = difference.std(ddof=1)
    expected_d_z = difference.mean() / deviation if deviation > 0 else math.nan
    np.testing.assert_allclose(found.d_z[f], expected_d_z, **CLOSE)
    shares = pd.Series(difference).groupby(pairs.group).agg(["mean", "size"]).drop(index=-1, errors="ignore")
    counted = shares[(shares["size"] >= 20) & (shares["mean"].abs() > 1e-12)]
    assert found.groups_counted[f] == len(counted)
    if len(counted) and difference.mean() != 0:
        expected = (np.sign(counted["mean"]) == np.sign(difference.mean())).mean()
        np.testing.assert_allclose(found.groups_agreeing[f], expected, **CLOSE)


def test_blocks_change_nothing() -> None:
    pairs = make_pairs(80)
    positive, negative = make_activations(80, 12, 3)
    whole, whole_swapped = paired_features(blocks_of(positive, negative, 12), pairs)
    parts, parts_swapped = paired_features(blocks_of(positive, negative, 5), pairs)
    for name in PairedFeatures.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    np.testing.assert_array_equal(whole_swapped.found, parts_swapped.found)


def test_swapping_the_texts_changes_signs_alone() -> None:
    pairs = make_pairs(80, clustered=True)
    positive, negative = make_activations(80, 12, 3)
    mirrored = Pairs(pairs.cluster, -pairs.d_tokens, None, pairs.group, pairs.group_names)
    one, _ = paired_features(blocks_of(positive, negative, 12), pairs)
    other, _ = paired_features(blocks_of(negative, positive, 12), mirrored)
    for name in ("firing_p", "activation_p", "q", "adjusted_p", "matched_p"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), **CLOSE)
    for name in ("firing", "activation", "rank_biserial", "adjusted"):
        np.testing.assert_allclose(getattr(one, name), -getattr(other, name), **CLOSE)
        np.testing.assert_allclose(getattr(one, f"{name}_low"), -getattr(other, f"{name}_high"), **CLOSE)
    np.testing.assert_array_equal(one.verdict, other.verdict)


@pytest.mark.parametrize("clustered", [False, True])
def test_column_equals_plain_computation(clustered: bool) -> None:
    rng = np.random.default_rng(1)
    pairs = make_pairs(120, clustered=clustered)
    values = rng.normal(0.3, 1, 120) + 0.2 * pairs.d_tokens
    values[rng.choice(120, 15, replace=False)] = np.nan
    values[rng.choice(120, 5, replace=False)] = 0
    finding = paired_column(values, pairs)
    rows = ~np.isnan(values)
    series = pd.Series(values[rows])
    assert (finding.n, finding.n_clusters) == (rows.sum(), len(np.unique(pairs.cluster[rows])))
    p, _ = plain_activation_p(series, pairs.cluster[rows])
    np.testing.assert_allclose(finding.p, p, **CLOSE)
    for estimate, where, controls in (
        (finding.raw, rows, []),
        (finding.adjusted, rows, [pairs.d_tokens]),
        (finding.matched, rows & pairs.matched, []),
    ):
        model = plain_intercept(values, pairs, where, controls)
        assert estimate is not None
        expected = [model.params[0], *model.conf_int()[0]]
        np.testing.assert_allclose([estimate.value, estimate.low, estimate.high], expected, **CLOSE)
    assert finding.rank_biserial is not None
    np.testing.assert_allclose(finding.rank_biserial.value, plain_rank_biserial(series), **CLOSE)
    np.testing.assert_allclose(finding.deviation, series.std(), **CLOSE)
    np.testing.assert_allclose(finding.d_z, series.mean() / series.std(), **CLOSE)


def test_columns_share_one_false_discovery_rate() -> None:
    rng = np.random.default_rng(2)
    pairs = make_pairs(100)
    columns = [paired_column(rng.normal(shift, 1, 100), pairs) for shift in (0.6, 0.3, 0, 0, 0)]
    together = fdr_columns(columns)
    expected = multipletests([column.p for column in columns], method="fdr_bh")[1]
    np.testing.assert_allclose([column.q for column in together], expected, **CLOSE)
    assert together[0].verdict == "holds"
    assert {column.verdict for column in together[2:]} == {"none"}
    assert fdr_columns([]) == []


def test_column_of_length_alone_is_controlled_away() -> None:
    rng = np.random.default_rng(3)
    pairs = make_pairs(400)
    finding = paired_column(0.5 * pairs.d_tokens + rng.normal(0, 0.5, 400), pairs)
    assert finding.verdict == "controls"
    assert finding.adjusted is not None
    assert finding.adjusted.low < 0 < finding.adjusted.high


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_pairs_give_no_number(n: int) -> None:
    pairs = make_pairs(n) if n > 1 else one_or_none(n)
    positive, negative = np.ones((n, 3)), 2 * np.ones((n, 3))
    found, swapped = paired_features(blocks_of(positive, negative, 3), pairs)
    assert not found.tested.any()
    assert (found.verdict == "few").all()
    assert np.isnan(found.activation_low).all()
    assert (swapped.found == 0).all()
    finding = paired_column(np.ones(n), pairs)
    assert (finding.p, finding.q, finding.verdict) == (None, None, "few")


def one_or_none(n: int) -> Pairs:
    return Pairs(np.zeros(n, int), np.zeros(n), None, np.full(n, -1), ())


def test_no_blocks_give_empty_arrays() -> None:
    found, swapped = paired_features([], make_pairs(30))
    assert len(found.q) == found.n_found == 0
    assert (swapped.found == 0).all()


def test_silent_and_unchanged_features_are_not_tested() -> None:
    pairs = make_pairs(40)
    silent, constant = np.zeros(40), np.full(40, 1.5)
    texts = np.column_stack([silent, constant])
    found, _ = paired_features(blocks_of(texts, texts, 2), pairs)
    assert found.verdict.tolist() == ["few", "few"]
    assert found.activation.tolist() == [0, 0]
    assert found.rate_positive.tolist() == [0, 1]
    assert np.isnan(found.rank_biserial).all()
    assert np.isnan(found.d_z).all()


def test_one_cluster_is_no_evidence() -> None:
    pairs = Pairs(np.zeros(50, int), np.arange(50.0) - 20, None, np.zeros(50, int), ("a",))
    positive, negative = make_activations(50, 4, 1)
    found, _ = paired_features(blocks_of(positive, negative + 1, 4), pairs)
    assert (found.verdict == "few").all()
    assert np.isnan(found.activation_low).all()
    assert np.isnan(found.adjusted).all()
    assert paired_column(np.arange(50.0) + 1, pairs).raw is None


def test_constant_difference_in_tokens_can_not_be_adjusted() -> None:
    rng = np.random.default_rng(4)
    pairs = make_pairs(100)
    shifted = Pairs(pairs.cluster, np.full(100, 3.0), None, pairs.group, pairs.group_names)
    finding = paired_column(rng.normal(1, 1, 100), shifted)
    assert (finding.adjusted, finding.adjusted_p, finding.matched, finding.n_matched) == (None, None, None, 0)
    assert finding.verdict == "controls"
    equal = Pairs(pairs.cluster, np.zeros(100), None, pairs.group, pairs.group_names)
    finding = paired_column(rng.normal(1, 1, 100), equal)
    for estimate in (finding.adjusted, finding.matched):
        assert estimate is not None and finding.raw is not None
        np.testing.assert_allclose(
            (estimate.value, estimate.low, estimate.high),
            (finding.raw.value, finding.raw.low, finding.raw.high),
            **CLOSE,
        )
    assert finding.verdict == "holds"


def test_pairs_of_equal_length_overrule_the_regression() -> None:
    rng = np.random.default_rng(6)
    pairs = make_pairs(300)
    values = np.where(pairs.matched, -1.0, 1.0) + rng.normal(0, 0.3, 300)
    finding = paired_column(values, pairs)
    assert finding.adjusted is not None
    assert finding.adjusted.low > 0
    assert finding.matched is not None
    assert finding.matched.high < 0
    assert finding.verdict == "controls"


def test_log_probabilities_that_are_missing_leave_their_pairs_out() -> None:
    rng = np.random.default_rng(7)
    pairs = make_pairs(90, log_prob=True)
    assert pairs.d_log_prob is not None
    pairs.d_log_prob[:10] = np.nan
    values = rng.normal(0, 1, 90)
    finding = paired_column(values, pairs)
    rows = np.isfinite(pairs.d_log_prob)
    model = plain_intercept(values, pairs, rows, [pairs.d_tokens, pairs.d_log_prob])
    assert finding.adjusted is not None
    np.testing.assert_allclose(finding.adjusted.value, model.params[0], **CLOSE)
    np.testing.assert_allclose(finding.adjusted_p, model.pvalues[0], **CLOSE)


def test_more_informative_pairs_can_be_asked_for() -> None:
    pairs = make_pairs(60)
    positive, negative = make_activations(60, 8, 2)
    found, _ = paired_features(blocks_of(positive, negative, 8), pairs, PairedSettings(min_informative=60))
    assert np.isnan(found.firing_p).all()

"""Statistics of groups, prevalence and probes, against plain scipy and statsmodels."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from daemon.findings.grouped import (
    ActivationBlock,
    Samples,
    fdr_grouped_columns,
    grouped_column,
    grouped_features,
)
from daemon.findings.prevalence import co_occurrence, prevalence
from daemon.findings.probe import probe_pairs, share_with_interval
from daemon.findings.results import GroupedColumn, Pairs

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def make_samples(n: int, *, clustered: bool = False) -> Samples:
    rng = np.random.default_rng(0)
    return Samples(
        cluster=np.arange(n) // 2 if clustered else np.arange(n),
        n_tokens=np.rint(rng.normal(40, 8, n)),
        group=rng.choice([-1, 0, 1, 2], n, p=[0.1, 0.35, 0.5, 0.05]),
        group_names=("a", "b", "small"),
        text="fact",
    )


def make_activations(samples: Samples, features: int, *, levels: bool = False) -> np.ndarray:
    rng = np.random.default_rng(1)
    n = len(samples.group)
    rate = np.geomspace(0.05, 0.9, features) * np.where(samples.group == 0, 1.1, 0.8)[:, None]
    size = rng.lognormal(0, 0.5, (n, features))
    return (rng.random((n, features)) < rate) * (np.ceil(size) if levels else size)


def regression(y: np.ndarray, samples: Samples, inside: np.ndarray, *controls: np.ndarray):
    design = np.column_stack([inside.astype(float), np.ones(len(y)), *controls])
    return sm.OLS(y, design).fit(cov_type="cluster", cov_kwds={"groups": samples.cluster}, use_t=True)


@pytest.mark.parametrize("levels", [False, True])
def test_grouped_features_equal_plain_computation(levels: bool) -> None:
    samples = make_samples(150)
    activations = make_activations(samples, 10, levels=levels)
    blocks = [
        ActivationBlock(0, 0, scipy.sparse.csc_matrix(activations[:, :6])),
        ActivationBlock(0, 6, scipy.sparse.csc_matrix(activations[:, 6:])),
    ]
    results = grouped_features(blocks, samples)
    assert [result.group for result in results] == ["a", "b"]  # the third has too few samples
    combined = []
    for group, result in enumerate(results):
        inside = samples.group == group
        for f in range(10):
            y = activations[:, f]
            fired = y != 0
            table = [
                [np.sum(fired & inside), np.sum(~fired & inside)],
                [np.sum(fired & ~inside), np.sum(~fired & ~inside)],
            ]
            firing_p = stats.fisher_exact(table).pvalue if fired.sum() >= 10 else np.nan
            np.testing.assert_allclose(result.firing_p[f], firing_p, **CLOSE)
            parts = y[fired & inside], y[fired & ~inside]
            enough = fired.sum() >= 10 and min(map(len, parts)) >= 9
            activation_p = stats.mannwhitneyu(*parts, method="asymptotic").pvalue if enough else np.nan
            np.testing.assert_allclose(result.activation_p[f], activation_p, **CLOSE)
            defined = np.sort([p for p in (firing_p, activation_p) if not np.isnan(p)])
            combined.append(np.min(defined * len(defined) / np.arange(1, len(defined) + 1), initial=9))
            plain = regression(y, samples, inside)
            np.testing.assert_allclose(result.activation[f], plain.params[0], **CLOSE)
            adjusted = regression(y, samples, inside, samples.n_tokens)
            np.testing.assert_allclose(result.adjusted[f], adjusted.params[0], **CLOSE)
            if result.tested[f]:
                np.testing.assert_allclose(result.activation_low[f], plain.conf_int()[0, 0], **CLOSE)
                np.testing.assert_allclose(result.adjusted_p[f], adjusted.pvalues[0], **CLOSE)
                ends = confint_proportions_2indep(
                    table[0][0], inside.sum(), table[1][0], (~inside).sum(), method="newcomb"
                )
                np.testing.assert_allclose([result.firing_low[f], result.firing_high[f]], ends, **CLOSE)
    combined = np.array(combined)
    tested = combined < 9
    q = np.concatenate([result.q for result in results])
    np.testing.assert_allclose(q[tested], multipletests(combined[tested], method="fdr_bh")[1], **CLOSE)
    assert np.isnan(q[~tested]).all()


def test_grouped_features_of_clusters_are_tested_by_regression() -> None:
    samples = make_samples(160, clustered=True)
    activations = make_activations(samples, 8)[:, 2:]
    result = grouped_features([ActivationBlock(0, 0, scipy.sparse.csc_matrix(activations))], samples)[0]
    for f in range(6):
        fired = regression((activations[:, f] != 0).astype(float), samples, samples.group == 0)
        active = regression(activations[:, f], samples, samples.group == 0)
        np.testing.assert_allclose(result.firing_p[f], fired.pvalues[0], **CLOSE)
        np.testing.assert_allclose(result.activation_p[f], active.pvalues[0], **CLOSE)


def test_groups_that_are_too_small_have_no_result() -> None:
    samples = make_samples(15)
    block = ActivationBlock(0, 0, scipy.sparse.csc_matrix(make_activations(samples, 3)))
    assert grouped_features([block], samples) == ()
    assert grouped_features([], make_samples(150)) == ()


def grouped_labels() -> GroupedColumn:
    return GroupedColumn("entropy", None, "nat", "", "", "", 0, 0, None, None, None, None, None, None, "few")


def test_grouped_column_equals_plain_computation() -> None:
    samples = make_samples(150)
    rng = np.random.default_rng(2)
    values = rng.normal(0, 1, 150) + (samples.group == 0)
    values[:7] = np.nan
    rows, inside = ~np.isnan(values), samples.group == 0
    found = grouped_column(values, samples, 0, grouped_labels())
    plain = stats.mannwhitneyu(values[rows & inside], values[rows & ~inside], method="asymptotic")
    np.testing.assert_allclose(found.p, plain.pvalue, **CLOSE)
    assert (found.n_inside, found.n_outside) == ((rows & inside).sum(), (rows & ~inside).sum())
    assert found.difference is not None
    difference = np.mean(values[rows & inside]) - np.mean(values[rows & ~inside])
    np.testing.assert_allclose(found.difference.value, difference, **CLOSE)
    assert (found.group, found.text, found.verdict) == ("a", "fact", "holds")
    other = grouped_column(rng.normal(0, 1, 150), samples, 1, grouped_labels())
    together = fdr_grouped_columns([found, other])
    assert found.p is not None and other.p is not None
    np.testing.assert_allclose(
        [column.q for column in together], multipletests([found.p, other.p], method="fdr_bh")[1], **CLOSE
    )


def test_prevalence_counts_samples() -> None:
    activations = np.zeros((40, 4))
    activations[:20, 0] = 2
    activations[5:20, 1] = 1
    activations[:, 2] = 1  # goes with everything
    found = prevalence([ActivationBlock(1, 100, scipy.sparse.csc_matrix(activations))], "fact")
    assert found.feature.tolist() == [100, 101, 102, 103]
    assert found.rate.tolist() == [0.5, 0.375, 1, 0]
    np.testing.assert_array_equal(found.mean_active, [2, 1, 1, np.nan])
    (couple,) = found.together
    assert (couple.sae, couple.first, couple.second, couple.both) == (1, 100, 101, 15)
    assert couple.jaccard == 15 / 20
    assert couple.lift == pytest.approx((15 / 40) / (0.5 * 0.375))


def test_couples_are_the_strongest_of_all() -> None:
    rng = np.random.default_rng(3)
    fired = rng.random((80, 30)) < rng.uniform(0.1, 0.6, 30)
    found = co_occurrence(scipy.sparse.csc_matrix(fired.astype(float)), 0, 0, couples=9)
    expected = []
    for i in range(30):
        for j in range(i + 1, 30):
            both = int((fired[:, i] & fired[:, j]).sum())
            if both >= 10 and fired[:, i].mean() <= 0.5 and fired[:, j].mean() <= 0.5:
                expected.append((both / int((fired[:, i] | fired[:, j]).sum()), i, j))
    expected.sort(reverse=True)
    assert [c.jaccard for c in found] == [jaccard for jaccard, _, _ in expected[:9]]


def pairs_of(cluster: np.ndarray, d_tokens: np.ndarray) -> Pairs:
    return Pairs(cluster, d_tokens, None, np.full(len(cluster), -1), ())


def test_probe_finds_a_direction_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(4)
    pairs = pairs_of(np.arange(400), rng.integers(-1, 2, 400))
    noise = rng.normal(0, 1, (400, 30))
    nothing = probe_pairs(noise, pairs, "noise").accuracy
    assert nothing is not None
    assert nothing.low < 0.5 < nothing.high
    noise[:, 3] += 2
    something = probe_pairs(noise, pairs, "signal")
    assert something.accuracy is not None and something.matched is not None
    assert something.accuracy.value > 0.9
    assert something.n_matched == (pairs.d_tokens == 0).sum()


def test_probe_in_pairs_equals_probe_in_features() -> None:
    """With more features than pairs the same probe is solved from a matrix of pairs."""
    rng = np.random.default_rng(5)
    pairs = pairs_of(np.arange(120), np.zeros(120))
    wide = np.zeros((120, 500))
    wide[:, :60] = rng.normal(0.15, 1, (120, 60))
    narrow = probe_pairs(scipy.sparse.csr_matrix(wide[:, :60]), pairs, "x")
    padded = np.concatenate([wide, np.full((120, 1), 1e-9)], axis=1)  # a stored value keeps its column
    padded[:, 60:] = 1e-9
    dual = probe_pairs(scipy.sparse.csr_matrix(padded), pairs, "x")
    assert dual.accuracy is not None and narrow.accuracy is not None
    assert abs(dual.accuracy.value - narrow.accuracy.value) <= 0.05


def test_probe_of_length_alone_is_the_share_of_longer_texts() -> None:
    rng = np.random.default_rng(6)
    d_tokens = rng.integers(-2, 6, 300).astype(float)
    found = probe_pairs(d_tokens[:, None], pairs_of(np.arange(300), d_tokens), "length")
    assert found.accuracy is not None and found.matched is not None
    assert found.accuracy.value == np.mean((d_tokens > 0) + 0.5 * (d_tokens == 0))
    assert found.matched.value == 0.5


def test_probe_does_not_learn_from_pairs_of_the_held_out_cluster() -> None:
    """Each cluster has a direction of its own: only a probe that saw it would tell its pairs apart."""
    rng = np.random.default_rng(7)
    cluster = np.repeat(np.arange(60), 5)
    own = rng.normal(0, 1, (60, 200))[cluster] + rng.normal(0, 0.1, (300, 200))
    found = probe_pairs(own, pairs_of(cluster, np.zeros(300)), "x").accuracy
    assert found is not None
    assert found.low < 0.5 < found.high
    assert found.high - found.low > 0.2  # of sixty clusters, not of three hundred pairs


@pytest.mark.parametrize("n", [0, 1, 19])
def test_probe_of_too_few_pairs_says_so(n: int) -> None:
    found = probe_pairs(np.ones((n, 2)), pairs_of(np.arange(n), np.zeros(n)), "x")
    assert found.accuracy is None
    assert "too few pairs" in found.reason


def test_probe_refuses_what_is_not_finite_and_survives_zeros() -> None:
    pairs = pairs_of(np.arange(40), np.zeros(40))
    holed = np.ones((40, 2))
    holed[3, 0] = np.nan
    assert "not finite" in probe_pairs(holed, pairs, "x").reason
    zeros = probe_pairs(scipy.sparse.csr_matrix((40, 7)), pairs, "x").accuracy
    assert zeros is not None
    assert zeros.value == 0.5


def test_interval_of_a_share_is_wilsons() -> None:
    correct = np.repeat([1.0, 0.0], [70, 30])
    found = share_with_interval(correct, np.arange(100))
    assert found is not None
    expected = proportion_confint(70, 100, method="wilson")
    np.testing.assert_allclose([found.low, found.high], expected, **CLOSE)
    assert share_with_interval(np.zeros(0), np.zeros(0, int)) is None

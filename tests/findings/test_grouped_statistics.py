"""Statistics of groups, prevalence and probes, against plain scipy and statsmodels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from daemon.findings.grouped import (
    ActivationBlock,
    fdr_grouped_columns,
    grouped_column,
    grouped_features,
    skewed_least,
)
from daemon.findings.prevalence import co_occurrence, prevalence
from daemon.findings.probe import probe_pairs, share_with_interval
from daemon.findings.results import GroupedColumn, GroupedFeatures, Pairs
from daemon.findings.units import Samples, small_groups

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def make_samples(n: int) -> Samples:
    rng = np.random.default_rng(0)
    return Samples(
        cluster=np.arange(n),
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


@pytest.mark.parametrize("levels", [False, True])
def test_grouped_features_equal_plain_computation(levels: bool) -> None:
    samples = make_samples(150)
    activations = make_activations(samples, 10, levels=levels)
    blocks = [
        ActivationBlock(0, 0, scipy.sparse.csc_matrix(activations[:, :6])),
        ActivationBlock(0, 6, scipy.sparse.csc_matrix(activations[:, 6:])),
    ]
    results = grouped_features(blocks, samples)
    assert [(one.group, one.against) for one in results] == [
        ("a", None),
        ("b", None),
    ]  # the third is too small
    combined = []
    for group, result in enumerate(results):
        inside, outside = samples.group == group, (samples.group >= 0) & (samples.group != group)
        assert (result.n_inside, result.n_outside) == (inside.sum(), outside.sum())
        for f in range(10):
            y = activations[:, f]
            fired = y != 0
            table = [
                [np.sum(fired & inside), np.sum(~fired & inside)],
                [np.sum(fired & outside), np.sum(~fired & outside)],
            ]
            enough = (fired & (inside | outside)).sum() >= 10
            firing_p = stats.fisher_exact(table).pvalue if enough else np.nan
            np.testing.assert_allclose(result.firing_p[f], firing_p, **CLOSE)
            parts = y[fired & inside], y[fired & outside]
            enough = enough and min(map(len, parts)) >= 9
            activation_p = stats.mannwhitneyu(*parts, method="asymptotic").pvalue if enough else np.nan
            np.testing.assert_allclose(result.activation_p[f], activation_p, **CLOSE)
            combined.append(plain_simes(firing_p, activation_p))
            assert result.tested[f] == (not np.isnan(combined[-1]))
            difference = y[inside].mean() - y[outside].mean()
            np.testing.assert_allclose(result.activation[f], difference, **CLOSE)
            used = inside | outside
            design = np.column_stack([inside, np.ones(len(y)), samples.n_tokens, samples.n_tokens**2])[used]
            adjusted = sm.OLS(y[used], design).fit()
            np.testing.assert_allclose(result.adjusted[f], adjusted.params[0], rtol=1e-7)
            if result.tested[f]:
                ends = confint_proportions_2indep(
                    table[0][0], inside.sum(), table[1][0], outside.sum(), method="newcomb"
                )
                np.testing.assert_allclose([result.firing_low[f], result.firing_high[f]], ends, **CLOSE)
                assert 0 <= result.adjusted_p[f] <= 1
    combined = np.array(combined)
    tested = ~np.isnan(combined)
    q = np.concatenate([result.q for result in results])
    np.testing.assert_allclose(q[tested], multipletests(combined[tested], method="fdr_bh")[1], **CLOSE)
    assert np.isnan(q[~tested]).all()


def plain_simes(*p: float) -> float:
    defined = np.sort([one for one in p if not np.isnan(one)])
    return float(np.min(defined * len(defined) / np.arange(1, len(defined) + 1))) if len(defined) else np.nan


def test_repeated_texts_count_once() -> None:
    """Every number is that of the same study with each text once on either side."""
    samples = make_samples(150)
    activations = make_activations(samples, 8)
    again = np.concatenate([np.arange(150), np.repeat(np.flatnonzero(samples.group >= 0)[:30], 3)])
    repeated = replace(
        samples,
        cluster=samples.cluster[again],
        n_tokens=samples.n_tokens[again],
        group=samples.group[again],
    )
    once = grouped_features([ActivationBlock(0, 0, scipy.sparse.csc_matrix(activations))], samples)
    often = grouped_features([ActivationBlock(0, 0, scipy.sparse.csc_matrix(activations[again]))], repeated)
    assert len(once) == len(often) == 2
    for one, other in zip(once, often, strict=True):
        for name in GroupedFeatures.__dataclass_fields__:
            mine, theirs = getattr(one, name), getattr(other, name)
            if isinstance(mine, np.ndarray) and mine.dtype.kind == "f":
                np.testing.assert_allclose(mine, theirs, **CLOSE)
            else:
                np.testing.assert_array_equal(mine, theirs)


def test_p_values_of_repeated_texts_are_those_of_shuffled_texts() -> None:
    """Against draws of which texts are in the group, samples of a text always together."""
    rng = np.random.default_rng(8)
    texts, draws = 90, 4000
    group = (np.arange(texts) < 35).astype(np.int64)
    rate = np.where(group == 1, 0.45, 0.3)
    active = (rng.random(texts) < rate) * rng.lognormal(0.4 * group, 0.6)
    text = np.repeat(np.arange(texts), rng.integers(1, 5, texts))
    samples = Samples(text, np.full(len(text), 9.0), group[text], ("a", "b"), "fact")
    block = ActivationBlock(0, 0, scipy.sparse.csc_matrix(active[text][:, None]))
    (found,) = grouped_features([block], samples)
    fired = active > 0
    shuffles = [rng.permutation(group) == 1 for _ in range(draws)]

    def share_as_odd(seen: float, drawn: list[float]) -> float:
        return float(np.mean(np.abs(np.array(drawn) - np.mean(drawn)) >= abs(seen - np.mean(drawn)) - 1e-9))

    counts = [float(fired[one].sum()) for one in shuffles]
    p = share_as_odd(fired[group == 1].sum(), counts)
    assert found.firing_p[0] == pytest.approx(p, abs=0.03)
    ranks, labels = stats.rankdata(active[fired]), group[fired] == 1
    sums = [ranks[rng.permutation(labels)].sum() for _ in range(draws)]
    p = share_as_odd(ranks[labels].sum(), sums)
    assert found.activation_p[0] == pytest.approx(p, abs=0.03)


@pytest.mark.parametrize("repeats", [0, 1, 150])
@pytest.mark.parametrize(("texts", "size"), [(430, 20), (430, 100), (1000, 50)])
def test_nothing_is_found_where_nothing_differs(texts: int, size: int, repeats: int) -> None:
    """Also where one text is there twice, and where many are, some of them in both groups."""
    rng = np.random.default_rng([texts, size, repeats])
    fired = rng.random((texts, 600)) < rng.uniform(0.01, 0.3, 600)
    activations = fired * rng.lognormal(0, 0.5, (texts, 600))
    tokens = rng.integers(5, 30, texts).astype(float)
    text = np.concatenate([np.arange(texts), rng.integers(0, texts, repeats)])
    group = np.zeros(len(text), np.int64)
    group[rng.permutation(len(text))[: size + repeats // 5 + 1]] = 1
    samples = Samples(text, tokens[text], group, ("a", "b"), "fact")
    (found,) = grouped_features([ActivationBlock(0, 0, scipy.sparse.csc_matrix(activations[text]))], samples)
    assert found.tested.sum() > 300
    assert np.isin(found.verdict, ("holds", "controls")).sum() == 0
    assert np.nanmean(found.adjusted_p < 0.05) < 0.07
    assert np.nanmean(found.firing_p < 0.05) < 0.07


def test_of_two_groups_there_is_one_comparison() -> None:
    samples = make_samples(150)
    samples = replace(samples, group=np.minimum(samples.group, 1), group_names=("a", "b"))
    block = ActivationBlock(0, 0, scipy.sparse.csc_matrix(make_activations(samples, 4)))
    (found,) = grouped_features([block], samples)
    assert (found.group, found.against) == ("a", "b")
    assert (found.n_inside, found.n_outside) == ((samples.group == 0).sum(), (samples.group == 1).sum())


def test_small_groups_are_named() -> None:
    samples = make_samples(150)
    assert small_groups(samples, 20) == ("small",)
    copies = replace(samples, cluster=np.zeros(150, np.int64))
    assert small_groups(copies, 20) == ("a", "b", "small")  # one text, however often, is one


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
    rows, inside = ~np.isnan(values) & (samples.group >= 0), samples.group == 0
    found = grouped_column(values, samples, 0, grouped_labels())
    parts = values[rows & inside], values[rows & ~inside]
    plain = stats.mannwhitneyu(*parts, method="asymptotic")
    np.testing.assert_allclose(found.p, plain.pvalue, **CLOSE)
    assert (found.n_inside, found.n_outside) == tuple(map(len, parts))
    assert found.difference is not None and found.adjusted is not None
    welch = stats.ttest_ind(*parts, equal_var=False)
    ends = welch.confidence_interval()
    np.testing.assert_allclose([found.difference.low, found.difference.high], [ends.low, ends.high], **CLOSE)
    np.testing.assert_allclose(found.difference.value, parts[0].mean() - parts[1].mean(), **CLOSE)
    design = np.column_stack([inside, np.ones(150), samples.n_tokens, samples.n_tokens**2])[rows]
    adjusted = sm.OLS(values[rows], design).fit(cov_type="HC2")
    np.testing.assert_allclose(found.adjusted.value, adjusted.params[0], rtol=1e-7)
    half = (found.adjusted.high - found.adjusted.low) / 2
    assert 1.96 < half / adjusted.bse[0] < 2.0  # Student's t of a hundred degrees of freedom or so
    assert (found.group, found.text, found.verdict) == ("a", "fact", "holds")
    other = grouped_column(rng.normal(0, 1, 150), samples, 1, grouped_labels())
    together = fdr_grouped_columns([found, other])
    assert found.p is not None and other.p is not None
    np.testing.assert_allclose(
        [column.q for column in together], multipletests([found.p, other.p], method="fdr_bh")[1], **CLOSE
    )


def test_a_skewed_column_has_no_interval_of_a_small_group() -> None:
    rng = np.random.default_rng(11)
    group = (np.arange(400) >= 30).astype(np.int64)
    samples = Samples(np.arange(400), np.rint(rng.normal(40, 8, 400)), group, ("a", "b"), "fact")
    skewed = grouped_column(rng.lognormal(0, 1, 400), samples, 0, grouped_labels())
    assert skewed.difference is skewed.adjusted is None
    assert skewed.p is not None and skewed.adjusted_p is not None  # ranks don't mind
    larger = grouped_column(rng.lognormal(0, 1, 400) * np.where(group, 1, 4), samples, 0, grouped_labels())
    assert (larger.difference, larger.verdict) == (None, "holds")
    even = grouped_column(rng.normal(0, 1, 400), samples, 0, grouped_labels())
    assert even.difference is not None and even.adjusted is not None
    values = rng.lognormal(0, 0.5, 300)
    assert skewed_least(values) == pytest.approx(10 * stats.skew(values) ** 2)
    assert skewed_least(np.ones(5)) == skewed_least(np.zeros(0)) == 0


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


def test_probe_does_not_depend_on_the_order_of_pairs() -> None:
    rng = np.random.default_rng(9)
    cluster = np.sort(rng.integers(0, 70, 110))
    cluster = np.unique(cluster, return_inverse=True)[1]
    d_tokens = rng.integers(-2, 3, 110).astype(float)
    for x in (rng.normal(0.1, 1, (110, 30)), rng.normal(0.1, 1, (110, 300))):
        first = probe_pairs(x, pairs_of(cluster, d_tokens), "x")
        for seed in range(4):
            order = np.random.default_rng(seed).permutation(110)
            assert probe_pairs(x[order], pairs_of(cluster[order], d_tokens[order]), "x") == first


def test_probe_of_other_divisions_says_nearly_the_same() -> None:
    rng = np.random.default_rng(10)
    x, pairs = rng.normal(0.04, 1, (300, 80)), pairs_of(np.arange(300), np.zeros(300))
    found = [probe_pairs(x, pairs, "x", seed).accuracy for seed in range(6)]
    values = [one.value for one in found if one is not None]
    assert len(values) == 6
    assert np.std(values) < 0.013  # of one division 0.019
    assert len(set(values)) > 1
    assert all(one.high - one.low > 0.1 for one in found if one is not None)  # of 300 pairs, not of 3,000


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
    found = share_with_interval(correct[None], np.arange(100))
    assert found is not None
    expected = proportion_confint(70, 100, method="wilson")
    np.testing.assert_allclose([found.low, found.high], expected, **CLOSE)
    assert share_with_interval(np.zeros((3, 0)), np.zeros(0, int)) is None

"""Tests of a group at equal length, against statsmodels and against draws of groups of the same lengths."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import statsmodels.api as sm
from scipy import stats

from daemon.findings.group_tests import (
    column_at_equal_length,
    firing_at_equal_length,
    magnitude_at_equal_length,
)
from daemon.findings.sparse import as_columns, fires, ordered_by


def made(n: int, rate: float, slope: float, seed: int):
    """Activations of 40 features that depend on length, and a group whose texts are longer."""
    rng = np.random.default_rng(seed)
    inside = np.arange(n) < n // 4
    tokens = np.rint(rng.normal(40, 8, n)) + 6 * inside
    odds = np.log(rate / (1 - rate)) + slope * (tokens[:, None] - 40)
    fired = rng.random((n, 40)) < 1 / (1 + np.exp(-odds))
    size = rng.lognormal(slope / 4 * (tokens[:, None] - 40), 0.5, (n, 40))
    return as_columns(scipy.sparse.csc_matrix(fired * size)), inside, tokens


def test_frequent_firing_has_the_score_test_of_a_logistic_regression() -> None:
    activations, inside, tokens = made(3000, 0.3, 0.05, 0)
    found = firing_at_equal_length(fires(activations), inside, tokens)
    for f in range(40):
        y = (activations[:, [f]].toarray()[:, 0] > 0).astype(float)
        null = sm.GLM(y, sm.add_constant(tokens), family=sm.families.Binomial()).fit()
        _, p = null.score_test(exog_extra=inside.astype(float)[:, None])
        assert found[f] == pytest.approx(float(np.squeeze(p)), rel=0.15, abs=0.03)


def test_rare_firing_is_judged_by_its_exact_tail() -> None:
    """Of units of two lengths: the count inside given the counts of either length is hypergeometric."""
    rng = np.random.default_rng(1)
    inside, tokens = np.arange(400) < 20, np.where(rng.random(400) < 0.5, 10.0, 20.0)
    for count in (12, 20, 40):
        for seen in (0, 2, 4, 6):
            fired = np.zeros(400)
            fired[:seen] = 1
            fired[rng.choice(np.arange(20, 400), count - seen, replace=False)] = 1
            p = firing_at_equal_length(as_columns(scipy.sparse.csc_matrix(fired[:, None])), inside, tokens)[0]
            drawn = sum(
                stats.hypergeom.rvs(
                    int((tokens == t).sum()), int((inside & (tokens == t)).sum()),
                    int(fired[tokens == t].sum()), size=20_000, random_state=rng,
                )
                for t in (10.0, 20.0)
            )  # fmt: skip
            exact = min(1, 2 * min(np.mean(drawn >= seen), np.mean(drawn <= seen)))
            assert p == pytest.approx(exact, rel=0.3, abs=0.01)


@pytest.mark.parametrize("rate", [0.03, 0.2])
def test_what_length_alone_explains_is_not_found(rate: float) -> None:
    p = []
    for seed in range(12):
        activations, inside, tokens = made(500, rate, 0.12, seed)
        by_size = ordered_by(activations, activations.data)
        p.append(firing_at_equal_length(fires(activations), inside, tokens))
        p.append(magnitude_at_equal_length(by_size, inside, tokens))
        raw = [stats.mannwhitneyu(y[inside], y[~inside]).pvalue for y in activations.toarray().T]
        assert np.mean(np.array(raw) < 0.05) > 0.1  # as it is, length is found
    every = np.concatenate(p)
    every = every[~np.isnan(every)]
    assert len(every) > 480
    assert np.mean(every < 0.05) < 0.07
    assert np.mean(every < 0.005) < 0.015


def test_magnitude_is_the_regression_of_ranks() -> None:
    activations, inside, tokens = made(300, 0.3, 0.1, 3)
    found = magnitude_at_equal_length(ordered_by(activations, activations.data), inside, tokens)
    for f in range(40):
        y = activations[:, [f]].toarray()[:, 0]
        fired = y > 0
        x = inside[fired].astype(float)
        model = sm.OLS(stats.rankdata(y[fired]), np.column_stack([x, np.ones(fired.sum()), tokens[fired]]))
        fitted = model.fit(cov_type="HC2")
        influence = model.fit().get_influence()
        weight = (np.linalg.pinv(model.exog)[0] * fitted.resid) ** 2 / (1 - influence.hat_matrix_diag)
        parts = weight[x == 1].sum(), weight[x == 0].sum()
        df = sum(parts) ** 2 / sum(
            part**2 / (n - 2) for part, n in zip(parts, (x.sum(), (1 - x).sum()), strict=True)
        )
        expected = 2 * stats.t.sf(abs(fitted.params[0]) / fitted.bse[0], df)
        np.testing.assert_allclose(found[f], expected, rtol=1e-7)
        if f == 0:
            alone = column_at_equal_length(y[fired], inside[fired], tokens[fired])
            np.testing.assert_allclose(alone, expected, rtol=1e-7)


def test_a_group_that_its_lengths_give_away_can_t_be_told() -> None:
    activations, inside, _ = made(200, 0.3, 0.0, 4)
    tokens = np.where(inside, 10.0, 20.0)
    assert np.isnan(firing_at_equal_length(fires(activations), inside, tokens)).all()
    assert np.isnan(magnitude_at_equal_length(activations, inside, tokens)).all()


def test_texts_of_one_length_have_the_tests_as_they_are() -> None:
    activations, inside, _ = made(200, 0.3, 0.0, 5)
    alike = np.full(200, 7.0)
    assert not np.isnan(firing_at_equal_length(fires(activations), inside, alike)).any()
    assert not np.isnan(magnitude_at_equal_length(activations, inside, alike)).any()

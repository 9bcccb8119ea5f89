from __future__ import annotations

import numpy as np
import pytest

from daemon.records import LayerSums, LayerTotals, StageSeconds


def sums_of(x: np.ndarray, reconstructed: np.ndarray) -> LayerSums:
    """One row per sample."""
    return LayerSums(
        rows=np.ones(len(x), np.int64),
        l0=np.arange(len(x), dtype=float),
        squared_error=((x - reconstructed) ** 2).sum(1),
        squared_norm=(x**2).sum(1),
        total=x,
    )


def totals_of(sums: LayerSums, rows: np.ndarray) -> LayerTotals:
    """The totals of one group."""
    (totals,) = LayerTotals.of_groups(sums, rows, np.array([0]))
    return totals


def test_groups_of_a_block_are_summed_apart():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, 3))
    sums = sums_of(x, x / 2)
    groups = np.array([4, 0]), np.array([5]), np.array([1, 3, 2])
    together = LayerTotals.of_groups(sums, np.concatenate(groups), np.array([0, 2, 3]))
    for totals, rows in zip(together, groups, strict=True):
        assert totals.rows == len(rows)
        assert totals.l0 == rows.sum()
        assert totals.squared_norm == pytest.approx((x[rows] ** 2).sum(), rel=1e-12)
        assert totals.squared_error == pytest.approx(((x[rows] / 2) ** 2).sum(), rel=1e-12)
        np.testing.assert_allclose(totals.total, x[rows].sum(0), rtol=1e-12)


def test_fvu_is_residual_variance_over_variance():
    rng = np.random.default_rng(0)
    x = rng.normal(5, 2, (50, 8))
    reconstructed = x + rng.normal(0, 0.3, x.shape)
    sums = sums_of(x, reconstructed)
    halves = [totals_of(sums, rows) for rows in (np.arange(20, 50), np.arange(20))]
    totals = LayerTotals.zero(8).plus(halves[0]).plus(halves[1])
    expected = ((x - reconstructed) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert totals.fvu() == pytest.approx(expected, rel=1e-12)
    assert totals.mean_l0() == 24.5


@pytest.mark.parametrize("x", [np.ones((1, 4)), np.full((7, 4), 1 / 3), np.zeros((3, 4))])
def test_fvu_is_undefined_without_variance(x):
    totals = totals_of(sums_of(x, x + 1), np.arange(len(x)))
    assert totals.fvu() is None


def test_fvu_is_undefined_without_rows():
    assert LayerTotals.zero(4).fvu() is None


def test_fvu_is_undefined_where_a_sum_is_not_finite():
    x = np.array([[1.0, 2.0], [3.0, 4.0]])
    for reconstructed in (x * np.nan, x + np.inf):
        assert totals_of(sums_of(x, reconstructed), np.arange(2)).fvu() is None


def test_stage_seconds_add_per_stage():
    total = StageSeconds(read=1.0, commit=2.0) + StageSeconds(read=0.5, forward=3.0)
    assert total == StageSeconds(read=1.5, forward=3.0, commit=2.0)

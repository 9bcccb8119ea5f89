from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from daemon.analysis.magnitudes import gini, l2_norm, top_k_entropy
from tests.analysis.synthetic import QUICK

magnitudes = st.lists(st.floats(1e-3, 1e3), min_size=0, max_size=8)


def padded(rows: list[list[float]], extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    width = max([1, *map(len, rows)]) + extra
    values = torch.zeros(len(rows), width, dtype=torch.float64)
    for row, content in enumerate(rows):
        values[row, : len(content)] = torch.tensor(content, dtype=torch.float64)
    return values, torch.tensor([len(row) for row in rows])


def pairwise_gini(row: list[float]) -> float:
    if not row:
        return 0.0
    differences = sum(abs(a - b) for a in row for b in row)
    return differences / (2 * len(row) ** 2 * (sum(row) / len(row)))


def plain_entropy(row: list[float], top_k: int) -> float:
    largest = sorted(row)[-top_k:]
    return -sum(m / sum(largest) * math.log(m / sum(largest)) for m in largest)


@QUICK
@given(st.lists(magnitudes, min_size=1, max_size=5))
def test_gini_is_the_mean_absolute_difference_over_twice_the_mean(rows):
    expected = [pairwise_gini(row) for row in rows]
    np.testing.assert_allclose(gini(*padded(rows)), expected, atol=1e-12, rtol=0)


def test_gini_of_one_dominant_feature_nears_its_limit():
    values, counts = padded([[1e-12, 1e-12, 1e-12, 1.0]])
    assert gini(values, counts).item() == pytest.approx(3 / 4, abs=1e-9)


def test_gini_of_equal_magnitudes_is_never_negative():
    values, counts = padded([[0.1] * n for n in range(40)])
    coefficients = gini(values, counts)
    assert (coefficients >= 0).all()
    assert coefficients.max() < 1e-12


@QUICK
@given(st.lists(magnitudes, min_size=1, max_size=5), st.integers(1, 9))
def test_entropy_is_shannons_over_the_largest_magnitudes(rows, top_k):
    expected = [plain_entropy(row, top_k) for row in rows]
    np.testing.assert_allclose(top_k_entropy(*padded(rows), top_k), expected, atol=1e-12, rtol=0)


def test_entropy_of_equal_magnitudes_is_the_log_of_how_many_are_taken():
    values, counts = padded([[2.0] * 7])
    assert top_k_entropy(values, counts, 5).item() == pytest.approx(math.log(5))
    assert top_k_entropy(values, counts, 50).item() == pytest.approx(math.log(7))


@QUICK
@given(magnitudes)
def test_padding_changes_nothing(row):
    for function in (gini, lambda v, n: top_k_entropy(v, n, 4), lambda v, n: l2_norm(v)):
        assert_close(function(*padded([row], extra=5)), function(*padded([row])), rtol=1e-12, atol=1e-12)


def test_nothing_active_gives_zeros():
    values, counts = padded([[], [1.0, 2.0]])
    assert gini(values, counts)[0] == 0
    assert top_k_entropy(values, counts, 3)[0] == 0
    assert l2_norm(values).tolist() == [0.0, pytest.approx(math.sqrt(5))]


def test_half_precision_input_is_measured_in_float64():
    values = torch.tensor([[300.0, 400.0]], dtype=torch.float16)  # the squares overflow float16
    assert l2_norm(values).tolist() == [500.0]
    assert gini(values, torch.tensor([2])).item() == pytest.approx(50 / 700, abs=1e-15)

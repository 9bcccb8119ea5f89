from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from daemon.analysis.angles import line_angle, vector_angle
from daemon.analysis.sparse import from_dense, shared_cosine
from tests.analysis.synthetic import QUICK, random_acts, to_dense

coordinates = st.floats(-1e3, 1e3).filter(lambda value: value == 0 or abs(value) > 1e-3)
vectors = st.lists(coordinates, min_size=3, max_size=3)


def drift(a: list[float], b: list[float]) -> float:
    return vector_angle(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)).item()


def twist(a: list[float], b: list[float]) -> float:
    return line_angle(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)).item()


@pytest.mark.parametrize(
    ("b", "degrees"),
    [([3, 0], 0), ([2, 2], 45), ([0, 0.1], 90), ([-1, 1], 135), ([-5, 0], 180), ([1, -math.sqrt(3)], 60)],
)
def test_known_angles(b, degrees):
    assert drift([1, 0], b) == pytest.approx(degrees, abs=1e-12)
    assert twist([1, 0], b) == pytest.approx(min(degrees, 180 - degrees), abs=1e-12)


@pytest.mark.parametrize("radians", [1e-3, 1e-8, 1e-12])
def test_tiny_angles_keep_their_digits(radians):
    """An arc cosine gives 0 below 1e-8."""
    assert math.radians(drift([1, 0, 0], [1, radians, 0])) == pytest.approx(math.atan(radians), rel=1e-9)
    assert math.radians(twist([1, 0, 0], [-1, radians, 0])) == pytest.approx(math.atan(radians), rel=1e-9)
    assert math.radians(180 - drift([1, 0, 0], [-1, 0, radians])) == pytest.approx(
        math.atan(radians), abs=1e-13
    )


@QUICK
@given(vectors, vectors, st.floats(1e-3, 1e3))
def test_angles_are_symmetric_bounded_and_free_of_scale(a, b, scale):
    assume(any(a) and any(b))
    assert 0 <= drift(a, b) <= 180
    assert 0 <= twist(a, b) <= 90
    assert drift(b, a) == drift(a, b)
    scaled = [scale * value for value in a]
    assert drift(scaled, b) == pytest.approx(drift(a, b), abs=1e-9)
    flipped = [-value for value in scaled]
    assert drift(flipped, b) == pytest.approx(180 - drift(a, b), abs=1e-9)
    assert twist(flipped, b) == pytest.approx(twist(a, b), abs=1e-9)
    assert twist(a, b) == pytest.approx(min(drift(a, b), 180 - drift(a, b)), abs=1e-9)


def test_the_zero_vector_has_no_angle():
    for angle in (drift, twist):
        assert math.isnan(angle([0, 0], [1, 0]))
        assert math.isnan(angle([1, 0], [0, 0]))
        assert math.isnan(angle([0, 0], [0, 0]))


@QUICK
@given(
    st.integers(0, 10_000),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 14)), min_size=1, max_size=5),
)
def test_consistency_is_the_cosine_over_the_shared_entries(seed, counts):
    d_sae_a, d_sae_b = 9, 14
    a = random_acts(seed, [n for n, _ in counts], d_sae_a)
    b = random_acts(seed + 1, [n for _, n in counts], d_sae_b)
    left, right = to_dense(a, d_sae_a).numpy(), to_dense(b, d_sae_b).numpy()[:, :d_sae_a]
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    expected = [
        dot / norm if norm else math.nan for dot, norm in zip((left * right).sum(1), norms, strict=True)
    ]
    np.testing.assert_allclose(shared_cosine(a, b, d_sae_a), expected, atol=1e-12, rtol=0)
    np.testing.assert_allclose(shared_cosine(b, a, d_sae_a), expected, atol=1e-12, rtol=0)


def test_consistency_with_itself_is_one():
    acts = random_acts(0, [1 + row % 9 for row in range(100)], 9)
    consistency = shared_cosine(acts, acts, 9)
    assert_close(consistency, torch.ones(100, dtype=torch.float64))
    assert consistency.max() <= 1


def test_padding_is_not_taken_for_feature_zero():
    a = from_dense(torch.tensor([[0.0, 2.0, 0.0], [1.0, 2.0, 3.0]]))  # row 0 is padded with index 0
    b = from_dense(torch.tensor([[5.0, 0.0, 0.0], [1.0, 2.0, 3.0]]))
    assert shared_cosine(a, b, 3).tolist() == [0, pytest.approx(1)]


def test_activity_beyond_the_smaller_dictionary_is_not_compared():
    small = from_dense(torch.tensor([[1.0, 1.0]]))
    large = from_dense(torch.tensor([[0.0, 0.0, 4.0]]))
    assert shared_cosine(small, large, 2).isnan().all()
    assert shared_cosine(large, small, 2).isnan().all()

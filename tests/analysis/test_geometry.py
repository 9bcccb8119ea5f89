from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from daemon.analysis import geometry as module
from daemon.analysis.geometry import (
    MAX_TABLE_BYTES,
    SHAPE_CLASSES,
    DecoderRows,
    Geometry,
    geometry,
    row_chunks,
)
from daemon.analysis.sparse import SparseActs, from_dense
from tests.analysis.synthetic import QUICK, random_acts, random_sae, residuals, to_dense

tables = [MAX_TABLE_BYTES]  # bytes that a table of inner products may take


@pytest.fixture(params=["by table", "by rows"], scope="module", autouse=True)
def by_table(request) -> None:
    """Every test here runs with inner products from a table and from the rows themselves."""
    tables[0] = MAX_TABLE_BYTES if request.param == "by table" else 0


def shape_of(acts: SparseActs, W_dec: torch.Tensor) -> Geometry:
    return geometry(acts, DecoderRows.of(W_dec, tables[0]))


SCALARS = ("sphericity", "elongation", "dimensionality", "eigenvalue_entropy", "misalignment")


def tensor_of(feature_acts: np.ndarray, W_dec: np.ndarray) -> np.ndarray:
    """The d_in x d_in inertia tensor by its definition."""
    weights = feature_acts / feature_acts.sum()
    centred = W_dec - weights @ W_dec
    return np.einsum("i,ij,ik->jk", weights, centred, centred)


def of_rows(rows: list[list[float]], weights: list[float] | None = None) -> Geometry:
    """The geometry of these decoder rows, all active."""
    W_dec = torch.tensor(rows, dtype=torch.float64)
    magnitudes = torch.tensor([weights or [1.0] * len(rows)], dtype=torch.float64)
    return shape_of(from_dense(magnitudes), W_dec)


def cross(a: float, b: float, c: float, shift: float = 0.0) -> list[list[float]]:
    """Six rows whose tensor has the semi-axes a, b, c (times 1/sqrt 3) along the coordinate axes."""
    lengths = np.diag([a, b, c])
    return [*(lengths + shift).tolist(), *(-lengths + shift).tolist()]


def class_of(shape: Geometry, row: int = 0) -> str:
    return SHAPE_CLASSES[shape.shape_class[row]]


def assert_same(a: Geometry, b: Geometry, rows_a: slice, rows_b: slice) -> None:
    """Equal, but for the sign of the axis."""
    for name in ("centroid", *SCALARS, "shape_class"):
        assert_close(getattr(a, name)[rows_a], getattr(b, name)[rows_b], rtol=0, atol=1e-10, equal_nan=True)
    along = (a.axis[rows_a] * b.axis[rows_b]).sum(-1, keepdim=True)
    assert_close(a.axis[rows_a], b.axis[rows_b] * along.sign(), rtol=0, atol=1e-8)


@QUICK
@given(st.integers(0, 10_000), st.integers(2, 14), st.integers(1, 10))
def test_the_gram_matrix_gives_the_eigenvalues_of_the_inertia_tensor(seed, n, d_in):
    sae = random_sae(seed, d_in, 20)
    acts = random_acts(seed, [n], sae.d_sae)
    shape = shape_of(acts, sae.W_dec)
    tensor = tensor_of(to_dense(acts, sae.d_sae)[0].numpy(), sae.W_dec.numpy())
    eigenvalues = np.append(np.linalg.eigvalsh(tensor)[::-1], [0.0, 0.0]).clip(min=0)
    share = eigenvalues / eigenvalues.sum()
    assert shape.elongation.item() ** 2 == pytest.approx(eigenvalues[1] / eigenvalues[0], abs=1e-12)
    assert shape.sphericity.item() ** 2 == pytest.approx(eigenvalues[2] / eigenvalues[0], abs=1e-12)
    assert shape.dimensionality.item() == pytest.approx(1 / (share**2).sum(), abs=1e-9)
    entropy = -sum(p * math.log(p) for p in share if p > 1e-14)
    assert shape.eigenvalue_entropy.item() == pytest.approx(entropy, abs=1e-9)


@QUICK
@given(st.integers(0, 10_000), st.integers(2, 14))
def test_the_axis_is_the_principal_eigenvector_of_the_inertia_tensor(seed, n):
    sae = random_sae(seed, 8, 20)
    acts = random_acts(seed, [n], sae.d_sae)
    shape = shape_of(acts, sae.W_dec)
    assume(shape.elongation.item() < 0.99)  # else the axis is ill-defined
    dense = to_dense(acts, sae.d_sae)[0].numpy()
    _, vectors = np.linalg.eigh(tensor_of(dense, sae.W_dec.numpy()))
    axis = shape.axis[0].numpy()
    assert np.linalg.norm(axis) == pytest.approx(1, abs=1e-12)
    assert abs(axis @ vectors[:, -1]) == pytest.approx(1, abs=1e-10)
    np.testing.assert_allclose(shape.centroid[0], dense @ sae.W_dec.numpy() / dense.sum(), atol=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        (1.0, 0.95, 0.92, "Spherical"),
        (1.0, 0.95, 0.85, "Triaxial"),
        (1.0, 0.85, 0.5, "Oblate"),
        (1.0, 0.95, 0.5, "Oblate"),
        (1.0, 0.75, 0.5, "Triaxial"),
        (1.0, 0.5, 0.4, "Prolate"),
        (1.0, 0.65, 0.4, "Triaxial"),
    ],
)
def test_semi_axes_give_ratios_and_class(a, b, c, expected):
    shape = of_rows(cross(a, b, c, shift=2.0))
    assert shape.elongation.item() == pytest.approx(b / a, abs=1e-12)
    assert shape.sphericity.item() == pytest.approx(c / a, abs=1e-12)
    assert class_of(shape) == expected
    assert shape.axis[0].abs().tolist() == pytest.approx([1, 0, 0], abs=1e-12)
    assert shape.misalignment.item() == pytest.approx(math.degrees(math.acos(1 / math.sqrt(3))))


def test_every_dimension_equal_counts_all_dimensions():
    shape = of_rows(cross(1, 1, 1, shift=5.0))
    assert class_of(shape) == "Spherical"
    assert shape.dimensionality.item() == pytest.approx(3)
    assert shape.eigenvalue_entropy.item() == pytest.approx(math.log(3))


def test_nothing_active_has_no_shape_and_no_centroid():
    shape = shape_of(from_dense(torch.zeros(1, 3)), torch.randn(3, 4))
    assert class_of(shape) == "None"
    assert [getattr(shape, name).item() for name in SCALARS] == [0] * 5
    assert not shape.centroid.any()
    assert not shape.axis.any()


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_a_single_place_has_a_centroid_and_no_shape(n):
    shape = of_rows([[0.1, 0.7]] * n, [0.3, 0.9, 0.7, 0.1, 0.55, 0.23][:n])
    assert class_of(shape) == "None"
    assert [getattr(shape, name).item() for name in SCALARS] == [0] * 5
    assert not shape.axis.any()
    assert shape.centroid[0].tolist() == pytest.approx([0.1, 0.7])


def test_two_features_make_a_line():
    shape = of_rows([[1.0, 2.0, 0.0], [1.0, -1.0, 4.0]], [0.2, 0.7])
    assert class_of(shape) == "Prolate"
    assert shape.elongation.item() == shape.sphericity.item() == 0
    assert shape.dimensionality.item() == pytest.approx(1)
    assert shape.eigenvalue_entropy.item() == 0
    assert shape.axis[0].abs().tolist() == pytest.approx([0, 0.6, 0.8])


@pytest.mark.parametrize("seed", range(10))
def test_two_features_close_together_make_a_line_and_no_more(seed):
    """Rounding alone would give them a width: the spread is 1e-10 of the length of the rows."""
    near, step = residuals(seed, 2, 6)
    shape = of_rows([near.tolist(), (near + 1e-10 * step).tolist()], [0.37, 0.91])
    assert class_of(shape) == "Prolate"
    assert shape.elongation.item() == shape.sphericity.item() == 0


def test_three_features_make_a_plane():
    shape = of_rows([[1.0, 0.2, 0.0, 3.0], [0.0, 1.0, 0.3, 0.1], [0.5, 0.0, 1.0, -1.0]])
    assert shape.elongation.item() > 0
    assert shape.sphericity.item() == 0


def test_rows_that_span_less_than_their_number_have_exact_zeros():
    shape = of_rows([[1.0, 0.1], [0.3, 1.0], [-1.0, 0.7], [0.9, -2.0], [0.2, 0.3]], [0.9, 0.1, 0.3, 0.7, 0.2])
    assert shape.elongation.item() > 0
    assert shape.sphericity.item() == 0


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0, 10.0, 100.0, 1000.0])
def test_a_line_far_from_the_origin_is_a_line_all_the_same(shift):
    direction = np.array([0.6, 0.8, 0.0, 0.0, 0.0])
    place = shift * np.array([0.3, -0.5, 0.7, 0.2, 0.4])
    shape = of_rows([(place + t * direction).tolist() for t in (-1.0, -0.35, 0.2, 0.55, 1.3)])
    assert (shape.elongation.item(), shape.sphericity.item()) == (0, 0)
    assert class_of(shape) == "Prolate"
    assert_close(shape.axis[0].abs(), torch.tensor(direction), rtol=0, atol=1e-9)


def test_a_cloud_about_the_origin_has_a_shape_but_no_misalignment():
    turned = torch.linalg.qr(residuals(0, 3, 3)).Q  # so that the rows cancel out but for rounding
    shape = of_rows(
        (torch.tensor(cross(1.0, 0.5, 0.3), dtype=torch.float64) @ turned).tolist(), [0.7, 0.1, 0.3] * 2
    )
    assert class_of(shape) == "Prolate"
    assert not shape.centroid.any()
    assert shape.misalignment.isnan().all()


def test_small_misalignments_are_accurate():
    tilt = 1e-7  # radians, between the line of the two rows and their centroid
    shape = of_rows([[11.0, 10 * tilt], [9.0, 10 * tilt]])
    assert math.radians(shape.misalignment.item()) == pytest.approx(tilt, rel=1e-6)


@QUICK
@given(
    st.integers(0, 10_000),
    st.lists(st.sampled_from([0, 1, 2, 3, 5, 17, 18, 40]), min_size=1, max_size=7),
    st.sampled_from([1, 100, 1000, 1 << 22]),
)
def test_a_row_does_not_depend_on_its_batch(seed, counts, budget):
    sae = random_sae(seed, 6, 40)
    acts = random_acts(seed, counts, sae.d_sae)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_GATHERED", budget)
        batched = shape_of(acts, sae.W_dec)
    for row in range(len(counts)):
        alone = shape_of(from_dense(to_dense(acts, sae.d_sae)[row : row + 1]), sae.W_dec)
        assume(alone.elongation.item() < 0.999)
        assert_same(batched, alone, slice(row, row + 1), slice(0, 1))


@QUICK
@given(st.lists(st.integers(0, 3000), max_size=40), st.sampled_from([16, 576, 4096]))
def test_chunks_cover_the_rows_and_bound_the_workspace(counts, d_in):
    ascending = sorted(counts)
    chunks = list(row_chunks(ascending, d_in, module.MAX_GATHERED))
    assert [row for rows, _ in chunks for row in range(len(ascending))[rows]] == list(range(len(ascending)))
    for rows, width in chunks:
        chunk = ascending[rows]
        assert all(width == module.chunk_width(count) >= count for count in chunk)
        assert len(chunk) <= 1 or len(chunk) * width * d_in <= module.MAX_GATHERED
        slack = module.WIDTH_SLACK * max([1, *chunk]) + module.WIDTH_STEP
        assert not chunk or width <= max(module.WIDTH_FLOOR, slack)


def test_an_overflowed_row_has_no_shape_and_spoils_no_other():
    dense = to_dense(random_acts(0, [5, 5, 5], 20), 20)
    sae = random_sae(0, 6, 20)
    expected = shape_of(from_dense(dense), sae.W_dec)
    dense[1, 3] = math.inf
    overflowed = shape_of(from_dense(dense), sae.W_dec)
    assert class_of(overflowed, 1) == "None"
    for row in (0, 2):
        assert_same(overflowed, expected, slice(row, row + 1), slice(row, row + 1))


def test_lower_precision_inputs_are_worked_on_in_float64():
    acts = random_acts(1, [4, 9], 20)
    rounded = from_dense(to_dense(acts, 20).float())
    sae = random_sae(1, 6, 20, torch.float32)
    low = shape_of(rounded, sae.W_dec)
    exact = shape_of(from_dense(to_dense(rounded, 20).double()), sae.W_dec.double())
    assert_same(low, exact, slice(None), slice(None))


@QUICK
@given(st.integers(0, 10_000), st.floats(1e-6, 1e6))
def test_the_scale_of_the_activations_does_not_matter(seed, scale):
    sae = random_sae(seed, 6, 20)
    dense = to_dense(random_acts(seed, [6], 20), 20)
    shape = shape_of(from_dense(dense), sae.W_dec)
    assume(shape.elongation.item() < 0.99)
    assert_same(shape_of(from_dense(scale * dense), sae.W_dec), shape, slice(None), slice(None))


def test_inputs_are_left_as_they_were():
    acts, W_dec = random_acts(2, [4], 8), random_sae(2, 5, 8).W_dec
    before = [tensor.clone() for tensor in (acts.indices, acts.values, acts.counts, W_dec)]
    shape_of(acts, W_dec)
    assert all(map(torch.equal, before, (acts.indices, acts.values, acts.counts, W_dec)))

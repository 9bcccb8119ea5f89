"""The kernels of CUDA against LAPACK and torch; with Triton but no such device, by its interpreter."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from daemon.analysis import eigen as module
from daemon.analysis.geometry import DecoderRows, geometry
from daemon.analysis.sparse import from_dense
from tests.analysis.interpreted import interpreted_kernels
from tests.analysis.test_eigen import KINDS, grams

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def kernels():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which comes with torch's builds for CUDA")
    if DEVICE == "cpu":
        with interpreted_kernels() as kernels:
            yield kernels
    else:
        from daemon.analysis import kernels

        yield kernels


# The interpreter takes seconds for a matrix of 40 rows, which are more than the last tile holds.
ROWS, WIDTHS = (5, [1, 2, 3, 17, 40, 101, 128]) if DEVICE == "cuda" else (3, [1, 2, 40])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_eigenvalues_and_vectors_are_those_of_lapack(kind, width, kernels):
    gram, counts = grams(kind, ROWS, width)
    gram *= torch.logspace(-60, 60, len(gram), dtype=torch.float64)[:, None, None]
    found = kernels.eigen_on_device(gram.to(DEVICE), counts.to(DEVICE))
    eigenvalues, principal = (one.cpu() for one in found)
    expected = torch.linalg.eigvalsh(gram).flip(-1)
    largest = expected[:, :1]
    assert ((eigenvalues - expected).abs() <= 1e-13 * largest).all()
    image = (gram @ principal.unsqueeze(2)).squeeze(2)
    above = largest[:, 0] > 0
    residual = torch.linalg.vector_norm(image - largest * principal, dim=-1)
    assert (residual[above] <= 1e-10 * largest[above, 0]).all()
    norm = torch.linalg.vector_norm(principal[above], dim=-1)
    torch.testing.assert_close(norm, torch.ones_like(norm), rtol=1e-7, atol=0)


def weighted_rows(dtype):
    """A table, and indices, weights and counts of rows of it."""
    chance = torch.Generator().manual_seed(0)
    counts = torch.tensor([0, 1, 9, 5])
    weights = torch.rand(4, 9, generator=chance, dtype=torch.float64) * (torch.arange(9) < counts[:, None])
    indices = torch.randint(0, 50, (4, 9), generator=chance)
    return torch.randn(50, 300, generator=chance, dtype=dtype), indices, weights, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weighted_rows_are_centred_in_float64(dtype, kernels):
    W_dec, indices, weights, counts = weighted_rows(dtype)
    found = kernels.centred(*(one.to(DEVICE) for one in (W_dec, indices, weights, counts)))
    rows = W_dec.double()[indices]
    centroid = (weights.unsqueeze(2) * rows).sum(1)
    expected = (
        (rows - centroid.unsqueeze(1)) * weights.sqrt().unsqueeze(2),
        centroid,
        (weights * rows.square().sum(-1)).sum(-1),
    )
    torch.testing.assert_close(tuple(one.cpu() for one in found), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weighted_sum_is_that_of_the_active_rows(dtype, kernels):
    table, indices, weights, counts = weighted_rows(dtype)
    weights = weights.to(dtype)
    beyond = weights.where(torch.arange(9) < counts[:, None], torch.nan)  # is not read
    found = kernels.weighted_sums(*(one.to(DEVICE) for one in (table, indices, beyond, counts)))
    torch.testing.assert_close(found.cpu(), (weights.unsqueeze(2) * table[indices]).sum(1))


def test_nothing_takes_no_kernel(kernels):
    none = torch.zeros(0, 3, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    eigenvalues, principal = kernels.eigen_on_device(*none)
    assert eigenvalues.shape == principal.shape == (0, 3)


@ON_CUDA
@pytest.mark.parametrize("widest", [100, 150])
def test_a_geometry_on_cuda_is_that_of_a_cpu(widest, kernels):
    chance = torch.Generator().manual_seed(0)
    W_dec = torch.randn(5000, 300, generator=chance)  # too many rows for a table of inner products
    dense = torch.rand(60, 5000, generator=chance)
    active = torch.randint(0, widest, (60, 1), generator=chance) / 5000
    dense = dense.where(torch.rand(60, 5000, generator=chance) < active, 0)
    here = geometry(from_dense(dense), DecoderRows.of(W_dec))
    there = geometry(from_dense(dense.cuda()), DecoderRows.of(W_dec.cuda()))
    assert module.kernels() is kernels
    for name in ("centroid", "sphericity", "elongation", "dimensionality", "eigenvalue_entropy"):
        torch.testing.assert_close(getattr(there, name).cpu(), getattr(here, name), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(there.misalignment.cpu(), here.misalignment, rtol=0, atol=1e-2)
    assert torch.equal(there.shape_class.cpu(), here.shape_class)

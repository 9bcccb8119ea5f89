"""The compiled routine against LAPACK, on what it meets and on what is hard for it."""

from __future__ import annotations

import pytest
import torch

from daemon.analysis import spectra as module
from daemon.analysis.spectra import (
    EXACT,
    LANES,
    SLIM_FROM,
    Clouds,
    Compiled,
    inverse_iteration,
    looked_up,
    spectra,
)
from tests.torch_threads import torch_threads

COMPILED = pytest.mark.skipif(module.compiled() is None, reason="installed without a C compiler")


def grams(kind: str, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices (rows, width, width) and how many of their rows matter."""
    chance = torch.Generator().manual_seed(width)
    counts = torch.randint(1, width + 1, (rows,), generator=chance)
    spread = torch.randn(rows, width, width + 3, generator=chance, dtype=torch.float64)
    match kind:
        case "of low rank":
            spread = spread[..., : max(1, width // 3)]
        case "steep":
            spread = spread * torch.logspace(0, -8, width, dtype=torch.float64)[:, None]
        case "alike":
            spread = spread[:, :1].expand_as(spread)
        case "diagonal":
            spread = torch.diag_embed(spread[..., 0])
        case "equal eigenvalues":
            spread = torch.eye(width, dtype=torch.float64).expand(rows, -1, -1)
        case "nothing":
            spread = torch.zeros_like(spread)
    spread = spread.clone()
    for row, count in enumerate(counts.tolist()):
        spread[row, count:] = 0
    return spread @ spread.mT, counts


KINDS = ["random", "of low rank", "steep", "alike", "diagonal", "equal eigenvalues", "nothing"]


@COMPILED
@pytest.mark.parametrize("width", [1, 2, 3, 9, 40, 101])
@pytest.mark.parametrize("kind", KINDS)
def test_spectra_are_those_of_lapack(kind, width):
    gram, counts = grams(kind, 2 * LANES + 3, width)
    found = spectra(gram, counts)
    expected = torch.linalg.eigvalsh(gram).flip(-1)
    largest = expected[:, :1]
    assert ((found.eigenvalues - expected).abs() <= 1e-13 * largest).all()
    image = (gram @ found.principal.unsqueeze(2)).squeeze(2)
    above = largest[:, 0] > 0
    residual = torch.linalg.vector_norm(image - largest * found.principal, dim=-1)
    assert (residual[above] <= 1e-10 * largest[above, 0]).all()
    norm = torch.linalg.vector_norm(found.principal[above], dim=-1)
    torch.testing.assert_close(norm, torch.ones_like(norm))


@COMPILED
@pytest.mark.parametrize("width", [33, 40, 101, 150])
@pytest.mark.parametrize("kind", KINDS)
def test_the_spectra_of_large_matrices_may_be_those_of_float32(kind, width):
    gram, counts = grams(kind, 4 * LANES + 3, width)
    gram = gram * torch.logspace(-60, 60, len(gram), dtype=torch.float64)[:, None, None]
    found = spectra(gram, counts, SLIM_FROM)
    exact = spectra(gram, counts)
    large = counts >= SLIM_FROM
    assert torch.equal(found.eigenvalues[~large], exact.eigenvalues[~large])
    assert torch.equal(found.principal[~large], exact.principal[~large])
    largest = exact.eigenvalues[:, :1]
    assert ((found.eigenvalues - exact.eigenvalues).abs() <= 5e-6 * largest).all()
    image = (gram @ found.principal.unsqueeze(2)).squeeze(2)
    above = largest[:, 0] > 0
    residual = torch.linalg.vector_norm(image - largest * found.principal, dim=-1)
    assert (residual[above] <= 5e-6 * largest[above, 0]).all()
    norm = torch.linalg.vector_norm(found.principal[above], dim=-1)
    torch.testing.assert_close(norm, torch.ones_like(norm), rtol=5e-6, atol=0)


@COMPILED
@pytest.mark.parametrize("rank", ["full", "low"])
@pytest.mark.parametrize("n", [SLIM_FROM, 47, 48, 49, 63, 64, 65, 127, 129, 200, 350])
def test_a_spectrum_by_float32_is_that_of_lapack_whatever_fits_into_a_vector(n, rank):
    chance = torch.Generator().manual_seed(n)
    spread = torch.randn(3, n, n + 5 if rank == "full" else n // 4, generator=chance, dtype=torch.float64)
    spread[:, :, 0] *= 3  # one axis stands out
    gram = spread @ spread.mT
    found = spectra(gram, torch.full((3,), n), SLIM_FROM)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    largest = eigenvalues[:, -1:]
    assert ((found.eigenvalues - eigenvalues.flip(-1)).abs() <= 1e-6 * largest).all()
    assert ((found.principal * vectors[:, :, -1]).sum(-1).abs() > 1 - 1e-6).all()


@COMPILED
def test_float32_begins_where_it_is_asked_for():
    gram, _ = grams("random", 3, 40)
    counts = torch.tensor([SLIM_FROM - 1, SLIM_FROM, SLIM_FROM + 1])
    for row, count in enumerate(counts.tolist()):
        gram[row, count:] = gram[row, :, count:] = 0
    exact, found = spectra(gram, counts), spectra(gram, counts, SLIM_FROM)
    same = [torch.equal(exact.eigenvalues[row], found.eigenvalues[row]) for row in range(3)]
    assert same == [True, False, False]


@COMPILED
@pytest.mark.parametrize("width", [50, 140])
@pytest.mark.parametrize("slim_from", [EXACT, SLIM_FROM])
def test_a_matrix_gives_the_same_bits_whatever_its_neighbours(slim_from, width):
    gram, counts = grams("random", 6 * LANES, width)
    together = spectra(gram, counts, slim_from)
    for row in range(len(gram)):
        n = int(counts[row])
        alone = spectra(gram[row : row + 1, :n, :n], counts[row : row + 1], slim_from)
        assert torch.equal(alone.eigenvalues[0], together.eigenvalues[row, :n])
        assert torch.equal(alone.principal[0], together.principal[row, :n])


def clouds(rows: int, width: int = 12) -> tuple[torch.Tensor, Clouds]:
    """A table of inner products, and clouds in it."""
    chance = torch.Generator().manual_seed(1)
    table = torch.randn(5 * width, 20, generator=chance, dtype=torch.float64)
    counts = torch.randint(1, width + 1, (rows,), generator=chance)
    indices = torch.stack([torch.randperm(len(table), generator=chance)[:width] for _ in counts])
    weights = torch.rand(indices.shape, generator=chance, dtype=torch.float64)
    weights *= torch.arange(width) < counts.unsqueeze(1)
    return table @ table.T, Clouds(indices, weights / weights.sum(-1, keepdim=True), counts)


@COMPILED
def test_what_is_looked_up_is_what_is_worked_out():
    chance = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 20, generator=chance, dtype=torch.float64)
    counts = torch.tensor([1, 4, 12, 12, 7, 12, 3, 9, 12])
    indices = torch.stack([torch.randperm(60, generator=chance)[:12] for _ in counts])
    weights = torch.rand(indices.shape, generator=chance, dtype=torch.float64)
    weights *= torch.arange(12) < counts.unsqueeze(1)
    weights /= weights.sum(-1, keepdim=True)
    (found,) = looked_up(rows @ rows.T, [Clouds(indices, weights, counts)])
    cloud = rows[indices]
    centroid = (weights.unsqueeze(1) @ cloud).squeeze(1)
    spread = (cloud - centroid.unsqueeze(1)) * weights.sqrt().unsqueeze(2)
    expected = torch.linalg.eigvalsh(spread @ spread.mT).flip(-1)
    torch.testing.assert_close(found.spectra.eigenvalues, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.moment, (weights * cloud.square().sum(-1)).sum(-1))
    torch.testing.assert_close(found.square, centroid.square().sum(-1))
    axis = inverse_iteration(spread @ spread.mT, expected[:, 0])
    several = counts > 1
    along = (axis * found.spectra.principal).sum(-1).abs()[several]
    torch.testing.assert_close(along, torch.ones_like(along))


@COMPILED
@pytest.mark.parametrize("width", [SLIM_FROM, 70, 145])
def test_what_is_looked_up_by_float32_is_what_is_looked_up(width):
    inner, given = clouds(2 * LANES + 3, width)
    given.counts[0] = 1  # beside one that is not
    given.weights[0, 1:] = 0
    (found,), (exact,) = looked_up(inner, [given], SLIM_FROM), looked_up(inner, [given])
    largest = exact.spectra.eigenvalues[:, :1]
    assert ((found.spectra.eigenvalues - exact.spectra.eigenvalues).abs() <= 1e-6 * largest).all()
    torch.testing.assert_close(found.moment, exact.moment, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.square, exact.square, rtol=1e-12, atol=0)
    apart = exact.spectra.eigenvalues[:, 1] < 0.9 * largest[:, 0]
    along = (found.spectra.principal * exact.spectra.principal).sum(-1).abs()
    assert apart.any()
    assert (along[apart] > 1 - 1e-6).all()


def test_without_the_routine_or_where_it_gives_up_torch_does_the_work(monkeypatch):
    gram, counts = grams("random", 5, 12)
    expected = spectra(gram, counts)
    for routine in (None, Compiled(spectra=lambda *_: 1, weighted_sums=None)):
        monkeypatch.setattr(module, "compiled", lambda routine=routine: routine)
        found = spectra(gram, counts)
        torch.testing.assert_close(found.eigenvalues, expected.eigenvalues)
        along = (found.principal * expected.principal).sum(-1).abs()
        torch.testing.assert_close(along, torch.ones_like(along))


@pytest.mark.parametrize("routine", [None, Compiled(spectra=lambda *_: 1, weighted_sums=None)])
def test_without_the_routine_or_where_it_gives_up_torch_looks_up(routine, monkeypatch):
    inner, given = clouds(rows=70)
    (expected,) = looked_up(inner, [given])
    monkeypatch.setattr(module, "compiled", lambda: routine)
    (found,) = looked_up(inner, [given])
    torch.testing.assert_close(found.spectra.eigenvalues, expected.spectra.eigenvalues, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.moment, expected.moment)
    torch.testing.assert_close(found.square, expected.square)
    along = (found.spectra.principal * expected.spectra.principal).sum(-1).abs()[given.counts > 1]
    torch.testing.assert_close(along, torch.ones_like(along))


@COMPILED
@pytest.mark.parametrize("width", [12, 90])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_looked_up_together_are_what_they_are_alone(threads, width):
    inner, given = clouds(70, width)
    groups = [given.rows(slice(0, 40)), given.rows(slice(40, 70))]
    with torch_threads(threads):
        first, second = looked_up(inner, groups, SLIM_FROM)
    for row in range(len(given.counts)):
        one = slice(row, row + 1)
        (alone,) = looked_up(inner, [given.rows(one)], SLIM_FROM)
        together, one = (first, one) if row < 40 else (second, slice(row - 40, row - 39))
        assert torch.equal(alone.spectra.eigenvalues, together.spectra.eigenvalues[one])
        assert torch.equal(alone.spectra.principal, together.spectra.principal[one])
        assert torch.equal(alone.moment, together.moment[one])
        assert torch.equal(alone.square, together.square[one])


@COMPILED
def test_weighted_sums_are_those_of_the_active_rows_in_float64():
    chance = torch.Generator().manual_seed(0)
    table = torch.randn(30, 37, generator=chance)
    indices = torch.randint(0, 30, (5, 9), generator=chance)
    weights = torch.rand(5, 9, generator=chance, dtype=torch.float64)
    counts = torch.tensor([0, 1, 5, 9, 3])
    weights[torch.arange(9) >= counts[:, None]] = 0
    expected = (weights.unsqueeze(-1) * table.double()[indices]).sum(1)
    torch.testing.assert_close(module.weighted_sums(table, indices, weights, counts), expected)

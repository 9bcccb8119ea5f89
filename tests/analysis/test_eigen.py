"""The compiled code against LAPACK, on what it meets and on what is hard for it."""

from __future__ import annotations

import pytest
import torch

from daemon.analysis.eigen import eigen, inverse_iteration
from daemon.native import eigen as native
from daemon.native.eigen import LANES, routine, table_eigen
from tests.support.torch_threads import torch_threads

COMPILED = pytest.mark.skipif(routine() is None, reason="installed without a C compiler")


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
def test_eigenvalues_and_vectors_are_those_of_lapack(kind, width):
    gram, counts = grams(kind, 2 * LANES + 3, width)
    values, principal = eigen(gram, counts)
    expected = torch.linalg.eigvalsh(gram).flip(-1)
    largest = expected[:, :1]
    assert ((values - expected).abs() <= 1e-13 * largest).all()
    image = (gram @ principal.unsqueeze(2)).squeeze(2)
    above = largest[:, 0] > 0
    residual = torch.linalg.vector_norm(image - largest * principal, dim=-1)
    assert (residual[above] <= 1e-10 * largest[above, 0]).all()
    norm = torch.linalg.vector_norm(principal[above], dim=-1)
    torch.testing.assert_close(norm, torch.ones_like(norm))


@COMPILED
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [12, 50, 140])
def test_a_matrix_gives_the_same_bits_whatever_its_neighbours(width, threads):
    gram, counts = grams("random", 6 * LANES, width)
    with torch_threads(threads):
        values, principal = eigen(gram, counts)
    for row in range(len(gram)):
        n = int(counts[row])
        alone_values, alone_principal = eigen(gram[row : row + 1, :n, :n], counts[row : row + 1])
        assert torch.equal(alone_values[0], values[row, :n])
        assert torch.equal(alone_principal[0], principal[row, :n])


def weighted(rows: int, width: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Decoder rows; indices, weights and counts of some of them at each of so many positions."""
    chance = torch.Generator().manual_seed(1)
    decoder = torch.randn(5 * width, 20, generator=chance, dtype=torch.float64)
    counts = torch.randint(1, width + 1, (rows,), generator=chance)
    indices = torch.stack([torch.randperm(len(decoder), generator=chance)[:width] for _ in counts])
    weights = torch.rand(indices.shape, generator=chance, dtype=torch.float64)
    weights *= torch.arange(width) < counts.unsqueeze(1)
    return decoder, (indices, weights / weights.sum(-1, keepdim=True), counts)


@COMPILED
def test_a_table_of_inner_products_gives_what_the_rows_give():
    decoder, (indices, weights, counts) = weighted(2 * LANES + 1, 12)
    values, principal, moment, square = table_eigen(decoder @ decoder.T, indices, weights, counts)
    rows = decoder[indices]
    centroid = (weights.unsqueeze(1) @ rows).squeeze(1)
    spread = (rows - centroid.unsqueeze(1)) * weights.sqrt().unsqueeze(2)
    expected = torch.linalg.eigvalsh(spread @ spread.mT).flip(-1)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(moment, (weights * rows.square().sum(-1)).sum(-1))
    torch.testing.assert_close(square, centroid.square().sum(-1))
    axis = inverse_iteration(spread @ spread.mT, expected[:, 0])
    along = (axis * principal).sum(-1).abs()[counts > 1]
    torch.testing.assert_close(along, torch.ones_like(along))


@COMPILED
@pytest.mark.parametrize("width", [12, 90])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_of_a_table_taken_together_are_what_they_are_alone(threads, width):
    decoder, given = weighted(70, width)
    inner = decoder @ decoder.T
    with torch_threads(threads):
        together = table_eigen(inner, *given)
    for row in range(70):
        alone = table_eigen(inner, *(one[row : row + 1] for one in given))
        for one, every in zip(alone, together, strict=True):
            assert torch.equal(one[0], every[row])


@pytest.mark.parametrize("found", [None, lambda *_: 1], ids=["not compiled", "gives up"])
def test_torch_does_the_work_where_the_compiled_code_does_not(found, monkeypatch):
    gram, counts = grams("random", 5, 12)
    expected_values, expected_principal = eigen(gram, counts)
    decoder, given = weighted(5, 12)
    monkeypatch.setattr(native, "routine", lambda: found)
    values, principal = eigen(gram, counts)
    torch.testing.assert_close(values, expected_values)
    along = (principal * expected_principal).sum(-1).abs()
    torch.testing.assert_close(along, torch.ones_like(along))
    assert table_eigen(decoder @ decoder.T, *given) is None

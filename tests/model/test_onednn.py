from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from daemon.model import onednn
from daemon.model.onednn import (
    ROW_STEP,
    TYPICAL_ROWS,
    chunk_sizes,
    padded_rows,
    product,
    row_chunks,
    split_product,
    summands_of,
)
from tests.support.torch_threads import torch_threads


@pytest.fixture(autouse=True)
def onednn_is_faster(monkeypatch):
    """On every processor these tests multiply by packed weights."""
    monkeypatch.setattr(onednn, "faster", lambda dtype: True)


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 300, 1000])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_is_that_of_the_rows_alone(rows, biased):
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=generator) for shape in ((24, 40), (24,), (rows, 40)))
    got = product(weight, bias if biased else None)(x)
    assert got.shape == (rows, 24)
    assert_close(got, x @ weight.T + biased * bias, rtol=1e-4, atol=1e-4)


def test_three_bfloat16_numbers_hold_a_float32():
    weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 12, 40)
    assert (sum(part.double() for part in summands_of(weight)) == weight.double()).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_split_product_has_float32_weights():
    chance = torch.Generator("cuda").manual_seed(0)
    weight, bias = (torch.randn(*shape, generator=chance, device="cuda") for shape in ((300, 200), (300,)))
    x = torch.randn(64, 200, generator=chance, device="cuda").bfloat16().float()
    exact = x.double() @ weight.double().T + bias.double()
    error = (split_product(weight, bias)(x) - exact).abs().mean()
    assert error <= 2e-5 * exact.abs().mean()
    assert error <= 0.1 * (x.bfloat16() @ weight.bfloat16().T + bias - exact).abs().mean()


def test_chunks_of_rows_are_all_rows_in_pieces_of_about_the_same_size():
    for rows in [0, 1, 16, 500, *range(512, 5000, 16)]:
        pieces = row_chunks(rows)
        assert [row for piece in pieces for row in range(rows)[piece]] == list(range(rows))
        sizes = [piece.stop - piece.start for piece in pieces[:-1]]
        assert all(size % ROW_STEP == 0 for size in sizes)
        assert len(pieces) == 1 or max(sizes) - min(sizes) <= ROW_STEP
        assert all(size <= 1.5 * TYPICAL_ROWS * torch.get_num_threads() for size in sizes)
        assert padded_rows(rows) - rows < ROW_STEP


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_sizes_of_chunks_are_known_before(threads):
    with torch_threads(threads):
        chunks = [piece for rows in range(1, 6000) for piece in row_chunks(padded_rows(rows))]
    assert {piece.stop - piece.start for piece in chunks} == set(chunk_sizes(threads))

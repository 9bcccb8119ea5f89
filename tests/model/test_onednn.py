from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from daemon.model import onednn
from daemon.model.onednn import product, split_product, summands_of


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

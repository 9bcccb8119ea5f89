"""The compiled routines of sparse.c against torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.analysis.sparse import from_dense
from daemon.analysis.stability import strongest
from daemon.analysis.thresholds import Thresholds, routines
from tests.torch_threads import torch_threads

needs_routines = pytest.mark.skipif(routines() is None, reason="installed without a C compiler")


def pre_acts(n: int, d: int, seed: int) -> torch.Tensor:
    """Some of them equal, as coarse numbers are; some infinite or none at all."""
    chance = torch.Generator().manual_seed(seed)
    values = torch.randn(n, d, generator=chance).mul(4).round().div(4)
    values[torch.rand(n, d, generator=chance) < 0.01] = torch.inf
    values[torch.rand(n, d, generator=chance) < 0.01] = torch.nan
    return values


sizes = {"n": st.integers(0, 40), "d": st.integers(1, 200), "seed": st.integers(0, 10**6)}


@needs_routines
@given(**sizes, threads=st.sampled_from([1, 2]))
@settings(deadline=None)
def test_what_is_above_its_threshold_is_kept(n, d, seed, threads):
    thresholds = torch.linspace(0, 2, d)
    dense = pre_acts(n, d, seed)
    with torch_threads(threads):
        got = Thresholds(thresholds).compact(dense)
    expected = from_dense(dense.where(dense > thresholds, 0))
    assert torch.equal(got.counts, expected.counts)
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(got.values, expected.values)


@needs_routines
@given(**sizes, k=st.integers(0, 5), top_k=st.integers(1, 12))
@settings(deadline=None)
def test_the_strongest_are_those_that_sorting_finds(n, d, seed, k, top_k):
    activation = Thresholds(torch.linspace(0, 0.5, d))
    dense, bank = pre_acts(n, d, seed), pre_acts(7, d, seed + 1)
    draws = torch.randint(0, 7, (n, k), generator=torch.Generator().manual_seed(seed))
    got = activation.strongest(dense, bank, draws, top_k)
    noisy = torch.cat([dense.unsqueeze(1), dense.unsqueeze(1) + bank[draws]], dim=1)
    expected = strongest(activation(noisy.flatten(0, 1)), top_k).view(n, 1 + k, min(top_k, d))
    assert got.shape == expected.shape
    for ours, theirs in zip(got.flatten(0, 1).tolist(), expected.flatten(0, 1).tolist(), strict=True):
        assert sorted(ours) == sorted(theirs)


def test_other_types_are_left_to_torch():
    activation = Thresholds(torch.zeros(3, dtype=torch.float64))
    dense = torch.tensor([[1.0, -1, 2]], dtype=torch.float64)
    assert activation.compact(dense).values.tolist() == [[1.0, 2.0]]
    assert activation.strongest(dense, dense, torch.zeros(1, 1, dtype=torch.int64), 2) is None


def test_without_a_compiler_torch_does_it(monkeypatch):
    monkeypatch.setattr("daemon.analysis.thresholds.routines", lambda: None)
    activation = Thresholds(torch.tensor([0.0, 1.0]))
    assert activation.compact(torch.tensor([[0.5, 0.5]])).indices.tolist() == [[0]]
    assert activation.strongest(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 1).long(), 1) is None

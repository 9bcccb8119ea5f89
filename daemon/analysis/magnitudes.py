"""Measures how an activation's strength is spread over its features.

Each function takes padded magnitudes `values` (N, width), zero after the first `counts` (N,) slots, and
returns (N,) float64. Knows nothing about which features these are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daemon.analysis.row_sums import row_norm, row_sum


def l2_norm(values: Tensor) -> Tensor:
    """||f||, in the units of the activations."""
    return row_norm(values.double())


def gini(values: Tensor, counts: Tensor) -> Tensor:
    """Gini coefficient of the active magnitudes: 0 where all are equal, towards 1 where one dominates.

    The sorted form of sum_ij |m_i - m_j| / (2 n^2 mean): with m ascending and k = 1..n,
    2 sum(k m_k) / (n sum m) - (n + 1) / n. 0 where n = 0.
    """
    width = values.shape[1]
    ascending = values.double().sort(dim=-1).values  # the padding comes first
    n = counts.double()
    rank = torch.arange(1, width + 1, device=values.device) - (width - n).unsqueeze(1)
    coefficient = 2 * row_sum(rank * ascending) / (n * row_sum(ascending)) - (n + 1) / n
    # rounding takes equal magnitudes a hair below zero
    return torch.where(counts > 0, coefficient.clamp(min=0), 0)


def top_k_entropy(values: Tensor, counts: Tensor, top_k: int) -> Tensor:
    """Shannon entropy, in nats, of the `top_k` largest magnitudes normalised to sum 1. 0 where n = 0."""
    largest = values.double().topk(min(top_k, values.shape[1]), dim=-1).values
    entropy = row_sum(torch.special.entr(largest / row_sum(largest).unsqueeze(1)))
    return torch.where(counts > 0, entropy, 0)

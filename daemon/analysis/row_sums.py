"""Sums over the features of a position whose bits depend on that position alone.

Positions of a batch are padded with zeros to the width of the widest. torch's own sums go by that width: they
divide a row among partial sums, and another width divides it otherwise. Here each row is summed from left to
right, where zeros change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_sum(values: Tensor) -> Tensor:
    """(N, width) float64, padded with zeros on either side -> the sum of each row (N,).

    On CUDA, whose cumulative sums are no sums from left to right, by torch's own.
    """
    if values.device.type == "cuda":
        return values.sum(-1)
    return values.cumsum(-1)[:, -1]


def row_norm(values: Tensor) -> Tensor:
    """(N, width) float64, padded with zeros -> the Euclidean length of each row (N,)."""
    lengths: Tensor = row_sum(values.square()).sqrt()
    return lengths


def combined(weights: Tensor, rows: Tensor) -> Tensor:
    """weights (N, width), rows (N, width, d) float64 -> sum_i weights_i rows_i (N, d), from left to right."""
    n, width, d = rows.shape
    if rows.device.type == "cuda":
        return (weights.unsqueeze(1) @ rows).squeeze(1)
    each = torch.arange(n * width, device=rows.device).view(n, width)
    return torch.nn.functional.embedding_bag(
        each, rows.reshape(n * width, d), mode="sum", per_sample_weights=weights
    )

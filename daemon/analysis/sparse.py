"""Sparse feature activations in a padded form that batches. Knows nothing about what made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from daemon.analysis.row_sums import row_norm, row_sum


@dataclass(frozen=True, slots=True)
class SparseActs:
    """The active features (> 0) of one SAE at N positions.

    Row r holds `counts[r]` features in its first slots, by ascending index; the slots after them hold
    index 0 and value 0. `width` is the largest count, and at least 1.
    """

    indices: Tensor  # (N, width) int64
    values: Tensor  # (N, width), of the dtype of the activations
    counts: Tensor  # (N,) int64

    @property
    def width(self) -> int:
        return self.indices.shape[1]

    @property
    def active(self) -> Tensor:
        """(N, width) bool: the slots that hold a feature."""
        return torch.arange(self.width, device=self.counts.device) < self.counts.unsqueeze(1)

    def select(self, rows: Tensor | slice, width: int | None = None) -> SparseActs:
        """The positions `rows` (M,) int64, in that order; none has more than `width` features."""
        return SparseActs(self.indices[rows, :width], self.values[rows, :width], self.counts[rows])

    def to(self, device: torch.device) -> SparseActs:
        return SparseActs(self.indices.to(device), self.values.to(device), self.counts.to(device))

    def to_dense(self, d_sae: int) -> Tensor:
        """(N, d_sae)."""
        dense = self.values.new_zeros(len(self.counts), d_sae)
        return dense.scatter_add_(1, self.indices, self.values)


def joined(pieces: Sequence[SparseActs]) -> SparseActs:
    """The positions of several, one after the other."""
    if len(pieces) == 1:
        return pieces[0]
    width = max(piece.width for piece in pieces)
    padding = [(0, width - piece.width) for piece in pieces]
    return SparseActs(
        torch.cat([F.pad(piece.indices, pad) for piece, pad in zip(pieces, padding, strict=True)]),
        torch.cat([F.pad(piece.values, pad) for piece, pad in zip(pieces, padding, strict=True)]),
        torch.cat([piece.counts for piece in pieces]),
    )


def shared_cosine(a: SparseActs, b: SparseActs, limit: int) -> Tensor:
    """Cosine (N,) float64 of two dictionaries' feature vectors over their first `limit` entries.

    The two dictionaries are not aligned: feature i of one has nothing to do with feature i of the other.
    The original study defined the quantity so, and it is kept for comparison with it. NaN where either
    vector has no active feature among those entries.
    """
    keys_a, values_a = _restrict(a, limit)
    keys_b, values_b = _restrict(b, limit)
    slots = torch.searchsorted(keys_b, keys_a).clamp(max=b.width - 1)
    common = keys_b.gather(1, slots) == keys_a  # empty slots may meet: their values are 0
    dot = row_sum((values_a * values_b.gather(1, slots)).where(common, 0))
    cosine = dot / (row_norm(values_a) * row_norm(values_b))
    return cosine.clamp(max=1)  # rounding


def _restrict(acts: SparseActs, limit: int) -> tuple[Tensor, Tensor]:
    """Ascending keys (N, width), `limit` where the slot is empty or beyond, and values, 0 there."""
    kept = acts.active & (acts.indices < limit)
    return acts.indices.where(kept, limit), acts.values.double().where(kept, 0)


def from_dense(feature_acts: Tensor) -> SparseActs:
    """Keep exactly the entries > 0 of feature_acts (N, d_sae). Waits for the device once."""
    positive = feature_acts > 0
    rows, columns = positive.nonzero(as_tuple=True)  # row by row, columns ascending
    counts = positive.sum(1)
    n = len(feature_acts)
    width = max(1, int(counts.max())) if n else 1
    starts = counts.cumsum(0) - counts
    slots = torch.arange(len(rows), device=rows.device) - starts[rows]
    indices = columns.new_zeros(n, width)
    values = feature_acts.new_zeros(n, width)
    indices[rows, slots] = columns
    values[rows, slots] = feature_acts[rows, columns]
    return SparseActs(indices, values, counts)

"""Compares two texts of a sample, or two layers of one text.

Everything is (N,) float64 over N pairs; NaN where a side has nothing to compare.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daemon.analysis.angles import line_angle, vector_angle
from daemon.analysis.sparse import SparseActs


def centroid_drift(a: Tensor, b: Tensor) -> Tensor:
    """Angle in degrees, 0..180, of the centroids a, b (N, d_in) of two texts; NaN where either is zero."""
    return vector_angle(a, b)


def axis_twist(a: Tensor, b: Tensor) -> Tensor:
    """Angle in degrees, 0..90, of the principal axes a, b (N, d_in) as lines; NaN where either is zero."""
    return line_angle(a, b)


def cross_layer_consistency(a: SparseActs, b: SparseActs, d_sae_a: int, d_sae_b: int) -> Tensor:
    """Cosine of two layers' feature vectors over their first min(d_sae_a, d_sae_b) entries.

    The two dictionaries are not aligned: feature i of one has nothing to do with feature i of the other.
    The original study defined the quantity so, and it is kept for comparison with it. NaN where either
    vector has no active feature among those entries.
    """
    limit = min(d_sae_a, d_sae_b)
    keys_a, values_a = _restrict(a, limit)
    keys_b, values_b = _restrict(b, limit)
    slots = torch.searchsorted(keys_b, keys_a).clamp(max=b.width - 1)
    common = keys_b.gather(1, slots) == keys_a  # empty slots may meet: their values are 0
    dot = (values_a * values_b.gather(1, slots)).where(common, 0).sum(-1)
    norms = torch.linalg.vector_norm(values_a, dim=-1) * torch.linalg.vector_norm(values_b, dim=-1)
    cosine: Tensor = dot / norms
    return cosine.clamp(max=1)  # rounding


def _restrict(acts: SparseActs, limit: int) -> tuple[Tensor, Tensor]:
    """Ascending keys (N, width), `limit` where the slot is empty or beyond, and values, 0 there."""
    kept = acts.active & (acts.indices < limit)
    return acts.indices.where(kept, limit), acts.values.double().where(kept, 0)

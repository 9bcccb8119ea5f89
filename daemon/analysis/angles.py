"""Angles between batched vectors, in degrees, accurate near 0, 90 and 180 alike.

Formula: W. Kahan, "How Futile are Mindless Assessments of Roundoff in Floating-Point Computation?"
(2006), section 12: 2 atan2(||u - v||, ||u + v||) for unit u, v. The arc cosine of a dot product loses half
of the digits of a small angle.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

VECTORS = 64  # numbers: a multiple of what torch works on at a time, on any processor


def vector_angle(a: Tensor, b: Tensor) -> Tensor:
    """a, b: (N, d) -> (N,) float64 in [0, 180]; NaN where either is the zero vector."""
    apart, together = _diagonals(a, b)
    return torch.rad2deg(2 * arc_tangent(apart, together))


def line_angle(a: Tensor, b: Tensor) -> Tensor:
    """The angle of two lines, whatever the sign of their directions.

    a, b: (N, d) -> (N,) float64 in [0, 90]; NaN where either is the zero vector.
    """
    apart, together = _diagonals(a, b)
    return torch.rad2deg(2 * arc_tangent(torch.minimum(apart, together), torch.maximum(apart, together)))


def arc_tangent(y: Tensor, x: Tensor) -> Tensor:
    """atan2(y, x) (N,), the same bits for any N: torch has another function for what fills no vector."""
    n = len(y)
    y, x = (F.pad(one, (0, -n % VECTORS)) for one in (y, x))
    return torch.atan2(y, x)[:n]


def _diagonals(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """||u - v|| and ||u + v|| (N,) of the unit vectors u, v; NaN where there is none."""
    u, v = _unit(a.double()), _unit(b.double())
    return torch.linalg.vector_norm(u - v, dim=-1), torch.linalg.vector_norm(u + v, dim=-1)


def _unit(vectors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norms

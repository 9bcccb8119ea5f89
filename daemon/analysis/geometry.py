"""The shape of a weighted cloud of decoder rows: the inertia-tensor geometry of what fired.

With weights w = m / sum(m) on decoder rows r_i, centroid c = sum w_i r_i and tensor
C = sum w_i (r_i - c)(r_i - c)^T (d_in x d_in). C is never formed: with S the matrix of rows
sqrt(w_i) (r_i - c), C = S^T S has the same non-zero eigenvalues as the n x n Gram matrix S S^T, whose
principal eigenvector u gives the principal axis S^T u / ||S^T u||.

All of it runs in float64, whatever the input: the shape is made of ratios of eigenvalues, and the Gram
matrix squares the condition of S, so float32 resolves b/a and c/a only down to 3e-4.
Gram matrix and eigensolver together measured 1.6 times slower than in float32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from daemon.analysis.angles import line_angle
from daemon.analysis.sparse import SparseActs
from daemon.columns import SHAPE_CLASSES

MAX_GATHERED = 1 << 22  # elements of a chunk's decoder rows: 32 MiB
WIDTH_SLACK = 1.25  # the widest row of a chunk has at most this many times the features of its narrowest,
WIDTH_FLOOR = 16  # unless it has no more than this
RELATIVE_EPSILON = 1e-12  # an eigenvalue below this share of the largest is rounding: 0
POINT_EPSILON = 1e-24  # a squared length below this share of sum w_i ||r_i||^2 is rounding: 0


@dataclass(frozen=True, slots=True)
class Geometry:
    """The geometry at N positions; float64 but for `shape_class`.

    Where no shape is defined (no active feature, a single one, several in one place, or infinite
    magnitudes) `shape_class` is "None" and every other field but the centroid is 0.
    """

    centroid: Tensor  # (N, d_in); zero where nothing fired, or where the rows cancel out
    axis: Tensor  # (N, d_in) unit, of either sign; zero where undefined
    sphericity: Tensor  # (N,) c/a = sqrt(lambda3 / lambda1)
    elongation: Tensor  # (N,) b/a = sqrt(lambda2 / lambda1)
    dimensionality: Tensor  # (N,) participation ratio (sum l)^2 / sum l^2
    eigenvalue_entropy: Tensor  # (N,) nats
    misalignment: Tensor  # (N,) degrees 0..90, centroid to axis; NaN where there is a shape about the origin
    shape_class: Tensor  # (N,) int64, index into `daemon.columns.SHAPE_CLASSES`


def geometry(acts: SparseActs, W_dec: Tensor) -> Geometry:
    """The geometry of N sparse activations over W_dec (d_sae, d_in). Waits for the device once.

    Rows are taken by ascending count, in chunks that bound the gathered decoder rows.
    """
    order = acts.counts.argsort()
    ordered = acts.select(order)
    chunks = [
        _chunk_geometry(
            ordered.indices[rows, :width], ordered.values[rows, :width], ordered.counts[rows], W_dec
        )
        for rows, width in row_chunks(ordered.counts.tolist(), W_dec.shape[1])
    ]
    inverse = order.argsort()
    return Geometry(
        **{
            field.name: torch.cat([getattr(chunk, field.name) for chunk in chunks])[inverse]
            for field in fields(Geometry)
        }
    )


def row_chunks(ascending: list[int], d_in: int) -> Iterator[tuple[slice, int]]:
    """Runs of rows of similar width, and each run's width; one empty run if there are no rows."""
    start = 0
    for stop in range(1, len(ascending) + 1):
        at_end = stop == len(ascending)
        width = max(1, ascending[stop - 1])
        following = width if at_end else max(1, ascending[stop])
        too_wide = following > max(WIDTH_FLOOR, WIDTH_SLACK * ascending[start])
        too_large = (stop + 1 - start) * following * d_in > MAX_GATHERED
        if at_end or too_wide or too_large:
            yield slice(start, stop), width
            start = stop
    if not ascending:
        yield slice(0, 0), 1


def _chunk_geometry(indices: Tensor, values: Tensor, counts: Tensor, W_dec: Tensor) -> Geometry:
    """indices, values: (rows, width), counts: (rows,)."""
    magnitudes = values.double()
    # a row that has no sum, or an infinite one, weighs nothing
    weights = (magnitudes / magnitudes.sum(-1, keepdim=True)).nan_to_num(nan=0.0)
    decoders = W_dec[indices].double()  # (rows, width, d_in)
    moment = (weights * torch.linalg.vector_norm(decoders, dim=-1).square()).sum(-1)
    centroid = (weights.unsqueeze(1) @ decoders).squeeze(1)
    spread = decoders.sub_(centroid.unsqueeze(1)).mul_(weights.sqrt().unsqueeze(-1))  # S
    raw, eigenvectors = torch.linalg.eigh(spread @ spread.mT)
    eigenvalues = _clean_eigenvalues(raw.flip(-1), counts, POINT_EPSILON * moment)
    has_shape = eigenvalues[:, 0] > 0
    axis = (eigenvectors[:, :, -1].unsqueeze(1) @ spread).squeeze(1)
    axis = _where(has_shape, axis / torch.linalg.vector_norm(axis, dim=-1, keepdim=True))
    off_origin = torch.linalg.vector_norm(centroid, dim=-1).square() > POINT_EPSILON * moment
    centroid = _where(off_origin, centroid)
    relative = _where(has_shape, eigenvalues / eigenvalues[:, :1])  # (rows, >= 3), l / l1
    elongation, sphericity = relative[:, 1].sqrt(), relative[:, 2].sqrt()
    total = relative.sum(-1)
    return Geometry(
        centroid=centroid,
        axis=axis,
        sphericity=sphericity,
        elongation=elongation,
        dimensionality=_where(has_shape, total.square() / relative.square().sum(-1)),
        eigenvalue_entropy=_where(has_shape, torch.special.entr(relative / total.unsqueeze(1)).sum(-1)),
        misalignment=_where(has_shape, line_angle(centroid, axis)),
        shape_class=_shape_class(has_shape, elongation, sphericity),
    )


def _clean_eigenvalues(descending: Tensor, counts: Tensor, point: Tensor) -> Tensor:
    """Descending eigenvalues (rows, >= 3) without rounding noise.

    n centred rows span at most n - 1 dimensions, so lambda_k is exactly 0 for k >= n. Below
    RELATIVE_EPSILON of lambda1 an eigenvalue is 0; and all are where lambda1 is not above `point` (rows,).
    """
    padded = torch.nn.functional.pad(descending, (0, max(0, 3 - descending.shape[1])))
    largest = padded[:, :1]
    k = torch.arange(1, padded.shape[1] + 1, device=padded.device)
    real = (k < counts.unsqueeze(1)) & (padded > RELATIVE_EPSILON * largest) & (largest > point.unsqueeze(1))
    return padded.where(real, 0)


def _shape_class(has_shape: Tensor, elongation: Tensor, sphericity: Tensor) -> Tensor:
    """Indices into SHAPE_CLASSES (rows,); the first condition that holds wins."""
    conditions = (
        ("None", ~has_shape),
        ("Spherical", (elongation > 0.9) & (sphericity > 0.9)),
        ("Oblate", (elongation > 0.8) & (sphericity < 0.6)),
        ("Prolate", (elongation < 0.6) & (sphericity < 0.6)),
    )
    result = torch.full_like(has_shape, SHAPE_CLASSES.index("Triaxial"), dtype=torch.int64)
    for name, holds in reversed(conditions):
        result = torch.where(holds, SHAPE_CLASSES.index(name), result)
    return result


def _where(rows: Tensor, values: Tensor) -> Tensor:
    """`values` (rows, ...) where the condition (rows,) holds, else 0."""
    return values.where(rows.view(-1, *[1] * (values.ndim - 1)), 0)

"""The shape of weighted decoder rows: the inertia-tensor geometry of the active features.

With weights w = m / sum(m) on decoder rows r_i, centroid c = sum w_i r_i and tensor
C = sum w_i (r_i - c)(r_i - c)^T (d_in x d_in). C is never formed: with S the matrix of rows
sqrt(w_i) (r_i - c), C = S^T S has the same non-zero eigenvalues as the n x n Gram matrix S S^T, whose
principal eigenvector u gives the principal axis S^T u / ||S^T u||. Nor is S, where compiled code reads the
inner products of all decoder rows from a table: with K those of the active rows and D = diag(w),
S S^T = D^(1/2) (K - 1 (K w)^T - (K w) 1^T + w^T K w) D^(1/2).

All of it runs in float64, whatever the input: the shape is made of ratios of eigenvalues, and the Gram
matrix squares the condition of S, so float32 resolves b/a and c/a only down to 3e-4.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from daemon.analysis.angles import line_angle
from daemon.analysis.eigen import eigen, kernels
from daemon.analysis.row_sums import combined, row_sum
from daemon.analysis.sparse import SparseActs
from daemon.native.eigen import routine, table_eigen

SHAPE_CLASSES = ("None", "Spherical", "Oblate", "Prolate", "Triaxial")

MAX_GATHERED = 1 << 19  # numbers in the rows gathered for a chunk: 4 MiB, which caches hold
GATHERED_SHARE = 32  # of an accelerator's memory, in bytes: 1 / 32 of it
MAX_TABLE_BYTES = 128 << 20  # of all inner products of one dictionary
WIDTH_FLOOR = 16  # features: the narrowest chunk's
WIDTH_SLACK = 1.25  # each wider one has about this many times the width of the one before,
WIDTH_STEP = 8  # in multiples of this
RELATIVE_EPSILON = 1e-12  # an eigenvalue below this share of the largest is rounding: 0
POINT_EPSILON = 1e-24  # a squared length below this share of sum w_i ||r_i||^2 is rounding: 0
CANCELLED = 1e-2  # a spread below this share of that loses digits in the difference of inner products


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
    shape_class: Tensor  # (N,) int64, index into SHAPE_CLASSES


@dataclass(frozen=True, slots=True)
class DecoderRows:
    """The rows of one dictionary's decoder; and, for compiled code, numbers about them that never change."""

    W_dec: Tensor  # (d_sae, d_in)
    exact: Tensor | None  # (d_sae, d_in) the same in float64
    inner: Tensor | None  # (d_sae, d_sae) float64 inner products; None where they would be too large

    @classmethod
    def of(cls, W_dec: Tensor, max_bytes: int = MAX_TABLE_BYTES) -> DecoderRows:
        if W_dec.device.type != "cpu" or routine() is None or 8 * len(W_dec) ** 2 > max_bytes:
            return cls(W_dec, None, None)
        exact = W_dec.double()
        return cls(W_dec, exact, exact @ exact.T)

    @property
    def max_gathered(self) -> int:
        """How many numbers the rows gathered for a chunk may have."""
        if self.W_dec.device.type != "cuda":
            return MAX_GATHERED
        return torch.cuda.get_device_properties(self.W_dec.device).total_memory // (8 * GATHERED_SHARE)


def weighted(acts: SparseActs) -> SparseActs:
    """The same features with weights of sum 1 as their values, in float64."""
    magnitudes = acts.values.double()
    # a row that has no sum, or an infinite one, weighs nothing
    weights = (magnitudes / row_sum(magnitudes).unsqueeze(1)).nan_to_num(nan=0.0)
    return SparseActs(acts.indices, weights, acts.counts)


def geometry(acts: SparseActs, decoder: DecoderRows) -> Geometry:
    """The geometry of N sparse activations."""
    order = acts.counts.argsort()  # neighbours of like width waste little
    ordered = weighted(acts.select(order))
    solved = None if decoder.inner is None else _by_table(ordered, decoder, decoder.inner)
    shape = _shape(_by_rows(ordered, decoder) if solved is None else solved, ordered.counts)
    inverse = order.argsort()
    return Geometry(**{field.name: getattr(shape, field.name)[inverse] for field in fields(Geometry)})


def row_chunks(ascending: list[int], d_in: int, max_gathered: int) -> Iterator[tuple[slice, int]]:
    """Runs of rows of one width, and that width; one empty run if there are no rows.

    The width is a function of a row's own features, so that its products are those of any other batch. A run
    of several rows gathers at most `max_gathered` numbers, d_in for each feature.
    """
    widths = [chunk_width(count) for count in ascending]
    start = 0
    for stop, (width, following) in enumerate(itertools.pairwise([*widths, 0]), 1):
        if width != following or (stop + 1 - start) * width * d_in > max_gathered:
            yield slice(start, stop), width
            start = stop
    if not ascending:
        yield slice(0, 0), 1


@functools.cache
def chunk_width(count: int) -> int:
    """The least width of a chunk that holds so many features."""
    width = WIDTH_FLOOR
    while width < count:
        width = math.ceil(width * WIDTH_SLACK / WIDTH_STEP) * WIDTH_STEP
    return width


@dataclass(frozen=True, slots=True)
class Solved:
    """The numbers that the shapes of N positions are made of."""

    eigenvalues: Tensor  # (N, width) of S S^T, descending
    axis: Tensor  # (N, d_in) S^T u for its principal eigenvector u
    centroid: Tensor  # (N, d_in)
    moment: Tensor  # (N,) sum w_i ||r_i||^2


def _by_rows(rows: SparseActs, decoder: DecoderRows) -> Solved:
    """By the decoder rows themselves, in chunks that bound the gathered rows; `rows` by ascending count."""
    ascending = rows.counts.tolist()
    widest = chunk_width(ascending[-1] if ascending else 1)
    rows = SparseActs(_padded(rows.indices, widest), _padded(rows.values, widest), rows.counts)
    chunks = row_chunks(ascending, decoder.W_dec.shape[1], decoder.max_gathered)
    pieces = [_gathered(rows.select(chunk, width), decoder.W_dec) for chunk, width in chunks]
    return Solved(
        eigenvalues=torch.cat([_padded(piece.eigenvalues, widest) for piece in pieces]),
        axis=torch.cat([piece.axis for piece in pieces]),
        centroid=torch.cat([piece.centroid for piece in pieces]),
        moment=torch.cat([piece.moment for piece in pieces]),
    )


def _gathered(rows: SparseActs, W_dec: Tensor) -> Solved:
    """Exact for the smallest spread; takes (rows, width, d_in) of memory."""
    indices, weights, counts = rows.indices, rows.values, rows.counts
    if W_dec.device.type == "cuda" and (ours := kernels()) is not None:
        spread, centroid, moment = ours.centred(W_dec, indices, weights, counts)  # S
    else:
        decoders = W_dec[indices].double()
        moment = row_sum(weights * torch.linalg.vector_norm(decoders, dim=-1).square())
        centroid = combined(weights, decoders)
        spread = decoders.sub_(centroid.unsqueeze(1)).mul_(weights.sqrt().unsqueeze(-1))
    eigenvalues, principal = eigen(spread @ spread.mT, counts)
    return Solved(eigenvalues, combined(principal, spread), centroid, moment)


def _by_table(rows: SparseActs, decoder: DecoderRows, inner: Tensor) -> Solved | None:
    """By the table of inner products; spreads too small for their differences by the rows themselves.

    None where the compiled code does not converge.
    """
    indices, weights, counts = rows.indices, rows.values, rows.counts
    found = table_eigen(inner, indices, weights, counts)
    if found is None or decoder.exact is None:
        return None
    eigenvalues, principal, moment, square = found
    centroid = weighted_sum(indices, weights, counts, decoder.exact)
    scaled = weights.sqrt() * principal
    axis = weighted_sum(indices, scaled, counts, decoder.exact) - row_sum(scaled).unsqueeze(1) * centroid
    small = ((moment - square <= CANCELLED * moment) & (counts > 1)).nonzero().squeeze(1)
    if len(small):
        again = _by_rows(rows.select(small), decoder)
        eigenvalues[small] = again.eigenvalues[:, : rows.width]
        moment[small] = again.moment
        axis[small], centroid[small] = again.axis, again.centroid
    return Solved(eigenvalues, axis, centroid, moment)


def _padded(values: Tensor, width: int) -> Tensor:
    """The same with zeros up to `width`, or without those beyond."""
    return F.pad(values, (0, width - values.shape[1]))


def _shape(solved: Solved, counts: Tensor) -> Geometry:
    """The geometry of `counts` (N,) weighted rows at each of N positions."""
    eigenvalues = _clean_eigenvalues(solved.eigenvalues, counts, POINT_EPSILON * solved.moment)
    has_shape = eigenvalues[:, 0] > 0
    axis = _where(has_shape, solved.axis / torch.linalg.vector_norm(solved.axis, dim=-1, keepdim=True))
    length = torch.linalg.vector_norm(solved.centroid, dim=-1)
    centroid = _where(length.square() > POINT_EPSILON * solved.moment, solved.centroid)  # off the origin
    relative = _where(has_shape, eigenvalues / eigenvalues[:, :1])  # (rows, >= 3), l / l1
    elongation, sphericity = relative[:, 1].sqrt(), relative[:, 2].sqrt()
    total = row_sum(relative)
    return Geometry(
        centroid=centroid,
        axis=axis,
        sphericity=sphericity,
        elongation=elongation,
        dimensionality=_where(has_shape, total.square() / row_sum(relative.square())),
        eigenvalue_entropy=_where(has_shape, row_sum(torch.special.entr(relative / total.unsqueeze(1)))),
        misalignment=_where(has_shape, line_angle(centroid, axis)),
        shape_class=_shape_class(has_shape, elongation, sphericity),
    )


def weighted_sum(indices: Tensor, weights: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
    """sum_i weights_i rows[indices_i]: (N, width) twice, (N,), (M, d) -> (N, d), no (N, width, d) in between.

    Weights beyond the first `counts` of each row are zero.
    """
    if rows.device.type == "cuda" and (ours := kernels()) is not None:
        sums: Tensor = ours.weighted_sums(rows, indices, weights, counts)
        return sums
    return F.embedding_bag(indices, rows, mode="sum", per_sample_weights=weights)


def _clean_eigenvalues(descending: Tensor, counts: Tensor, point: Tensor) -> Tensor:
    """Descending eigenvalues (rows, >= 3) without rounding noise.

    n centred rows span at most n - 1 dimensions, so lambda_k is exactly 0 for k >= n. Below
    RELATIVE_EPSILON of lambda1 an eigenvalue is 0; and all are where lambda1 is not above `point` (rows,).
    """
    padded = _padded(descending, max(3, descending.shape[1]))
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

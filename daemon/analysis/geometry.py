"""The shape of a weighted cloud of decoder rows: the inertia-tensor geometry of what fired.

With weights w = m / sum(m) on decoder rows r_i, centroid c = sum w_i r_i and tensor
C = sum w_i (r_i - c)(r_i - c)^T (d_in x d_in). C is never formed: with S the matrix of rows
sqrt(w_i) (r_i - c), C = S^T S has the same non-zero eigenvalues as the n x n Gram matrix S S^T, whose
principal eigenvector u gives the principal axis S^T u / ||S^T u||. Nor is S, where the inner products of all
decoder rows fit in memory: with K those of the active rows and D = diag(w),
S S^T = D^(1/2) (K - 1 (K w)^T - (K w) 1^T + w^T K w) D^(1/2).

All of it runs in float64, whatever the input: the shape is made of ratios of eigenvalues, and the Gram
matrix squares the condition of S, so float32 resolves b/a and c/a only down to 3e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from daemon.analysis.angles import line_angle
from daemon.analysis.columns import SHAPE_CLASSES
from daemon.analysis.sparse import SparseActs
from daemon.analysis.spectra import (
    EXACT,
    SLIM_FROM,
    Clouds,
    LookedUp,
    kernels,
    looked_up,
    looks_up,
    spectra_later,
    sums_exactly,
    weighted_sums,
)
from daemon.analysis.threads import side_by_side

T = TypeVar("T")
Parts = TypeVar("Parts", "Geometry", "Solved")

MAX_GATHERED = 1 << 19  # elements of what a chunk's rows are worked out in: 4 MiB, which caches hold
GATHERED_SHARE = 32  # of an accelerator's memory, in bytes: 1 / 32 of it
MAX_TABLE_BYTES = 128 << 20  # of all inner products of one dictionary
WIDTH_SLACK = 1.25  # the widest row of a chunk has at most this many times the features of its narrowest,
WIDTH_SLACK_LOOKED_UP = 4.0  # where only the weights are as wide as the widest,
WIDTH_FLOOR = 16  # unless it has no more than this
RELATIVE_EPSILON = 1e-12  # an eigenvalue below this share of the largest is rounding: 0
POINT_EPSILON = 1e-24  # a squared length below this share of sum w_i ||r_i||^2 is rounding: 0
CANCELLED = 1e-2  # a cloud below this share of that loses digits in the difference of inner products


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
    shape_class: Tensor  # (N,) int64, index into `daemon.analysis.columns.SHAPE_CLASSES`


@dataclass(frozen=True, slots=True)
class DecoderRows:
    """The rows of one dictionary's decoder, and what is worked out about them once."""

    W_dec: Tensor  # (d_sae, d_in)
    inner: Tensor | None  # (d_sae, d_sae) float64 inner products; None where they would be too large
    summed: Tensor  # W_dec, in float64 unless a routine sums float32 exactly

    @classmethod
    def of(cls, W_dec: Tensor, max_bytes: int = MAX_TABLE_BYTES) -> DecoderRows:
        if 8 * len(W_dec) ** 2 > max_bytes:
            return cls(W_dec, None, W_dec)
        exact = W_dec.double()
        return cls(W_dec, exact @ exact.T, W_dec if sums_exactly(W_dec) else exact)

    @property
    def most(self) -> int:
        """How many numbers a chunk of rows may need."""
        if self.W_dec.device.type != "cuda":
            return MAX_GATHERED
        return torch.cuda.get_device_properties(self.W_dec.device).total_memory // (8 * GATHERED_SHARE)

    @property
    def at_one_go(self) -> bool:
        """Whether a routine takes many rows of different widths, and no matrices are formed."""
        return self.inner is not None and looks_up(self.inner)

    def elements(self) -> Callable[[int], int]:
        """How many numbers a row of so many features needs at a time."""
        d_in = self.W_dec.shape[1]
        if self.inner is None:
            return lambda width: width * d_in
        return (lambda width: width + d_in) if self.at_one_go else (lambda width: width * width)


def geometry(acts: SparseActs, decoder: DecoderRows) -> Geometry:
    """The geometry of N sparse activations. Waits for the device once.

    Rows are taken by ascending count, in chunks that bound what is gathered; on a CPU these run side by side,
    or pieces of them.
    """
    order = acts.counts.argsort()
    ordered = acts.select(order)
    slack = WIDTH_SLACK_LOOKED_UP if decoder.at_one_go else WIDTH_SLACK
    planned = list(row_chunks(ordered.counts.tolist(), decoder.elements(), decoder.most, slack))
    slim_from = EXACT if acts.values.dtype == torch.float64 else SLIM_FROM

    def clouds(chunk: tuple[slice, int]) -> Clouds:
        rows, width = chunk
        return _weighed(ordered.indices[rows, :width], ordered.values[rows, :width], ordered.counts[rows])

    def whole(chunk: tuple[slice, int]) -> Geometry:
        return _shape(_begun(clouds(chunk), decoder, slim_from)(), ordered.counts[chunk[0]])

    if decoder.at_one_go and decoder.inner is not None:
        groups = [clouds(chunk) for chunk in planned]
        found = looked_up(decoder.inner, groups, slim_from)
        solved = [_looked_up(*one, decoder) for one in zip(groups, found, strict=True)]
        shapes = [_shape(one, group.counts) for one, group in zip(solved, groups, strict=True)]
        shape = _joined(Geometry, shapes)
    elif decoder.W_dec.device.type == "cpu":
        shape = _joined(Geometry, side_by_side(whole, planned))
    else:  # what is done once costs one call
        begun = (_begun(clouds(chunk), decoder, slim_from) for chunk in planned)
        shape = _shape(_joined(Solved, list(one_ahead(begun))), ordered.counts)
    inverse = order.argsort()
    return Geometry(**{field.name: getattr(shape, field.name)[inverse] for field in fields(Geometry)})


def one_ahead(begun: Iterator[Callable[[], T]]) -> Iterator[T]:
    """What each gives when it is called, which is once the next is begun."""
    before: Callable[[], T] | None = None
    for this in begun:
        if before is not None:
            yield before()
        before = this
    if before is not None:
        yield before()


def row_chunks(
    ascending: list[int], elements: Callable[[int], int], most: int, slack: float = WIDTH_SLACK
) -> Iterator[tuple[slice, int]]:
    """Runs of rows of similar width, and each run's width; one empty run if there are no rows.

    `elements` is how many numbers a row of a width needs; a run of several rows needs at most `most`.
    """
    start = 0
    for stop in range(1, len(ascending) + 1):
        at_end = stop == len(ascending)
        width = max(1, ascending[stop - 1])
        following = width if at_end else max(1, ascending[stop])
        too_wide = following > max(WIDTH_FLOOR, slack * ascending[start])
        too_large = (stop + 1 - start) * elements(following) > most
        if at_end or too_wide or too_large:
            yield slice(start, stop), width
            start = stop
    if not ascending:
        yield slice(0, 0), 1


@dataclass(frozen=True, slots=True)
class Solved:
    """What the shapes of a few positions are made of."""

    eigenvalues: Tensor  # (rows, width) of S S^T, descending
    axis: Tensor  # (rows, d_in) S^T u for its principal eigenvector u
    centroid: Tensor  # (rows, d_in)
    moment: Tensor  # (rows,) sum w_i ||r_i||^2


def _joined(kind: type[Parts], pieces: Sequence[Parts]) -> Parts:
    """One Geometry, or Solved, of several; what is less wide is filled up with zeros."""

    def together(name: str) -> Tensor:
        tensors = [getattr(piece, name) for piece in pieces]
        if name == "eigenvalues":
            widest = max(tensor.shape[1] for tensor in tensors)
            tensors = [F.pad(tensor, (0, widest - tensor.shape[1])) for tensor in tensors]
        return torch.cat(tensors)

    return kind(**{field.name: together(field.name) for field in fields(kind)})


def _weighed(indices: Tensor, values: Tensor, counts: Tensor) -> Clouds:
    """indices, values: (rows, width), counts: (rows,)."""
    magnitudes = values.double()
    # a row that has no sum, or an infinite one, weighs nothing
    weights = (magnitudes / magnitudes.sum(-1, keepdim=True)).nan_to_num(nan=0.0)
    return Clouds(indices.contiguous(), weights.contiguous(), counts.contiguous())


def _begun(clouds: Clouds, decoder: DecoderRows, slim_from: int) -> Callable[[], Solved]:
    """What can be begun is; the call ends it."""
    if decoder.inner is None:
        return _gathered(clouds, decoder.W_dec, slim_from)
    (found,) = looked_up(decoder.inner, [clouds], slim_from)
    solved = _looked_up(clouds, found, decoder)
    return lambda: solved


def _shape(solved: Solved, counts: Tensor) -> Geometry:
    """The geometry of clouds of `counts` (rows,) decoder rows."""
    eigenvalues = _clean_eigenvalues(solved.eigenvalues, counts, POINT_EPSILON * solved.moment)
    has_shape = eigenvalues[:, 0] > 0
    axis = _where(has_shape, solved.axis / torch.linalg.vector_norm(solved.axis, dim=-1, keepdim=True))
    length = torch.linalg.vector_norm(solved.centroid, dim=-1)
    centroid = _where(length.square() > POINT_EPSILON * solved.moment, solved.centroid)  # off the origin
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


def _gathered(clouds: Clouds, W_dec: Tensor, slim_from: int = EXACT) -> Callable[[], Solved]:
    """By the rows themselves: exact for the smallest cloud, (rows, width, d_in) of memory."""
    indices, weights, counts = clouds.indices, clouds.weights, clouds.counts
    if W_dec.device.type == "cuda" and (ours := kernels()) is not None:
        spread, centroid, moment = ours.centred(W_dec, indices, weights, counts)  # S
    else:
        decoders = W_dec[indices].double()
        moment = (weights * torch.linalg.vector_norm(decoders, dim=-1).square()).sum(-1)
        centroid = (weights.unsqueeze(1) @ decoders).squeeze(1)
        spread = decoders.sub_(centroid.unsqueeze(1)).mul_(weights.sqrt().unsqueeze(-1))
    found = spectra_later(spread @ spread.mT, counts, slim_from)

    def solved() -> Solved:
        spectra = found()
        axis = (spectra.principal.unsqueeze(1) @ spread).squeeze(1)
        return Solved(spectra.eigenvalues, axis, centroid, moment)

    return solved


def _looked_up(clouds: Clouds, found: LookedUp, decoder: DecoderRows) -> Solved:
    """By the table of inner products; clouds too small for differences of those by the rows themselves."""
    indices, weights, counts = clouds.indices, clouds.weights, clouds.counts
    eigenvalues, moment = found.spectra.eigenvalues, found.moment
    centroid = exact_sum(indices, weights, counts, decoder.summed)
    scaled = weights.sqrt() * found.spectra.principal
    axis = exact_sum(indices, scaled, counts, decoder.summed) - scaled.sum(-1, keepdim=True) * centroid
    small = ((moment - found.square <= CANCELLED * moment) & (counts > 1)).nonzero().squeeze(1)
    d_in = decoder.W_dec.shape[1]
    for chunk, width in row_chunks(counts[small].tolist(), lambda width: width * d_in, decoder.most):
        rows = small[chunk]
        exact = _gathered(Clouds(indices[rows, :width], weights[rows, :width], counts[rows]), decoder.W_dec)()
        eigenvalues[rows] = F.pad(exact.eigenvalues, (0, eigenvalues.shape[1] - width))
        axis[rows], centroid[rows], moment[rows] = exact.axis, exact.centroid, exact.moment
    return Solved(eigenvalues, axis, centroid, moment)


def weighted_sum(indices: Tensor, weights: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
    """sum_i weights_i rows[indices_i]: (N, width) twice, (N,), (M, d) -> (N, d), no (N, width, d) in between.

    Weights beyond the first `counts` of each row are zero.
    """
    if rows.device.type == "cuda" and (ours := kernels()) is not None:
        sums: Tensor = ours.weighted_sums(rows, indices, weights, counts)
        return sums
    return F.embedding_bag(indices, rows, mode="sum", per_sample_weights=weights)


def exact_sum(indices: Tensor, weights: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
    """`weighted_sum` in float64, of rows as `DecoderRows.summed` has them."""
    if sums_exactly(rows):
        return weighted_sums(rows, indices, weights, counts)
    return weighted_sum(indices, weights, counts, rows)


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

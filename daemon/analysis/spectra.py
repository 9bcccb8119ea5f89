"""The spectra of batches of small Gram matrices: every eigenvalue, and the principal eigenvector.

On a CPU by a compiled routine (`spectra.c`) where it was built, on CUDA by kernels of our own (`kernels.py`)
where there is Triton, else by torch. Knows nothing about what the matrices are made of, but for how to look
one up in a table of inner products.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from torch import Tensor

from daemon.analysis.host import to_device_later, to_host_later
from daemon.analysis.threads import side_by_side
from daemon.libraries import best_library

SLIM_FROM = 32  # rows of a matrix from which on float32 is enough to reduce it, for features in float32
EXACT = 2**62  # the same where float64 is asked for
SHIFT = 1e-11  # of the principal eigenvalue, by which inverse iteration stays off it
INVERSE_ITERATIONS = 2
LANES = 8  # matrices that the compiled routine works on at a time, at most
PIECE_ROWS = 4 * LANES  # that one core takes at a time

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Spectra:
    """Of (rows, width, width) symmetric matrices that are not negative, but for rounding."""

    eigenvalues: Tensor  # (rows, width) descending
    principal: Tensor  # (rows, width) unit eigenvectors of the first; arbitrary where that is not above 0


@dataclass(frozen=True, slots=True)
class Clouds:
    """Weighted decoder rows at a few positions; contiguous."""

    indices: Tensor  # (rows, width) int64
    weights: Tensor  # (rows, width) float64, zero beyond the counts
    counts: Tensor  # (rows,) int64

    def rows(self, which: slice | Tensor) -> Clouds:
        return Clouds(self.indices[which], self.weights[which], self.counts[which])


@dataclass(frozen=True, slots=True)
class LookedUp:
    """Spectra of S S^T for clouds in a table of inner products, and what came up on the way."""

    spectra: Spectra
    moment: Tensor  # (rows,) sum w_i ||r_i||^2
    square: Tensor  # (rows,) ||sum w_i r_i||^2

    @classmethod
    def empty(cls, clouds: Clouds) -> LookedUp:
        like, rows = torch.empty_like, clouds.weights[:, 0]
        return cls(Spectra(like(clouds.weights), like(clouds.weights)), like(rows), like(rows))

    def put(self, rows: slice, other: LookedUp) -> None:
        """Take the rows from another."""
        self.spectra.eigenvalues[rows] = other.spectra.eigenvalues
        self.spectra.principal[rows] = other.spectra.principal
        self.moment[rows], self.square[rows] = other.moment, other.square


@dataclass(frozen=True, slots=True)
class Compiled:
    """The functions of spectra.c."""

    spectra: ctypes._FuncPointer
    weighted_sums: ctypes._FuncPointer


@functools.cache
def compiled() -> Compiled | None:
    """spectra.c for this processor; None where it was installed without a compiler."""
    best = best_library("daemon.analysis._spectra")
    if best is None:
        return None
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    spectra, weighted_sums = best.lensd_spectra, best.lensd_weighted_sums
    spectra.argtypes = [pointer, pointer, integer, *[pointer] * 3, *[integer] * 3, *[pointer] * 4]
    spectra.restype = ctypes.c_int
    weighted_sums.argtypes = [pointer, integer, *[pointer] * 3, integer, integer, pointer]
    weighted_sums.restype = None
    return Compiled(spectra, weighted_sums)


@functools.cache
def kernels() -> Any:
    """`daemon.analysis.kernels`; None where there is no Triton, or where it can't make them work."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    try:
        from daemon.analysis import kernels as module

        # each tile and type has kernels of its own, which are made here
        for width, exact in itertools.product(module.TILES, (True, False)):
            gram = torch.zeros(1, width, width, dtype=torch.float64, device="cuda")
            gram[0, :2, :2] = torch.tensor([[3.0, 2], [2, 3]])
            eigenvalues, principal = module.spectra_on_device(gram, torch.tensor([2], device="cuda"), exact)
            found = torch.cat([eigenvalues[0, :3], principal[0, :2].square()]).float().cpu()
            torch.testing.assert_close(found, torch.tensor([5, 1, 0, 0.5, 0.5]))
    except Exception as error:  # of a compiler, a driver or a kernel: the host's cores can do it too
        log.warning("geometry.not_on_device", reason=f"{type(error).__name__}: {error}".partition("\n")[0])
        return None
    return module


def spectra(gram: Tensor, counts: Tensor, slim_from: int = EXACT) -> Spectra:
    """gram: (rows, width, width) float64, of which the first `counts` (rows,) rows and columns matter.

    A matrix of which `slim_from` or more matter may be reduced in float32.
    """
    return spectra_later(gram, counts, slim_from)()


def spectra_later(gram: Tensor, counts: Tensor, slim_from: int) -> Callable[[], Spectra]:
    """`spectra` when it is called; until then CUDA is at it, or matrices are on their way to the host.

    Where our kernels can't take them, the compiled routine is the fastest off a CPU too: small matrices cross
    over and back in less time than CUDA's own routine takes.
    """
    on_cuda = gram.device.type == "cuda"
    if on_cuda and (ours := kernels()) is not None and gram.shape[-1] <= ours.WIDEST:
        found = Spectra(*ours.spectra_on_device(gram, counts, exact=gram.shape[-1] < slim_from))
        return lambda: found
    if on_cuda and compiled() is not None:
        crossing = Crossing(gram, counts)
        return lambda: crossing.spectra(slim_from) or by_torch(gram)
    return lambda: (
        (by_lanes(gram, counts, slim_from) if gram.device.type == "cpu" else None) or by_torch(gram)
    )


def by_torch(gram: Tensor) -> Spectra:
    eigenvalues = torch.linalg.eigvalsh(gram).flip(-1)
    return Spectra(eigenvalues, inverse_iteration(gram, eigenvalues[:, 0]))


def by_lanes(gram: Tensor, counts: Tensor, slim_from: int) -> Spectra | None:
    """By the compiled routine, on a CPU; None where there is none, or it did not converge."""
    routine = compiled()
    if routine is None:
        return None
    rows, width = gram.shape[:2]
    gram, counts = gram.contiguous(), counts.contiguous()
    values, vectors = gram.new_empty(rows, width), gram.new_empty(rows, width)
    matrices = (gram.data_ptr(), None, 0, None, None)
    found = (values.data_ptr(), vectors.data_ptr(), None, None)
    if routine.spectra(*matrices, counts.data_ptr(), rows, width, slim_from, *found) != 0:
        return None
    return Spectra(values.sort(dim=-1, descending=True).values, vectors)


class Crossing:
    """Matrices on their way from CUDA to the host, while the device goes on."""

    def __init__(self, gram: Tensor, counts: Tensor) -> None:
        self._device = gram.device
        self._gram, self._counts = to_host_later(gram), to_host_later(counts)
        self._there: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._there.record()

    def spectra(self, slim_from: int) -> Spectra | None:
        """On every core of the host, and back; None where a matrix did not converge."""
        self._there.synchronize()
        parts = side_by_side(
            lambda piece: by_lanes(self._gram[piece], self._counts[piece], slim_from),
            pieces(len(self._gram)),
        )
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return None
        return Spectra(
            to_device_later(torch.cat([part.eigenvalues for part in found]), self._device),
            to_device_later(torch.cat([part.principal for part in found]), self._device),
        )


def pieces(rows: int, of_each: int = PIECE_ROWS) -> list[slice]:
    """What one core takes at a time; one empty piece if there are no rows."""
    return [slice(start, min(start + of_each, rows)) for start in range(0, max(1, rows), of_each)]


def looks_up(inner: Tensor) -> bool:
    """Whether the compiled routine is there for such a table: `looked_up` then forms no matrices at all."""
    return inner.device.type == "cpu" and compiled() is not None


def looked_up(inner: Tensor, groups: Sequence[Clouds], slim_from: int = EXACT) -> list[LookedUp]:
    """Of each group, the spectra of D^(1/2) (K - 1 (K w)^T - (K w) 1^T + w^T K w) D^(1/2), D = diag(w).

    inner: (d_sae, d_sae) float64, of which K are those of a cloud. Where the compiled routine is not there or
    does not converge, torch forms (rows, width, width).
    """
    routine = compiled() if looks_up(inner) else None
    if routine is None:
        return [looked_up_by_torch(inner, clouds) for clouds in groups]
    results = [LookedUp.empty(clouds) for clouds in groups]
    table = None, inner.data_ptr(), len(inner)

    def work(task: tuple[int, slice]) -> bool:
        number, piece = task
        clouds, found = groups[number], results[number]
        n, width = piece.stop - piece.start, clouds.indices.shape[1]
        values, vectors = found.spectra.eigenvalues, found.spectra.principal
        given = [rows_at(tensor)(piece.start) for tensor in (clouds.indices, clouds.weights, clouds.counts)]
        taken = [rows_at(tensor)(piece.start) for tensor in (values, vectors, found.moment, found.square)]
        return not routine.spectra(*table, *given, n, width, slim_from, *taken)

    tasks = [
        (number, piece)
        for number, clouds in enumerate(groups)
        for piece in pieces(len(clouds.counts), 2 * LANES)
    ]
    tasks.sort(
        key=lambda task: -groups[task[0]].indices.shape[1]
    )  # no core is left with a long one at the end
    converged = side_by_side(work, tasks)
    for found in results:
        found.spectra.eigenvalues.copy_(found.spectra.eigenvalues.sort(dim=-1, descending=True).values)
    for number, piece in (task for task, well in zip(tasks, converged, strict=True) if not well):
        results[number].put(piece, looked_up_by_torch(inner, groups[number].rows(piece)))
    return results


def rows_at(tensor: Tensor) -> Callable[[int], int]:
    """The address of each row of a contiguous tensor."""
    first, step = tensor.data_ptr(), tensor.stride(0) * tensor.element_size()
    return lambda row: first + row * step


def looked_up_by_torch(inner: Tensor, clouds: Clouds) -> LookedUp:
    indices, weights, counts = clouds.indices, clouds.weights, clouds.counts
    gram = inner[indices.unsqueeze(2), indices.unsqueeze(1)]  # K
    moment = (weights * gram.diagonal(dim1=1, dim2=2)).sum(-1)
    to_centroid = (gram @ weights.unsqueeze(2)).squeeze(2)  # K w
    square = (weights * to_centroid).sum(-1)
    gram -= (to_centroid - 0.5 * square.unsqueeze(1)).unsqueeze(2)
    gram -= (to_centroid - 0.5 * square.unsqueeze(1)).unsqueeze(1)
    roots = weights.sqrt()
    gram.mul_(roots.unsqueeze(2)).mul_(roots.unsqueeze(1))
    return LookedUp(spectra(gram, counts), moment, square)


def sums_exactly(table: Tensor) -> bool:
    """Whether `weighted_sums` is there for such a table."""
    return table.device.type == "cpu" and table.dtype == torch.float32 and compiled() is not None


def weighted_sums(table: Tensor, indices: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """sum_i weights_i table[indices_i] in float64: (M, d) float32, (N, width) twice and (N,) -> (N, d).

    Reads the first `counts` of each row. Only where `sums_exactly`.
    """
    routine = compiled()
    assert routine is not None
    table, indices, weights, counts = (
        tensor.contiguous() for tensor in (table, indices, weights.double(), counts)
    )
    (rows, width), d = indices.shape, table.shape[1]
    sums = weights.new_empty(rows, d)
    given, found = [rows_at(tensor) for tensor in (indices, weights, counts)], rows_at(sums)
    start = table.data_ptr()

    def work(piece: slice) -> None:
        n, first = piece.stop - piece.start, piece.start
        routine.weighted_sums(start, d, *(at(first) for at in given), n, width, found(first))

    side_by_side(work, pieces(rows))
    return sums


def inverse_iteration(gram: Tensor, largest: Tensor) -> Tensor:
    """The unit eigenvectors (rows, width) of the `largest` eigenvalues (rows,).

    Each step divides the share of another eigenvector by its distance over SHIFT. Arbitrary where
    `largest` is not above 0.
    """
    above = largest > 0
    width = gram.shape[-1]
    identity = torch.eye(width, dtype=gram.dtype, device=gram.device)
    shift = torch.where(above, largest * (1 + SHIFT), 1)
    shifted = shift[:, None, None] * identity - gram.where(above[:, None, None], 0)
    factor = torch.linalg.cholesky_ex(shifted).L
    # an irregular start, so that no cloud's symmetry makes it orthogonal to the axis
    start = torch.cos(torch.arange(1, width + 1, dtype=gram.dtype, device=gram.device) ** 1.5)
    u = start.expand(len(gram), width).unsqueeze(2)
    for _ in range(INVERSE_ITERATIONS):
        u = torch.cholesky_solve(u, factor)
        u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True)
    return u.squeeze(2)

"""The face of eigen.c: eigenvalues and principal eigenvectors of many small symmetric matrices.

Knows nothing about decoders or activations.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from daemon.native.library import library
from daemon.native.threads import in_ranges

LANES = 4  # matrices that the C source works on at a time
STEP = 4 * LANES  # matrices that one thread takes at least


@functools.cache
def routine() -> ctypes._FuncPointer | None:
    """`lensd_eigen`; None where lensd was installed without a C compiler."""
    found = library()
    if found is None:
        return None
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    function = found.lensd_eigen
    function.argtypes = [pointer, pointer, integer, *[pointer] * 3, integer, integer, *[pointer] * 4]
    function.restype = ctypes.c_int
    return function


def eigen(gram: Tensor, counts: Tensor) -> tuple[Tensor, Tensor] | None:
    """gram: (rows, width, width) float64, zero beyond the first `counts` (rows,) rows and columns.

    Returns the eigenvalues (rows, width), descending, and the unit eigenvectors (rows, width) of the first,
    arbitrary where that is not above 0. None without the routine, or where a matrix does not converge.
    """
    function = routine()
    if function is None:
        return None
    rows, width = gram.shape[:2]
    gram, counts = gram.contiguous(), counts.contiguous()
    values, vectors = gram.new_empty(rows, width), gram.new_empty(rows, width)

    def solve(first: int, last: int) -> int:
        of_matrices, of_counts, *taken = (row(one, first) for one in (gram, counts, values, vectors))
        left: int = function(
            of_matrices, None, 0, None, None, of_counts, last - first, width, *taken, None, None
        )
        return left

    if any(in_ranges(solve, rows, STEP)):
        return None
    return values.sort(dim=-1, descending=True).values, vectors


def table_eigen(
    inner: Tensor, indices: Tensor, weights: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """`eigen` of D^(1/2) (K - 1 (K w)^T - (K w) 1^T + w^T K w) D^(1/2), D = diag(w), for each row of weights.

    inner: (d_sae, d_sae) float64 inner products, of which K are those of the row's first `counts` (rows,)
    indices; indices and float64 weights w: (rows, width). Returns, besides, the sum of w times the diagonal
    of K (rows,), and w^T K w (rows,).
    """
    function = routine()
    if function is None:
        return None
    rows, width = indices.shape
    indices, weights, counts = indices.contiguous(), weights.contiguous(), counts.contiguous()
    values, vectors = torch.empty_like(weights), torch.empty_like(weights)
    moment, square = weights.new_empty(rows), weights.new_empty(rows)

    def solve(first: int, last: int) -> int:
        given = (row(one, first) for one in (indices, weights, counts))
        taken = (row(one, first) for one in (values, vectors, moment, square))
        left: int = function(None, inner.data_ptr(), len(inner), *given, last - first, width, *taken)
        return left

    if any(in_ranges(solve, rows, STEP)):
        return None
    return values.sort(dim=-1, descending=True).values, vectors, moment, square


def row(tensor: Tensor, number: int) -> int:
    """The address of a row of a contiguous tensor."""
    return tensor.data_ptr() + number * tensor.stride(0) * tensor.element_size()

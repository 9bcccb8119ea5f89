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
    return solved(counts, gram.shape[1], gram=gram)


def table_eigen(
    inner: Tensor, indices: Tensor, weights: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """`eigen` of D^(1/2) (K - 1 (K w)^T - (K w) 1^T + w^T K w) D^(1/2), D = diag(w), for each row of weights.

    inner: (d_sae, d_sae) float64 inner products, of which K are those of the row's first `counts` (rows,)
    indices; indices and float64 weights w: (rows, width). Returns, besides, the sum of w times the diagonal
    of K (rows,), and w^T K w (rows,).
    """
    moment, square = weights.new_empty(2, len(weights)).unbind()
    by_row = {"indices": indices, "weights": weights, "moment": moment, "square": square}
    found = solved(counts, indices.shape[1], inner, **by_row)
    return None if found is None else (*found, moment, square)


def solved(
    counts: Tensor, width: int, inner: Tensor | None = None, **by_row: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues and vectors by `lensd_eigen`; `by_row` are its arguments by name that have a row each."""
    function = routine()
    if function is None:
        return None
    values, vectors = torch.empty(2, len(counts), width, dtype=torch.float64).unbind()
    by_row |= {"counts": counts, "values": values, "vectors": vectors}
    by_row = {name: tensor.contiguous() for name, tensor in by_row.items()}
    table = (None, 0) if inner is None else (inner.data_ptr(), len(inner))

    def solve(first: int, last: int) -> int:
        at = {name: row(tensor, first) for name, tensor in by_row.items()}
        given = (at.get("indices"), at.get("weights"), at["counts"], last - first, width)
        taken = (at["values"], at["vectors"], at.get("moment"), at.get("square"))
        left: int = function(at.get("gram"), *table, *given, *taken)
        return left

    if any(in_ranges(solve, len(counts), STEP)):
        return None
    return values.sort(dim=-1, descending=True).values, vectors


def row(tensor: Tensor, number: int) -> int:
    """The address of a row of a contiguous tensor."""
    return tensor.data_ptr() + number * tensor.stride(0) * tensor.element_size()

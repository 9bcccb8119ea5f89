"""Sparse columns: one for each feature, one row for each pair, sample or cluster.

Knows nothing about texts: features are columns of a `scipy.sparse` matrix in CSC form, zeros not stored.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse

from daemon.findings.results import FloatArray, IntArray

# scipy has no types; a name says which form is meant.
Columns: TypeAlias = Any  # (rows, features) in CSC form


def as_columns(matrix: Any) -> Columns:
    """Return float64 CSC columns with sorted rows, duplicates summed and stored zeros dropped."""
    columns = scipy.sparse.csc_matrix(matrix, dtype=np.float64, copy=True)
    columns.sum_duplicates()
    columns.eliminate_zeros()
    return columns


def column_of(values: FloatArray) -> Columns:
    """Return one column (n, 1) of a dense vector (n,)."""
    return as_columns(values.reshape(-1, 1))


def with_values(columns: Columns, values: FloatArray) -> Columns:
    """Return the same pattern with other stored values (nnz,)."""
    changed = scipy.sparse.csc_matrix((values, columns.indices, columns.indptr), shape=columns.shape)
    return changed


def column_numbers(columns: Columns) -> IntArray:
    """Return for each stored value (nnz,) the column it is in."""
    return np.repeat(np.arange(columns.shape[1]), np.diff(columns.indptr))


def stored(columns: Columns) -> IntArray:
    """Return how many values each column stores (k,)."""
    counts: IntArray = np.diff(columns.indptr).astype(np.int64)
    return counts


def sums(columns: Columns) -> FloatArray:
    """Return the sum of each column (k,)."""
    return np.asarray(columns.sum(axis=0), dtype=np.float64).ravel()


def sums_of_powers(columns: Columns, power: int) -> FloatArray:
    """Return the sum of each column's values raised to `power` (k,)."""
    return sums(with_values(columns, columns.data**power))


def signs(columns: Columns) -> Columns:
    """Return 1 where a value is positive, -1 where it is negative."""
    return with_values(columns, np.sign(columns.data))


def fires(columns: Columns) -> Columns:
    """Return 1 where a value is stored: an activation other than zero."""
    return with_values(columns, np.ones(columns.nnz))


def sum_rows(columns: Columns, group: IntArray, n_groups: int) -> Columns:
    """Return (n_groups, k): the rows of each group summed; rows of a negative group are left out."""
    if len(group) == n_groups and np.array_equal(group, np.arange(n_groups)):
        return columns
    kept = np.flatnonzero(group >= 0)
    indicator = scipy.sparse.csr_matrix(
        (np.ones(len(kept)), (group[kept], kept)), shape=(n_groups, columns.shape[0])
    )
    return as_columns(indicator @ columns)


def take_rows(columns: Columns, rows: npt.NDArray[Any]) -> Columns:
    """Return the rows that an index or a mask names."""
    return columns.tocsr()[rows].tocsc()

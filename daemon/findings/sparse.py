"""Sparse columns: one for each feature, one row for each pair, sample or cluster.

Knows nothing about texts: features are columns of a `scipy.sparse` matrix in CSC form, zeros not stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse

from daemon.findings.results import BoolArray, FloatArray, IntArray

# scipy has no types; a name says which form is meant.
Columns: TypeAlias = Any  # (rows, features) in CSC form


def as_columns(matrix: Any) -> Columns:
    """Return float64 CSC columns with sorted rows, duplicates summed and stored zeros dropped."""
    return _canonical(scipy.sparse.csc_matrix(matrix, dtype=np.float64, copy=True))


def _canonical(columns: Columns) -> Columns:
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


def subtract(columns: Columns, others: Columns) -> Columns:
    """Return columns - others, without the zeros that come of it."""
    return _canonical((columns - others).tocsc())


def sum_rows(columns: Columns, group: IntArray, n_groups: int) -> Columns:
    """Return (n_groups, k): the rows of each group summed; rows of a negative group are left out."""
    if len(group) == n_groups and np.array_equal(group, np.arange(n_groups)):
        return columns
    kept = np.flatnonzero(group >= 0)
    indicator = scipy.sparse.csc_matrix(
        (np.ones(len(kept)), (group[kept], kept)), shape=(n_groups, columns.shape[0])
    )
    totals = indicator @ columns
    totals.eliminate_zeros()
    return totals


def ordered_by(columns: Columns, key: FloatArray) -> Columns:
    """Return the same columns, their stored values in the order of `key` (nnz,) and not of rows."""
    order = np.empty(columns.nnz, dtype=np.int64)
    for start, end in zip(columns.indptr[:-1], columns.indptr[1:], strict=True):
        order[start:end] = start + np.argsort(key[start:end], kind="stable")
    return scipy.sparse.csc_matrix(
        (columns.data[order], columns.indices[order], columns.indptr), shape=columns.shape
    )


@dataclass(frozen=True, slots=True)
class Runs:
    """Equal neighbours among the stored values of each column, in the order in which they are stored."""

    run: IntArray  # (nnz,) the run that a value is in
    first: IntArray  # (runs,) place of its first value
    length: IntArray  # (runs,)

    @property
    def mean_place(self) -> FloatArray:
        """(nnz,) mean place of a value's run, counted from 1."""
        middle: FloatArray = (self.first + (self.length + 1) / 2)[self.run]
        return middle


def runs_of(columns: Columns, key: FloatArray) -> Runs:
    """Find the runs of equal `key` (nnz,) in each column."""
    starts = np.ones(columns.nnz, dtype=bool)
    starts[1:] = np.diff(key) != 0
    beginning = columns.indptr[:-1]
    starts[beginning[beginning < columns.nnz]] = True
    first = np.flatnonzero(starts)
    return Runs(np.cumsum(starts) - 1, first, np.diff(np.append(first, columns.nnz)))


def keep_rows(columns: Columns, rows: BoolArray) -> Columns:
    """Return columns of the same shape in which all other rows are zero."""
    return keep_values(columns, rows[columns.indices])


def keep_values(columns: Columns, kept: BoolArray) -> Columns:
    """Return columns of the same shape with only these of the stored values (nnz,)."""
    ends = np.concatenate([[0], np.cumsum(kept)])[columns.indptr]
    return scipy.sparse.csc_matrix((columns.data[kept], columns.indices[kept], ends), shape=columns.shape)


def take_rows(columns: Columns, rows: BoolArray) -> Columns:
    """Return only these rows."""
    kept = keep_rows(columns, rows)
    place = (np.cumsum(rows) - 1)[kept.indices]
    return scipy.sparse.csc_matrix((kept.data, place, kept.indptr), shape=(int(rows.sum()), columns.shape[1]))

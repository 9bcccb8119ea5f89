"""Gathers the sparse activations of one part from its device batches, in the order in which they are stored.

They are the bulk of the output, and are gathered while the device runs other batches: so they are copied row
by row, once, into memory outside the heap. Knows nothing about samples, tables and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from daemon import mmap_arrays
from daemon.records import FeatureRows, IntArray


def in_order(
    found: Sequence[tuple[FeatureRows, IntArray]], value_type: npt.DTypeLike
) -> tuple[FeatureRows, IntArray]:
    """Feature rows of several batches, by sample, text, SAE and position, and how many are clipped in each.

    Each batch comes with a number for each of its samples (n,), which is -1 where its rows are not wanted.
    An activation that `value_type` does not hold, too large or too small to be above 0, is clipped to the
    nearest number that the type holds.
    """
    sample, text, layer, position, token_id, batch, begin, length, _ = sorted_keys(found)
    offsets = np.concatenate(([0], np.cumsum(length)))
    nnz = (int(offsets[-1]),)
    indices, values = mmap_arrays.zeros((nnz, np.uint32), (nnz, found[0][0].values.dtype))
    for b, source, n, target in zip(batch, begin, length, offsets[:-1], strict=True):
        features = found[b][0]
        indices[target : target + n] = features.indices[source : source + n]
        values[target : target + n] = features.values[source : source + n]
    stored, clipped = narrowed(values, np.dtype(value_type))
    before = np.concatenate(([0], np.cumsum(clipped)))
    rows = FeatureRows(sample, text, layer, position, token_id, offsets, indices, stored)
    return rows, before[offsets[1:]] - before[offsets[:-1]] if clipped.any() else np.zeros_like(sample)


class Vectors(NamedTuple):
    """One vector for each of R rows, end to end."""

    offsets: IntArray  # (R + 1,)
    missing: npt.NDArray[np.bool_]  # (R + 1,) whether a row has none; of the last entry no
    values: npt.NDArray[np.float32]


def residuals_in_order(found: Sequence[tuple[FeatureRows, IntArray]]) -> Vectors:
    """What the SAEs read at the rows that `in_order` gives. Raises AssertionError where a batch lacks it."""
    _, _, layer, _, _, batch, _, _, source = sorted_keys(found)
    read = []
    for features, _ in found:
        assert features.residuals is not None, "what SAEs read was not kept"
        read.append(features.residuals)
    before = np.cumsum([0, *(len(one.row) for one in read)])
    row = np.concatenate([one.row for one in read])[before[batch] + source]
    widths = np.array([[values.shape[1] for values in one.values] for one in read])  # (batches, SAEs)
    length = np.where(row < 0, 0, widths[batch, layer])
    offsets = np.concatenate(([0], np.cumsum(length)))
    (values,) = mmap_arrays.zeros(((int(offsets[-1]),), np.float32))
    for b, sae, r, target, n in zip(batch, layer, row, offsets[:-1], length, strict=True):
        if n:
            values[target : target + n] = read[b].values[sae][r]
    return Vectors(offsets, np.append(row < 0, False), values)


def sorted_keys(found: Sequence[tuple[FeatureRows, IntArray]]) -> IntArray:
    """Columns (9, R) of the wanted rows in the order of storage; see `keys_of`."""
    keys = np.concatenate([keys_of(batch, *one) for batch, one in enumerate(found)], axis=1)
    return keys[:, np.lexsort(keys[3::-1])]


def keys_of(batch: int, features: FeatureRows, numbers: IntArray) -> IntArray:
    """Columns (9, R) of the wanted rows: five keys; the batch, where activations begin there, how many; the
    number of the row there.
    """
    sample = numbers[features.sample_row]
    known = (sample, features.text, features.layer, features.position, features.token_id)
    begin, length = features.offsets[:-1], np.diff(features.offsets)
    there = (np.full_like(sample, batch), begin, length, np.arange(len(sample)))
    return np.stack([*known, *there])[:, sample >= 0]


def narrowed(values: npt.NDArray[Any], kind: np.dtype[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Convert activations, which are above 0, to a type that may hold less; mark those it does not hold."""
    if kind.itemsize >= values.dtype.itemsize:
        return values.astype(kind, copy=False), np.zeros(0, np.bool_)
    info = np.finfo(kind)
    least, most = float(info.smallest_subnormal), float(info.max)
    (stored,) = mmap_arrays.zeros((values.shape, kind))
    stored[:] = np.clip(values, least, most)
    return stored, (values < least) | (values > most)

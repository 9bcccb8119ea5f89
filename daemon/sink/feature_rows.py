"""Gathers the sparse activations of one part from its device batches, in the order in which they are stored.

They are the bulk of the output, and are gathered while the device runs other batches: so they are copied row
by row, once, into memory outside the heap. Knows nothing about samples, tables and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    keys = np.concatenate([keys_of(batch, *one) for batch, one in enumerate(found)], axis=1)
    sample, text, layer, position, token_id, batch, begin, length = keys[:, np.lexsort(keys[3::-1])]
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


def keys_of(batch: int, features: FeatureRows, numbers: IntArray) -> IntArray:
    """Columns (8, R) of the wanted rows: five keys, the batch, where activations begin there, how many."""
    sample = numbers[features.sample_row]
    known = (sample, features.text, features.layer, features.position, features.token_id)
    begin, length = features.offsets[:-1], np.diff(features.offsets)
    return np.stack([*known, np.full_like(sample, batch), begin, length])[:, sample >= 0]


def narrowed(values: npt.NDArray[Any], kind: np.dtype[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Convert activations, which are above 0, to a type that may hold less; mark those it does not hold."""
    if kind.itemsize >= values.dtype.itemsize:
        return values.astype(kind, copy=False), np.zeros(0, np.bool_)
    info = np.finfo(kind)
    least, most = float(info.smallest_subnormal), float(info.max)
    (stored,) = mmap_arrays.zeros((values.shape, kind))
    stored[:] = np.clip(values, least, most)
    return stored, (values < least) | (values > most)

"""The sparse activations of several device batches brought into the order in which they are stored.

They outweigh all else that is written, and come together while the device is at other batches: so they are
there once besides the batches', in memory of their own. Knows nothing about samples, tables and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from daemon import mapped
from daemon.output.ragged import spread
from daemon.records import FeatureRows, FloatArray, IntArray

COPIED = 1 << 16  # activations at a time


def in_order(found: Sequence[tuple[FeatureRows, IntArray]], value_type: npt.DTypeLike) -> FeatureRows:
    """Feature rows of several batches, sorted by sample, text, SAE and position.

    With those of each come numbers (n,): by which each sample of the batch is to be known, -1 for one whose
    rows are not wanted. Activations are stored as the nearest number that the type holds: see `clipped`.
    """
    by_batch = [heads(*one) for one in found]
    sample, text, layer, position, token_id, begins, lengths = np.concatenate(by_batch, axis=1)
    order = np.lexsort((position, layer, text, sample))  # the last is primary
    offsets = np.concatenate(([0], np.cumsum(lengths[order])))
    nnz = (int(offsets[-1]),)
    indices, values = mapped.zeros((nnz, np.uint32), (nnz, value_type))
    targets = np.empty_like(begins)
    targets[order] = offsets[:-1]
    ends = np.cumsum([rows.shape[1] for rows in by_batch])
    moves = np.split(np.stack([begins, targets, lengths]), ends[:-1], axis=1)
    for (features, _), of_batch in zip(found, moves, strict=True):
        for begin, target, length in pieces(of_batch):
            source, into = spread(begin, length), spread(target, length)
            indices[into] = features.indices[source]
            values[into] = storable(features.values[source], values.dtype)
    return FeatureRows(
        sample_row=sample[order],
        text=text[order],
        layer=layer[order],
        position=position[order],
        token_id=token_id[order],
        offsets=offsets,
        indices=indices,
        values=values,
    )


def heads(features: FeatureRows, numbers: IntArray) -> IntArray:
    """What wanted rows are but for their activations (7, R): the keys, where those begin, and how many."""
    sample = numbers[features.sample_row]
    known = (sample, features.text, features.layer, features.position, features.token_id)
    wanted = sample >= 0
    return np.stack([row[wanted] for row in (*known, features.offsets[:-1], np.diff(features.offsets))])


def pieces(moves: IntArray) -> list[IntArray]:
    """moves (3, R), the last of which are lengths, cut wherever so many activations have come together."""
    number = np.cumsum(moves[2]) // COPIED
    return np.split(moves, np.flatnonzero(np.diff(number)) + 1, axis=1)


def clipped(found: Sequence[tuple[FeatureRows, IntArray]], value_type: npt.DTypeLike, n: int) -> IntArray:
    """(n,) how many activations of each sample the type does not hold: too large, or too small to be above 0.

    `found` is what `in_order` takes, the numbers below n.
    """
    counts = np.zeros(n, np.int64)
    for features, numbers in found:
        if not narrows(features.values, np.dtype(value_type)):
            continue
        least, most = limits(np.dtype(value_type))
        outside = np.flatnonzero((features.values < least) | (features.values > most))
        row = np.searchsorted(features.offsets, outside, side="right") - 1
        sample = numbers[features.sample_row[row]]
        counts += np.bincount(sample[sample >= 0], minlength=n)
    return counts


def storable(values: npt.NDArray[np.float32] | FloatArray, kind: np.dtype[Any]) -> npt.NDArray[Any]:
    limited = np.clip(values, *limits(kind)) if narrows(values, kind) else values
    return limited.astype(kind, copy=False)


def narrows(values: npt.NDArray[Any], kind: np.dtype[Any]) -> bool:
    """Whether a type holds less than that of the values."""
    return kind.itemsize < values.dtype.itemsize


def limits(kind: np.dtype[Any]) -> tuple[float, float]:
    """The smallest and the largest positive number of a type."""
    info = np.finfo(kind)
    return float(info.smallest_subnormal), float(info.max)

"""Rows of different lengths, end to end. Knows nothing about what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from daemon.records import IntArray


@dataclass(frozen=True, slots=True)
class Ragged:
    """A column of lists: row r has `values[offsets[r]:offsets[r + 1]]`."""

    offsets: IntArray  # (N + 1,) from 0 on
    values: npt.NDArray[Any]

    def __getitem__(self, rows: IntArray) -> Ragged:
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        return Ragged(offsets, self.values[spread(self.offsets[:-1][rows], lengths)])


def spread(starts: IntArray, lengths: IntArray) -> IntArray:
    """The numbers from each start on, so many of each, one after the other."""
    first = np.cumsum(lengths) - lengths
    return np.repeat(starts - first, lengths) + np.arange(lengths.sum())

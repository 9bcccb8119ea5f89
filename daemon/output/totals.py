"""Sums that a file's manifest reports: reconstruction quality per SAE, time per stage, counts.

Knows nothing about files and Parquet.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from daemon.records import FloatArray, IntArray, LayerSums

# A variance below this share of the mean square is rounding error: the rows are all alike.
NEGLIGIBLE_VARIANCE = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class LayerTotals:
    """What FVU and mean L0 at one SAE are made of, summed over samples and texts."""

    rows: int  # activations counted
    l0: float
    squared_error: float  # sum of ||x - decode(f)||^2
    squared_norm: float  # sum of ||x||^2
    total: FloatArray  # (d_out,) sum of x

    @classmethod
    def zero(cls, d_out: int) -> LayerTotals:
        return cls(rows=0, l0=0.0, squared_error=0.0, squared_norm=0.0, total=np.zeros(d_out))

    @classmethod
    def of_groups(cls, sums: LayerSums, rows: IntArray, starts: IntArray) -> list[LayerTotals]:
        """The totals of groups of samples; group g, not empty, is `rows[starts[g]:starts[g + 1]]`."""

        def added(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.add.reduceat(values[rows], starts, axis=0)

        scalars = (added(sums.rows), added(sums.l0), added(sums.squared_error), added(sums.squared_norm))
        return [
            cls(*row) for row in zip(*(column.tolist() for column in scalars), added(sums.total), strict=True)
        ]

    def plus(self, other: LayerTotals) -> LayerTotals:
        return LayerTotals(
            rows=self.rows + other.rows,
            l0=self.l0 + other.l0,
            squared_error=self.squared_error + other.squared_error,
            squared_norm=self.squared_norm + other.squared_norm,
            total=self.total + other.total,
        )

    def fvu(self) -> float | None:
        """Fraction of variance unexplained: sum ||x - x^||^2 / (sum ||x||^2 - ||sum x||^2 / rows).

        None where the rows have no variance to explain, or a sum is not finite.
        """
        if not self.rows:
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            variance = self.squared_norm - float(self.total @ self.total) / self.rows
        if not variance > NEGLIGIBLE_VARIANCE * self.squared_norm:
            return None
        ratio = self.squared_error / variance
        return ratio if np.isfinite(ratio) else None

    def mean_l0(self) -> float | None:
        """Mean number of active features per activation; None without any."""
        return self.l0 / self.rows if self.rows else None


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Seconds of work, or of waiting in `queue`, per stage. Stages overlap: the sum is no wall time."""

    read: float = 0.0
    tokenize: float = 0.0
    queue: float = 0.0
    pack: float = 0.0
    forward: float = 0.0
    sae: float = 0.0
    analysis: float = 0.0
    write: float = 0.0
    commit: float = 0.0

    def __add__(self, other: StageSeconds) -> StageSeconds:
        names = [field.name for field in fields(self)]
        return StageSeconds(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True, slots=True)
class FileTotals:
    """One file of an output folder."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class UnitTotals:
    """All that was written for one input file."""

    records: int
    rows: int  # of metrics.parquet: samples
    rejects: int
    layers: tuple[LayerTotals, ...]  # one per SAE
    fvu: tuple[float | None, ...]  # of each
    seconds: StageSeconds
    clipped: int  # activations that the stored type does not hold
    files: tuple[FileTotals, ...]

    @property
    def bytes(self) -> int:
        """Size of the files listed, the manifest not counted."""
        return sum(file.bytes for file in self.files)

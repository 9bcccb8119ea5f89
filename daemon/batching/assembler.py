"""Brings the rows of device batches back to the parts they came from.

Batches mix samples of several parts and files; a part is finished when every sample of it came back.
Knows nothing about the device, Parquet or files.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from daemon.records import (
    Batch,
    BatchResult,
    Entry,
    FinishedPart,
    LayerTotals,
    Reject,
    ResultRows,
    StageSeconds,
    TokenizedPart,
)

Key = tuple[str, int]  # unit, part number


@dataclass(slots=True)
class OpenPart:
    """A part some of whose samples are still out."""

    part: TokenizedPart
    missing: int
    layers: tuple[LayerTotals, ...]
    seconds: StageSeconds
    opened_at: float
    pieces: list[ResultRows] = field(default_factory=list)
    set_aside: dict[int, Reject] = field(default_factory=dict)  # by row of the part

    def finish(self) -> FinishedPart:
        part, pieces = self.part, tuple(self.pieces)
        if self.set_aside:
            part, pieces = without_rows(part, pieces, set(self.set_aside))
        return FinishedPart(
            part=part,
            pieces=pieces,
            rejects=(*part.part.rejects, *self.set_aside.values()),
            layers=self.layers,
            seconds=self.seconds,
        )


class Assembler:
    """The parts under way on the device; owned by the compute stage.

    `d_outs` gives the width of what each SAE reconstructs.
    """

    def __init__(self, d_outs: tuple[int, ...], clock: Callable[[], float] = time.perf_counter) -> None:
        self._nothing = tuple(LayerTotals.zero(d_out) for d_out in d_outs)
        self._clock = clock
        self._open: dict[Key, OpenPart] = {}

    def open(self, part: TokenizedPart) -> FinishedPart | None:
        """Expect results for a part. One without samples is finished at once, and returned."""
        opened = OpenPart(
            part=part,
            missing=len(part.samples),
            layers=self._nothing,
            seconds=StageSeconds(read=part.part.read_seconds, tokenize=part.part.tokenize_seconds),
            opened_at=self._clock(),
        )
        if not opened.missing:
            return opened.finish()
        self._open[key_of(part)] = opened
        return None

    def scatter(self, batch: Batch, result: BatchResult, plan_seconds: float = 0.0) -> list[FinishedPart]:
        """Distribute rows to their parts, those without numbers as rejects; the parts that this finishes."""
        finished = [
            part
            for row, message in result.not_finite
            for part in self.set_aside(batch.entries[row], "not_finite_activation", message)
        ]
        none = {row for row, _ in result.not_finite}
        rows: dict[Key, list[int]] = defaultdict(list)
        for row, entry in enumerate(batch.entries):
            if row not in none:
                rows[key_of(entry.part)].append(row)
        if not rows:
            return finished
        order = np.concatenate([np.array(result_rows) for result_rows in rows.values()])
        starts = np.cumsum([0, *map(len, rows.values())])[:-1]
        totals = zip(*(LayerTotals.of_groups(sums, order, starts) for sums in result.layers), strict=True)
        rest = dataclasses.replace(result, layers=())  # summed already, and the largest arrays
        features = result.features
        weight = features.indices.nbytes + features.values.nbytes
        weight += 0 if features.residuals is None else features.residuals.nbytes
        row_bytes = weight // len(batch.entries) + 8 * len(result.columns)
        for (key, result_rows), layers in zip(rows.items(), totals, strict=True):
            opened = self._open[key]
            opened.layers = tuple(map(LayerTotals.plus, opened.layers, layers)) if opened.pieces else layers
            self._add(opened, batch, rest, result_rows, row_bytes, plan_seconds)
            if not opened.missing:
                finished.append(self._open.pop(key).finish())
        return finished

    def set_aside(self, entry: Entry, reason: str, message: str) -> list[FinishedPart]:
        """Turn one sample of a part into a reject; the part, if that finishes it."""
        opened = self._open[key_of(entry.part)]
        opened.set_aside[entry.row] = entry.sample.sample.reject(reason, message)
        opened.missing -= 1
        return [] if opened.missing else [self._open.pop(key_of(entry.part)).finish()]

    def _add(
        self,
        opened: OpenPart,
        batch: Batch,
        result: BatchResult,
        rows: list[int],
        row_bytes: int,
        plan_seconds: float,
    ) -> None:
        first = not opened.pieces
        part_rows = np.array([batch.entries[row].row for row in rows])
        opened.pieces.append(ResultRows(result, np.array(rows), part_rows, row_bytes))
        opened.missing -= len(rows)
        share = len(rows) / len(batch.entries)  # of a batch that several parts may share
        worked = result.forward_seconds + result.sae_seconds + result.analysis_seconds
        opened.seconds += StageSeconds(
            queue=max(0.0, self._clock() - opened.opened_at - worked) if first else 0.0,
            pack=plan_seconds * share,
            forward=result.forward_seconds * share,
            sae=result.sae_seconds * share,
            analysis=result.analysis_seconds * share,
        )


def without_rows(
    part: TokenizedPart, pieces: tuple[ResultRows, ...], rows: set[int]
) -> tuple[TokenizedPart, tuple[ResultRows, ...]]:
    """The part without `rows`, and its pieces renumbered."""
    kept = [row for row in range(len(part.samples)) if row not in rows]
    new_row = np.full(len(part.samples), -1)
    new_row[kept] = np.arange(len(kept))
    samples = tuple(part.samples[row] for row in kept)
    inner = dataclasses.replace(part.part, samples=tuple(entry.sample for entry in samples))
    moved = tuple(dataclasses.replace(piece, part_rows=new_row[piece.part_rows]) for piece in pieces)
    return TokenizedPart(inner, samples), moved


def key_of(part: TokenizedPart) -> Key:
    return part.part.file.unit, part.part.number

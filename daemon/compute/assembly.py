"""Brings the rows of device batches back to the parts they came from.

Batches mix samples of several parts and files; a part is finished when every sample of it came back.
Knows nothing about the device, Parquet or files.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from daemon.compute.packing import Batch
from daemon.output.finished import BlockRows, FinishedPart
from daemon.output.totals import LayerTotals, StageSeconds
from daemon.records import Block, TokenizedPart

Key = tuple[str, int]  # unit, part number


@dataclass(slots=True)
class OpenPart:
    """A part some of whose samples are still out."""

    part: TokenizedPart
    missing: int
    layers: tuple[LayerTotals, ...]
    seconds: StageSeconds
    opened_at: float
    pieces: list[BlockRows] = field(default_factory=list)

    def finish(self) -> FinishedPart:
        return FinishedPart(
            part=self.part,
            pieces=tuple(self.pieces),
            rejects=self.part.part.rejects,
            layers=self.layers,
            seconds=self.seconds,
        )


class Assembly:
    """The parts under way on the device; owned by the compute stage.

    `d_ins` gives the input width of each SAE.
    """

    def __init__(self, d_ins: tuple[int, ...], clock: Callable[[], float] = time.perf_counter) -> None:
        self._d_ins = d_ins
        self._clock = clock
        self._open: dict[Key, OpenPart] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, part: TokenizedPart) -> FinishedPart | None:
        """Expect results for a part. One without samples is finished at once, and returned."""
        opened = OpenPart(
            part=part,
            missing=len(part.samples),
            layers=tuple(LayerTotals.zero(d_in) for d_in in self._d_ins),
            seconds=StageSeconds(read=part.part.read_seconds, tokenize=part.part.tokenize_seconds),
            opened_at=self._clock(),
        )
        if not opened.missing:
            return opened.finish()
        self._open[key_of(part)] = opened
        return None

    def scatter(self, batch: Batch, block: Block, pack_seconds: float = 0.0) -> list[FinishedPart]:
        """Hand a block's rows to their parts; the parts that this finishes."""
        rows: dict[Key, list[int]] = defaultdict(list)
        for row, entry in enumerate(batch.entries):
            rows[key_of(entry.part)].append(row)
        finished = []
        for key, block_rows in rows.items():
            opened = self._open[key]
            self._add(opened, batch, block, np.array(block_rows), pack_seconds)
            if not opened.missing:
                finished.append(self._open.pop(key).finish())
        return finished

    def _add(
        self, opened: OpenPart, batch: Batch, block: Block, rows: np.ndarray, pack_seconds: float
    ) -> None:
        first = not opened.pieces
        part_rows = np.array([batch.entries[row].row for row in rows])
        opened.pieces.append(BlockRows(block=block, block_rows=rows, part_rows=part_rows))
        opened.missing -= len(rows)
        opened.layers = tuple(
            totals.plus(LayerTotals.from_sums(sums, rows))
            for totals, sums in zip(opened.layers, block.layers, strict=True)
        )
        share = len(rows) / len(batch.entries)  # of a batch that several parts may share
        worked = block.forward_seconds + block.sae_seconds + block.analysis_seconds
        opened.seconds += StageSeconds(
            queue=max(0.0, self._clock() - opened.opened_at - worked) if first else 0.0,
            pack=pack_seconds * share,
            forward=block.forward_seconds * share,
            sae=block.sae_seconds * share,
            analysis=block.analysis_seconds * share,
        )


def key_of(part: TokenizedPart) -> Key:
    return part.part.source.unit, part.part.number

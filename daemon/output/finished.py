"""What the compute stage hands to the writer: one part of a file, all of its results there.

Knows nothing about Parquet and files.
"""

from __future__ import annotations

from dataclasses import dataclass

from daemon.output.totals import LayerTotals, StageSeconds
from daemon.records import Block, IntArray, Reject, TokenizedPart


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Rows `block_rows` of a device batch are the results of the samples at `part_rows` of a part."""

    block: Block
    block_rows: IntArray  # (m,)
    part_rows: IntArray  # (m,)
    row_bytes: int  # about what one of them weighs in memory


@dataclass(frozen=True, slots=True)
class FinishedPart:
    """A part and the pieces of device batches that together cover each of its samples once."""

    part: TokenizedPart
    pieces: tuple[BlockRows, ...]
    rejects: tuple[Reject, ...]  # all of the part, in any order
    layers: tuple[LayerTotals, ...]  # one per SAE
    seconds: StageSeconds

    @property
    def nbytes(self) -> int:
        """About what its results weigh in memory: its share of the blocks."""
        return 1 + sum(piece.row_bytes * len(piece.block_rows) for piece in self.pieces)

    def check_covered(self) -> None:
        """Raises AssertionError unless every sample of the part is covered exactly once."""
        n = len(self.part.samples)
        covered = sorted(row for piece in self.pieces for row in piece.part_rows.tolist())
        pairs_up = all(len(piece.block_rows) == len(piece.part_rows) for piece in self.pieces)
        if not pairs_up or covered != list(range(n)):
            part = self.part.part
            raise AssertionError(
                f"unit {part.source.unit} part {part.number}: {len(covered)} result rows"
                f" do not cover its {n} samples exactly once"
            )

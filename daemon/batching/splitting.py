"""Cuts a batch into pieces that the cores of a CPU take side by side, and joins what comes of them.

A core that takes a piece from its tokens to its columns waits for no other, where cores that share each
operation wait for the slowest of them a thousand times a batch. Knows no engine.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from daemon.batching.batcher import TrieCost
from daemon.records import Batch, BatchResult, FeatureRows, IntArray, LayerSums, RowMessage

PIECE_TOKENS = 256  # at least, of a piece: with fewer, products take longer for each
PIECE_WORK = 16  # what a piece costs besides, in the time that a token takes
PIECES_EACH = 4  # for each core, at most
SHARED = 0.05  # of a batch's tokens, at most, that its pieces may compute once more


def split_batch(batch: Batch, cores: int) -> tuple[list[Batch], int]:
    """Pieces of a batch, and how many are to be under way at a time: that number divides the cores.

    It is the cores' where there is enough for each, and then there may be more pieces, a core taking the next
    one when it is done: as many as make all of them done first. One, where pieces would share too much.
    """
    costs = Costs.of(batch)
    total = int(costs.added.sum())
    for n in core_groups(total, cores):
        most = min(PIECES_EACH * n, total // PIECE_TOKENS) if n == cores else n
        bounds = min(
            (costs.bounds(more) for more in range(n, max(n, most) + 1)),
            key=lambda bounds: done_after(costs.work(bounds), n),
        )
        again = int(costs.tokens(bounds).sum()) - total
        if len(bounds) > n and again <= SHARED * total:
            pieces = [Batch(batch.recipe, batch.entries[a:b]) for a, b in itertools.pairwise(bounds)]
            return pieces, n
    return [batch], 1


def core_groups(tokens: int, cores: int) -> list[int]:
    """For how many cores, or groups of like size of them, so many tokens are enough; the most first."""
    return [n for n in range(cores, 0, -1) if cores % n == 0 and (n == 1 or n * PIECE_TOKENS <= tokens)]


def done_after(work: Sequence[int], cores: int) -> int:
    """When the last of the cores is done that take pieces in this order."""
    busy = [0] * cores
    for of_piece in work:
        heapq.heapreplace(busy, busy[0] + of_piece)
    return max(busy)


@dataclass(frozen=True, slots=True)
class Costs:
    """What the samples of a batch cost, in tokens; `bounds` are where pieces begin and the last one ends."""

    added: IntArray  # (n,) that each adds to those before it
    alone: IntArray  # (n,) of each that begins a piece
    texts: int  # of a sample: what is done for one after it was read takes about as long as reading a token

    @classmethod
    def of(cls, batch: Batch) -> Costs:
        cost = TrieCost()
        totals, shared = [0], []
        for sample in batch.samples:
            cost.add(sample)
            totals.append(cost.total)
            shared.append(cost.shared)
        added = np.diff(totals)
        return cls(added, added + np.array(shared), len(batch.recipe.templates))

    def bounds(self, n: int) -> IntArray:
        """Of at most n pieces of about as much work each."""
        work = np.cumsum(self.added + self.texts)
        middle = work - (self.added + self.texts) / 2  # a sample belongs where its middle lies
        inner = np.searchsorted(middle, work[-1] * np.arange(1, n) / n)
        return np.unique([0, *inner.tolist(), len(work)])

    def tokens(self, bounds: IntArray) -> IntArray:
        """That each piece has the model read."""
        first = bounds[:-1]
        pieces: IntArray = np.add.reduceat(self.added, first) + self.alone[first] - self.added[first]
        return pieces

    def work(self, bounds: IntArray) -> list[int]:
        """What each piece takes, in the time that a token takes."""
        of_each: list[int] = (self.tokens(bounds) + np.diff(bounds) * self.texts + PIECE_WORK).tolist()
        return of_each


def concat_results(blocks: Sequence[BatchResult], at_a_time: int = 1) -> BatchResult:
    """One block of several, of which so many were under way at a time, each for its seconds."""
    if len(blocks) == 1:
        return blocks[0]

    def seconds(of_each: Sequence[float]) -> float:
        return sum(of_each) / at_a_time

    return BatchResult(
        columns={
            name: np.concatenate([block.columns[name] for block in blocks]) for name in blocks[0].columns
        },
        features=joined_rows([block.features for block in blocks], [block.n_samples for block in blocks]),
        layers=tuple(map(joined_sums, zip(*(block.layers for block in blocks), strict=True))),
        forward_seconds=seconds([block.forward_seconds for block in blocks]),
        sae_seconds=seconds([block.sae_seconds for block in blocks]),
        analysis_seconds=seconds([block.analysis_seconds for block in blocks]),
        computed_tokens=sum(block.computed_tokens for block in blocks),
        padding_tokens=sum(block.padding_tokens for block in blocks),
        not_finite=joined_messages(blocks),
    )


def joined_messages(blocks: Sequence[BatchResult]) -> tuple[RowMessage, ...]:
    before = np.cumsum([0, *(block.n_samples for block in blocks[:-1])]).tolist()
    return tuple(
        RowMessage(first + row, message)
        for first, block in zip(before, blocks, strict=True)
        for row, message in block.not_finite
    )


def joined_rows(pieces: Sequence[FeatureRows], samples: Sequence[int]) -> FeatureRows:
    """Rows one after the other; `samples` counts those of each piece."""
    together = {
        field.name: np.concatenate([getattr(piece, field.name) for piece in pieces])
        for field in dataclasses.fields(FeatureRows)
        if field.name not in ("sample_row", "offsets")
    }
    before = np.cumsum([0, *samples[:-1]])
    lengths = np.concatenate([np.diff(piece.offsets) for piece in pieces])
    return FeatureRows(
        sample_row=np.concatenate(
            [piece.sample_row + first for piece, first in zip(pieces, before, strict=True)]
        ),
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        **together,
    )


def joined_sums(pieces: Sequence[LayerSums]) -> LayerSums:
    return LayerSums(
        **{
            field.name: np.concatenate([getattr(piece, field.name) for piece in pieces])
            for field in dataclasses.fields(LayerSums)
        }
    )

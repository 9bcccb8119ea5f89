"""Cuts a batch into pieces that the cores of a CPU take side by side, and joins what comes of them.

A core that takes a piece from its tokens to its columns waits for no other, where cores that share each
operation wait for the slowest of them a thousand times a batch. Knows no engine.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Sequence

import numpy as np

from daemon.compute.packing import Batch, TrieCost
from daemon.records import Block, FeatureRows, IntArray, LayerSums

PIECE_TOKENS = 256  # at least, of a piece: with fewer, products take longer for each
PIECE_WORK = 16  # what a piece costs besides, in the time that a token takes
PIECES_EACH = 4  # for each core, at most
SHARED = 0.05  # of a batch's tokens, at most, that its pieces may compute once more


def cut(batch: Batch, cores: int) -> tuple[list[Batch], int]:
    """Pieces of a batch, and how many are to be under way at a time: that number divides the cores.

    It is the cores' where there is enough for each, and then there may be more pieces, a core taking the next
    one when it is done: as many as make all of them done first. One, where pieces would share too much.
    """
    tokens = added_tokens(batch)
    total = int(tokens.sum())
    # What is done for a text after it was read takes about as long as reading one token.
    work = np.cumsum(tokens + len(batch.recipe.templates))
    for n in numbers(total, cores):
        most = min(PIECES_EACH * n, total // PIECE_TOKENS) if n == cores else n
        pieces = min(
            (cut_at(batch, work, more) for more in range(n, max(n, most) + 1)),
            key=lambda pieces: done_after([work_of(piece) for piece in pieces], n),
        )
        again = sum(int(added_tokens(piece).sum()) for piece in pieces) - total
        if len(pieces) >= n and again <= SHARED * total:
            return pieces, n
    return [batch], 1


def numbers(tokens: int, cores: int) -> list[int]:
    """For how many cores, or groups of like size of them, so many tokens are enough; the most first."""
    return [n for n in range(cores, 0, -1) if cores % n == 0 and (n == 1 or n * PIECE_TOKENS <= tokens)]


def work_of(piece: Batch) -> int:
    """In the time that a token takes."""
    texts = len(piece.entries) * len(piece.recipe.templates)
    return int(added_tokens(piece).sum()) + texts + PIECE_WORK


def done_after(work: Sequence[int], cores: int) -> int:
    """When the last of the cores is done that take pieces in this order."""
    busy = [0] * cores
    for of_piece in work:
        heapq.heapreplace(busy, busy[0] + of_piece)
    return max(busy)


def added_tokens(batch: Batch) -> IntArray:
    """(n,) how many tokens each sample adds to those before it."""
    cost = TrieCost()
    totals = [0]
    for sample in batch.samples:
        cost.add(sample)
        totals.append(cost.total)
    return np.diff(totals)


def cut_at(batch: Batch, work: IntArray, n: int) -> list[Batch]:
    """At most n pieces of about as much of the samples' cumulative `work` each."""
    before = work - np.diff(work, prepend=0) / 2  # a sample belongs where its middle lies
    inner = np.searchsorted(before, work[-1] * np.arange(1, n) / n)
    bounds = [0, *inner.tolist(), len(batch.entries)]
    pieces = [batch.entries[start:stop] for start, stop in itertools.pairwise(bounds)]
    return [Batch(batch.recipe, entries) for entries in pieces if entries]


def joined(blocks: Sequence[Block], at_a_time: int = 1) -> Block:
    """One block of several, of which so many were under way at a time, each for its seconds."""
    if len(blocks) == 1:
        return blocks[0]

    def seconds(of_each: Sequence[float]) -> float:
        return sum(of_each) / at_a_time

    return Block(
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

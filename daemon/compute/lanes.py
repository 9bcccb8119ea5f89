"""Cuts a batch into pieces that the cores of a CPU take side by side, and joins what comes of them.

A core that takes a piece from its tokens to its columns waits for no other, where cores that share each
operation wait for the slowest of them a thousand times a batch. Knows no engine.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from daemon.compute.packing import Batch, TrieCost
from daemon.records import Block, FeatureRows, IntArray, LayerSums

PIECE_TOKENS = 256  # at least, of a piece: with fewer, products take longer for each
SHARED = 0.05  # of a batch's tokens, at most, that its pieces may compute once more


def cut(batch: Batch, cores: int) -> list[Batch]:
    """Pieces of a batch that take about as long each; their number divides the cores.

    One, where there is too little, or where texts of different pieces would share too much.
    """
    tokens = added_tokens(batch)
    total = int(tokens.sum())
    # What is done for a text after it was read takes about as long as reading one token.
    work = np.cumsum(tokens + len(batch.recipe.templates))
    for n in numbers(total, cores):
        pieces = cut_at(batch, work, n)
        again = sum(int(added_tokens(piece).sum()) for piece in pieces) - total
        if again <= SHARED * total:
            return pieces
    return [batch]


def numbers(tokens: int, cores: int) -> list[int]:
    """Into how many pieces so many tokens may be cut for so many cores, the most first."""
    return [n for n in range(cores, 0, -1) if cores % n == 0 and (n == 1 or n * PIECE_TOKENS <= tokens)]


def added_tokens(batch: Batch) -> IntArray:
    """(n,) how many tokens each sample adds to those before it."""
    cost = TrieCost()
    totals = [0]
    for sample in batch.samples:
        cost.add(sample)
        totals.append(cost.total)
    return np.diff(totals)


def cut_at(batch: Batch, work: IntArray, n: int) -> list[Batch]:
    """n pieces of about as much of the samples' cumulative `work` each; fewer where some are empty."""
    inner = np.searchsorted(work, work[-1] * np.arange(1, n) / n) + 1
    bounds = [0, *inner.tolist(), len(batch.entries)]
    pieces = [batch.entries[start:stop] for start, stop in itertools.pairwise(bounds)]
    return [Batch(batch.recipe, entries) for entries in pieces if entries]


def joined(blocks: Sequence[Block]) -> Block:
    """One block of several, side by side: what took their seconds took that share of each core."""
    if len(blocks) == 1:
        return blocks[0]

    def seconds(of_each: Sequence[float]) -> float:
        return sum(of_each) / len(blocks)

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

"""Splits a batch into pieces that the cores of a CPU take side by side, and concatenates their results.

A core that takes a piece from its tokens to its columns waits for no other, where cores that share each
operation wait for the slowest of them a thousand times a batch. Knows no engine.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from daemon.batching.batcher import TrieCost
from daemon.records import BatchResult, FeatureRows, IntArray, LayerSums, Residuals, RowMessage, SampleBatch

PIECE_TOKENS = 256  # minimum of a piece: smaller products are less efficient
SHARED = 0.05  # largest share of a batch's tokens that splitting may compute again


def split_batch(batch: SampleBatch, cores: int) -> list[SampleBatch]:
    """One piece for each core, of about as much work each.

    The batch stays whole where there are too few tokens for that, or where pieces would share too many.
    """
    costs = Costs.of(batch)
    total = int(costs.added.sum())
    bounds = costs.bounds(piece_count(total, cores))
    again = int(costs.tokens(bounds).sum()) - total
    if len(bounds) != cores + 1 or again > SHARED * total:
        return [batch]
    return [SampleBatch(batch.recipe, batch.samples[a:b]) for a, b in itertools.pairwise(bounds)]


def piece_count(tokens: int, cores: int) -> int:
    """Into how many pieces so many tokens are split: one for each core, or one."""
    return cores if tokens >= cores * PIECE_TOKENS else 1


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs of a batch's samples, in tokens; `bounds` are where pieces begin and the last one ends."""

    added: IntArray  # (n,) that each adds to those before it
    alone: IntArray  # (n,) of each that begins a piece
    texts: int  # of a sample: encoding and analysing one takes about as long as reading a token

    @classmethod
    def of(cls, batch: SampleBatch) -> Costs:
        cost = TrieCost()
        totals, shared = [0], []
        for sample in batch.samples:
            cost.add(sample)
            totals.append(cost.total)
            shared.append(cost.shared)
        added = np.diff(totals)
        return cls(added, added + np.array(shared), len(batch.recipe.templates))

    def bounds(self, n: int) -> IntArray:
        """The bounds of at most n pieces of about as much work each."""
        work = np.cumsum(self.added + self.texts)
        middle = work - (self.added + self.texts) / 2  # a sample belongs where its middle lies
        inner = np.searchsorted(middle, work[-1] * np.arange(1, n) / n)
        return np.unique([0, *inner.tolist(), len(work)])

    def tokens(self, bounds: IntArray) -> IntArray:
        """The tokens that each piece has the model read."""
        first = bounds[:-1]
        pieces: IntArray = np.add.reduceat(self.added, first) + self.alone[first] - self.added[first]
        return pieces


def concat_results(results: Sequence[BatchResult]) -> BatchResult:
    """One result of several that were computed side by side."""
    if len(results) == 1:
        return results[0]

    def seconds(of_each: Sequence[float]) -> float:
        return sum(of_each) / len(results)

    return BatchResult(
        columns={
            name: np.concatenate([result.columns[name] for result in results]) for name in results[0].columns
        },
        features=concat_rows(
            [result.features for result in results], [result.n_samples for result in results]
        ),
        layers=tuple(map(concat_sums, zip(*(result.layers for result in results), strict=True))),
        forward_seconds=seconds([result.forward_seconds for result in results]),
        sae_seconds=seconds([result.sae_seconds for result in results]),
        analysis_seconds=seconds([result.analysis_seconds for result in results]),
        computed_tokens=sum(result.computed_tokens for result in results),
        padding_tokens=sum(result.padding_tokens for result in results),
        not_finite=concat_messages(results),
    )


def concat_messages(results: Sequence[BatchResult]) -> tuple[RowMessage, ...]:
    before = np.cumsum([0, *(result.n_samples for result in results[:-1])]).tolist()
    return tuple(
        RowMessage(first + row, message)
        for first, result in zip(before, results, strict=True)
        for row, message in result.not_finite
    )


def concat_rows(pieces: Sequence[FeatureRows], samples: Sequence[int]) -> FeatureRows:
    """Rows one after the other; `samples` counts those of each piece."""
    together = {
        field.name: np.concatenate([getattr(piece, field.name) for piece in pieces])
        for field in dataclasses.fields(FeatureRows)
        if field.name not in ("sample_row", "offsets", "residuals")
    }
    before = np.cumsum([0, *samples[:-1]])
    lengths = np.concatenate([np.diff(piece.offsets) for piece in pieces])
    return FeatureRows(
        sample_row=np.concatenate(
            [piece.sample_row + first for piece, first in zip(pieces, before, strict=True)]
        ),
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        residuals=concat_residuals(pieces),
        **together,
    )


def concat_residuals(pieces: Sequence[FeatureRows]) -> Residuals | None:
    """The vectors of each SAE one piece after the other; None where there are none."""
    of_each = [piece.residuals for piece in pieces if piece.residuals is not None]
    if len(of_each) < len(pieces):
        return None
    lengths = np.array([[len(values) for values in one.values] for one in of_each])  # (pieces, SAEs)
    before = np.cumsum(lengths, axis=0) - lengths
    rows = [
        np.where(one.row < 0, one.row, one.row + first[piece.layer])
        for one, first, piece in zip(of_each, before, pieces, strict=True)
    ]
    values = zip(*(one.values for one in of_each), strict=True)
    return Residuals(np.concatenate(rows), tuple(np.concatenate(of_sae) for of_sae in values))


def concat_sums(pieces: Sequence[LayerSums]) -> LayerSums:
    return LayerSums(
        **{
            field.name: np.concatenate([getattr(piece, field.name) for piece in pieces])
            for field in dataclasses.fields(LayerSums)
        }
    )

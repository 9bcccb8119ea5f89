"""Which tokens of a text are read by the SAEs, and how several readings become one.

`last`: the last token. `all`: every token is stored, the last one analysed. `mean` and `max`: the features of
every token, pooled into one reading. The BOS token that lensd puts before a text is none of its tokens:
with `all`, `mean` and `max` it is left out. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from daemon.analysis.features import StoredFeatures
from daemon.analysis.sparse import SparseActs, from_dense
from daemon.analysis.study import LayerActivations
from daemon.compute.encoding import Encoder
from daemon.compute.sae import LoadedSae
from daemon.records import IntArray, Positions

NOWHERE = -1  # position and token of features that belong to no one position
POOLED_ROWS = 4096  # rows gathered at a time


@dataclass(frozen=True, slots=True)
class Readings:
    """Which of the computed tokens are encoded, and which of these each text reads."""

    keep: IntArray  # (K,) computed tokens that are encoded
    rows: IntArray  # (R,) what the texts read in turn, as rows of `keep`
    offsets: IntArray  # (N + 1,) where each text's readings begin
    positions: IntArray  # (R,) of each reading in its text
    token_ids: IntArray  # (R,) the token read

    @property
    def last(self) -> IntArray:
        """(N,) the last reading of each text, as a row of `keep`."""
        return self.rows[self.offsets[1:] - 1]


def choose_readings(
    path: IntArray, offsets: IntArray, token_ids: IntArray, positions: Positions, skip: int
) -> Readings:
    """`path` holds where each text's tokens were computed, text by text; `offsets` (N + 1,) where they begin.

    `token_ids` are the tokens there; the first `skip` of each text are no tokens of its own.
    """
    lengths = np.diff(offsets)
    if positions == "last":
        last, n = offsets[1:] - 1, len(lengths)
        return Readings(path[last], np.arange(n), np.arange(n + 1), lengths - 1, token_ids[last])
    position = np.arange(len(path)) - np.repeat(offsets[:-1], lengths)
    own = position >= skip
    keep, rows = np.unique(path[own], return_inverse=True)
    own_offsets = np.concatenate(([0], np.cumsum(lengths - skip)))
    return Readings(keep, rows, own_offsets, position[own], token_ids[own])


def encode_readings(
    saes: Sequence[LoadedSae],
    encoders: Sequence[Encoder],
    residuals: Sequence[Tensor],
    readings: Readings,
    positions: Positions,
) -> tuple[tuple[LayerActivations, ...], StoredFeatures]:
    """residuals: per SAE (K, d_in), at the tokens `readings.keep`."""
    kept = [entry.residual(raw) for entry, raw in zip(saes, residuals, strict=True)]
    acts = tuple(encoder.encode(x) for encoder, x in zip(encoders, kept, strict=True))
    stored = StoredFeatures(acts, readings.rows, readings.offsets, readings.positions, readings.token_ids)
    if positions in ("mean", "max"):
        pooled = tuple(
            pool(entry, encoder, x, sparse, readings, positions)
            for entry, encoder, x, sparse in zip(saes, encoders, kept, acts, strict=True)
        )
        n = len(readings.offsets) - 1
        stored = StoredFeatures(
            tuple(layer.acts for layer in pooled),
            np.arange(n),
            np.arange(n + 1),
            np.full(n, NOWHERE),
            np.full(n, NOWHERE),
        )
        return pooled, stored
    if positions == "all":
        last = torch.from_numpy(readings.last).to(kept[0].device)
        kept = [x[last] for x in kept]
        acts = tuple(sparse.select(last) for sparse in acts)
    layers = tuple(
        layer_of(entry, encoder, x, encoder.decode(sparse), sparse)
        for entry, encoder, x, sparse in zip(saes, encoders, kept, acts, strict=True)
    )
    return layers, stored


def layer_of(
    entry: LoadedSae, encoder: Encoder, x: Tensor | None, reconstruction: Tensor | None, acts: SparseActs
) -> LayerActivations:
    return LayerActivations(
        layer=entry.info.layer,
        x=x,
        reconstruction=reconstruction,
        acts=acts,
        decoder=encoder.decoder,
        d_sae=entry.info.d_sae,
    )


def pool(
    entry: LoadedSae,
    encoder: Encoder,
    x: Tensor,
    acts: SparseActs,
    readings: Readings,
    positions: Positions,
) -> LayerActivations:
    """The features of each text's readings as one: their mean, with the mean of x; or their maximum."""
    rows = torch.from_numpy(readings.rows).to(x.device)
    counts = torch.from_numpy(np.diff(readings.offsets)).to(x.device)
    text = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts)  # (R,)
    features = x.new_zeros(len(counts) * entry.info.d_sae)
    total = x.new_zeros(len(counts), x.shape[1])
    for start in range(0, len(rows), POOLED_ROWS):
        chunk = slice(start, start + POOLED_ROWS)
        read = acts.select(rows[chunk])
        slots = (text[chunk, None] * entry.info.d_sae + read.indices)[read.active]
        values = read.values[read.active]
        if positions == "mean":
            features.index_add_(0, slots, values)
            total.index_add_(0, text[chunk], x[rows[chunk]])
        else:
            features.scatter_reduce_(0, slots, values, "amax")
    dense = features.view(len(counts), entry.info.d_sae)
    if positions == "max":
        return layer_of(entry, encoder, None, None, from_dense(dense))
    sparse = from_dense(dense / counts.unsqueeze(1))
    return layer_of(entry, encoder, total / counts.unsqueeze(1), encoder.decode(sparse), sparse)

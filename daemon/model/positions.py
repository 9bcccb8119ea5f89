"""Chooses the token positions of a text that SAEs read, encodes them, and pools them.

`last`: the last token. `all`: every token is stored, the last one analysed. `mean` and `max`: the features of
every token, pooled into one row. Tokens are those that count. A BOS token at a text's beginning, whoever put
it there, is none of its own: with `all`, `mean` and `max` it is left out. SAEs that read texts with BOS and
SAEs that read them without share a forward pass. Knows no model.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from daemon.analysis.column_inputs import LayerActivations
from daemon.analysis.features import StoredFeatures
from daemon.analysis.sparse import SparseActs, from_dense, joined
from daemon.devices import finish, on_mps, to_device, to_exact, to_numpy
from daemon.model.both_ways import shares_of, together
from daemon.model.encoding import Encoder, row_pieces
from daemon.model.extraction import Counted, Extraction, NotFinite, ReadPositions, Started
from daemon.model.overflow import all_finite
from daemon.model.rereading import of_texts, reread
from daemon.model.sae import LoadedSae
from daemon.model_info import Fit
from daemon.records import IntArray, Positions

NOWHERE = -1  # position and token of features that belong to no one position
POOLED_ROWS = 4096  # rows gathered at a time


@dataclass(frozen=True, slots=True)
class SaeStage:
    """The stage after the forward pass, which all engines share: encodes the values that SAEs read."""

    saes: tuple[LoadedSae, ...]
    encoders: tuple[Encoder, ...]  # of each SAE
    positions: Positions
    devices: str  # as `ModelInfo.device` names them
    bos: int | None  # the token that is none of a text's own where it begins with it

    @property
    def reads_both_ways(self) -> bool:
        return len({entry.info.prepend_bos for entry in self.saes}) > 1

    def predicted_texts(self, n: int) -> int:
        """Of n texts, how many have their tokens predicted: of texts that come both ways those with BOS."""
        return n // 2 if self.reads_both_ways else n

    def choose(
        self, path: IntArray, offsets: IntArray, token_ids: IntArray, counted: Counted = None
    ) -> ReadPositions:
        """`path` holds where each text's tokens were computed, text by text; `offsets` (N + 1,) where they
        begin; `token_ids` are the tokens there; `counted` says which of each text count.

        Raises ValueError where that leaves a text without a token to read.
        """
        lengths = np.diff(offsets)
        counts = None if counted is None else np.frombuffer(b"".join(counted), dtype=np.bool_)
        if self.positions == "last":
            last, n = offsets[1:] - 1, len(lengths)
            if counts is not None:
                which = np.flatnonzero(counts)
                before = np.searchsorted(which, offsets)
                check_each_is_read(np.diff(before))
                last = which[before[1:] - 1]
            position = last - offsets[:-1]
            return ReadPositions(path[last], np.arange(n), np.arange(n + 1), position, token_ids[last])
        position = np.arange(len(path)) - np.repeat(offsets[:-1], lengths)
        own = np.ones(len(path), dtype=np.bool_) if counts is None else counts.copy()
        if self.bos is not None:
            own[offsets[:-1][token_ids[offsets[:-1]] == self.bos]] = False
        lengths = np.add.reduceat(own, offsets[:-1], dtype=np.int64)
        check_each_is_read(lengths)
        keep, rows = np.unique(path[own], return_inverse=True)
        own_offsets = np.concatenate(([0], np.cumsum(lengths)))
        return ReadPositions(keep, rows, own_offsets, position[own], token_ids[own])

    def finish(
        self, started: Started, start: Callable[[Sequence[Sequence[int]], Counted], Started]
    ) -> Extraction:
        """Wait for the forward pass and encode its values; `start` reads texts again that are not finite."""
        if self.reads_both_ways:
            return self._finish_both_ways(started, start)
        forward_seconds = started.forward.seconds()
        began = time.perf_counter()
        with torch.inference_mode():
            started = self._exact(started)
            given = self._given(started)
            if any(one.finite is not None for one in given):
                started = reread(started, lambda texts, counted: self._exact(start(texts, counted)))
                given = self._given(started)
            layers, stored = encode_readings(given, started.readings, self.positions)
            not_finite = texts_not_finite(given, layers, started.readings)
            finish(self.devices)
        return Extraction(
            layers=layers,
            stored=(stored,),
            not_finite=not_finite,
            computed_tokens=started.computed_tokens,
            padding_tokens=started.padding_tokens,
            forward_seconds=forward_seconds,
            sae_seconds=time.perf_counter() - began,
        )

    def _finish_both_ways(
        self, started: Started, start: Callable[[Sequence[Sequence[int]], Counted], Started]
    ) -> Extraction:
        shares = shares_of([entry.info.prepend_bos for entry in self.saes])
        found = []
        for number, share in enumerate(shares):
            stage = dataclasses.replace(
                self,
                saes=tuple(self.saes[sae] for sae in share.saes),
                encoders=tuple(self.encoders[sae] for sae in share.saes),
            )
            half = share.of_pass(started)
            if number:  # the pass is counted once
                half = dataclasses.replace(half, computed_tokens=0, padding_tokens=0)
            found.append(stage.finish(half, partial(share.start_own, start)))
        return together(shares, found)

    def _exact(self, started: Started) -> Started:
        """The same with the values where float64 is computed."""
        if not on_mps(self.devices):
            return started
        moved = {id(values): to_exact(values) for values in (*started.read, *started.written)}
        read, written = ([moved[id(values)] for values in kind] for kind in (started.read, started.written))
        return dataclasses.replace(started, read=read, written=written)

    def _given(self, started: Started) -> list[Given]:
        return list(map(Given.of, self.saes, self.encoders, started.read, started.written))


def check_each_is_read(readings: IntArray) -> None:
    """`readings` (N,) of each text. Raises ValueError where there are none."""
    if not readings.all():
        raise ValueError(f"text {int(np.argmin(readings))} of a batch has no token to read")


def comparable_cards(saes: Sequence[LoadedSae], positions: Positions) -> tuple[Fit, ...]:
    """The dictionaries' cards, which are of single tokens; none where positions are pooled."""
    return tuple(entry.card for entry in saes) if positions in ("last", "all") else ()


@dataclass(frozen=True, slots=True)
class Given:
    """A model's values for one SAE at K tokens."""

    entry: LoadedSae
    encoder: Encoder
    x: Tensor  # (K, d_in) what it reads
    target: Tensor  # (K, d_out) what its reconstruction is to equal: x, but of a transcoder
    finite: Tensor | None  # (K,) bool: whether these, and what it makes of x, are; None where all are

    @classmethod
    def of(cls, entry: LoadedSae, encoder: Encoder, read: Tensor, written: Tensor) -> Given:
        """`read` (K, d_in) and `written` (K, d_out) as the model has them."""
        x = entry.residual(read)
        finite = encoder.finite(x)
        if written is read:
            target = x
        else:
            target = entry.residual(written)
            finite &= all_finite(target)
        return cls(entry, encoder, x, target, None if finite.all() else finite)

    def encoded(self) -> Encoded:
        """Replaces rows that are not finite by ones: none of their results is kept."""
        x, target = self.x, self.target
        if self.finite is not None:
            x = x.where(self.finite.unsqueeze(1), 1)
            target = x if self.target is self.x else target.where(self.finite.unsqueeze(1), 1)
        return Encoded(self.entry, self.encoder, x, target, self.encoder.encode(x))


@dataclass(frozen=True, slots=True)
class Encoded:
    """One SAE's activations at K tokens."""

    entry: LoadedSae
    encoder: Encoder
    x: Tensor  # (K, d_in) what it read
    target: Tensor  # (K, d_out) what its reconstruction is to equal: x, but of a transcoder
    acts: SparseActs

    def select(self, rows: Tensor) -> Encoded:
        x = self.x[rows]
        target = x if self.target is self.x else self.target[rows]
        return Encoded(self.entry, self.encoder, x, target, self.acts.select(rows))

    def analysed(self) -> LayerActivations:
        """The rows to analyse, with their reconstruction."""
        if not self.entry.reconstructs:
            return self._layer(self.acts, self.x, None, None)
        return self._layer(self.acts, self.x, self.target, self.encoder.decode(self.acts, self.x))

    def pooled(self, readings: ReadPositions, positions: Positions) -> LayerActivations:
        """The features of each text's positions pooled: their mean, with the mean of x; or their maximum."""
        rows = to_device(readings.rows, self.x.device)
        counts = to_device(np.diff(readings.offsets), self.x.device)
        text = torch.repeat_interleave(torch.arange(len(counts), device=self.x.device), counts)  # (R,)
        # as many texts at a time as their dense features allow
        pieces = row_pieces(len(counts), self.entry.info.d_sae, self.x.device)
        acts = joined([self._pooled_acts(readings, rows, text, piece, positions) for piece in pieces])
        if positions == "max":
            return self._layer(acts, None, None, None)
        x = mean_of(self.x, rows, text, counts)
        if not self.entry.reconstructs:
            return self._layer(acts, x, None, None)
        target = x if self.target is self.x else mean_of(self.target, rows, text, counts)
        if self.encoder.affine:
            return self._layer(acts, x, target, self.encoder.decode(acts, x))
        reconstruction = mean_of(self.encoder.decode(self.acts, self.x), rows, text, counts)
        return self._layer(acts, x, target, reconstruction)

    def _pooled_acts(
        self, readings: ReadPositions, rows: Tensor, text: Tensor, texts: slice, positions: Positions
    ) -> SparseActs:
        """The pooled features of some texts (n, d_sae); `rows` (R,) and `text` (R,) are those of all."""
        offsets = readings.offsets[texts.start : texts.stop + 1]
        counts = to_device(np.diff(offsets), self.x.device)
        d_sae = self.entry.info.d_sae
        features = self.x.new_zeros(len(counts) * d_sae)
        for start in range(int(offsets[0]), int(offsets[-1]), POOLED_ROWS):
            chunk = slice(start, min(start + POOLED_ROWS, int(offsets[-1])))
            read = self.acts.select(rows[chunk])
            slots = ((text[chunk, None] - texts.start) * d_sae + read.indices)[read.active]
            values = read.values[read.active]
            if positions == "mean":
                features.index_add_(0, slots, values)
            else:
                features.scatter_reduce_(0, slots, values, "amax")
        dense = features.view(len(counts), d_sae)
        return from_dense(dense.div_(counts.unsqueeze(1)) if positions == "mean" else dense)

    def _layer(
        self, acts: SparseActs, x: Tensor | None, target: Tensor | None, reconstruction: Tensor | None
    ) -> LayerActivations:
        return LayerActivations(
            name=self.entry.info.name,
            layer=self.entry.info.layer,
            x=x,
            target=target,
            reconstruction=reconstruction,
            acts=acts,
            decoder=self.encoder.decoder,
            d_sae=self.entry.info.d_sae,
        )


def mean_of(values: Tensor, rows: Tensor, text: Tensor, counts: Tensor) -> Tensor:
    """Values (K, d) at the readings `rows` (R,) of the texts `text` (R,) -> the mean of each text (N, d)."""
    total = values.new_zeros(len(counts), values.shape[1])
    for start in range(0, len(rows), POOLED_ROWS):
        chunk = slice(start, start + POOLED_ROWS)
        total.index_add_(0, text[chunk], values[rows[chunk]])
    return total / counts.unsqueeze(1)


def encode_readings(
    given: Sequence[Given], readings: ReadPositions, positions: Positions
) -> tuple[tuple[LayerActivations, ...], StoredFeatures]:
    """Each SAE's activations at the tokens `readings.keep`: those to analyse, and those to store."""
    encoded = [one.encoded() for one in given]
    numbers = tuple(range(len(encoded)))
    if positions in ("mean", "max"):
        pooled = tuple(one.pooled(readings, positions) for one in encoded)
        n = len(readings.offsets) - 1
        nowhere = np.full(n, NOWHERE)
        every = tuple(layer.acts for layer in pooled)
        x = tuple(layer.x for layer in pooled)
        return pooled, StoredFeatures(numbers, every, np.arange(n), np.arange(n + 1), nowhere, nowhere, x)
    stored = StoredFeatures(
        numbers,
        tuple(one.acts for one in encoded),
        readings.rows,
        readings.offsets,
        readings.positions,
        readings.token_ids,
        tuple(one.x for one in encoded),
    )
    if positions == "all":
        last = to_device(readings.last, encoded[0].x.device)
        encoded = [one.select(to_device(last, one.x.device)) for one in encoded]
    return tuple(one.analysed() for one in encoded), stored


def texts_not_finite(
    given: Sequence[Given], layers: Sequence[LayerActivations], readings: ReadPositions
) -> tuple[NotFinite, ...]:
    """The texts with a position that is not finite, or that pooling made so."""
    found: dict[int, NotFinite] = {}
    for sae, (one, layer) in enumerate(zip(given, layers, strict=True)):
        if one.finite is not None:
            in_model = ~(all_finite(one.x) & all_finite(one.target))
            for rows, whose in ((in_model, True), (~one.finite, False)):
                for text in of_texts(to_numpy(rows), readings).tolist():
                    found.setdefault(text, NotFinite(text, sae, whose))
        pooled = layer.acts.values.amax(-1).isfinite()  # (N,)
        if not pooled.all():
            for text in (~pooled).nonzero().squeeze(1).tolist():
                found.setdefault(text, NotFinite(text, sae, in_model=False))
    return tuple(found[text] for text in sorted(found))

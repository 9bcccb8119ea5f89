"""What passes between the steps of an engine. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from daemon.analysis.features import StoredFeatures
from daemon.analysis.study import LayerActivations
from daemon.model.cuda_streams import Launched
from daemon.records import IntArray


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


@dataclass(frozen=True, slots=True)
class Started:
    """A forward pass over N texts that the device may still be at."""

    texts: Sequence[Sequence[int]]
    readings: Readings
    read: Sequence[Tensor]  # per SAE what it reads (K, d_in), as the model has it
    written: Sequence[Tensor]  # per SAE what it is to reconstruct (K, d_out): the same but for transcoders
    forward: Launched
    computed_tokens: int  # token positions that the model runs, padding included
    padding_tokens: int


@dataclass(frozen=True, slots=True)
class NotFinite:
    """A text of whose readings at an SAE one holds NaN or infinity."""

    text: int
    sae: int
    in_model: bool  # what the model gives the SAE; else what the SAE makes of it


@dataclass(frozen=True, slots=True)
class Extraction:
    """What N texts gave: one reading of each to analyse, and the features to store."""

    layers: tuple[LayerActivations, ...]  # one per SAE, N rows in the order of the texts
    stored: StoredFeatures
    not_finite: tuple[
        NotFinite, ...
    ]  # texts whose rows mean nothing, each with its first SAE, in their order
    computed_tokens: int
    padding_tokens: int
    forward_seconds: float
    sae_seconds: float

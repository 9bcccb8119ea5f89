"""The messages between the steps of an engine. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from daemon.analysis.column_inputs import LayerActivations, TokenLogProbs
from daemon.analysis.features import StoredFeatures
from daemon.model.cuda_streams import Launch
from daemon.records import IntArray

Counted = Sequence[bytes] | None  # of each text a byte for each token, 1 where it counts; None where all do


@dataclass(frozen=True, slots=True)
class ReadPositions:
    """The computed tokens that are encoded, and those of them that belong to each text."""

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
class PredictedTokens:
    """The log-probabilities of the tokens that count, which the device may still be at."""

    log_probs: Tensor  # (W,) of tokens that texts may share, in nats
    of_texts: IntArray  # (M,) what texts count in turn, as rows of these
    offsets: IntArray  # (N + 1,) where each text's begin


@dataclass(frozen=True, slots=True)
class Started:
    """A forward pass over N texts that the device may still be at."""

    texts: Sequence[Sequence[int]]
    readings: ReadPositions
    read: Sequence[Tensor]  # per SAE what it reads (K, d_in), as the model has it
    written: Sequence[Tensor]  # per SAE what it is to reconstruct (K, d_out): the same but for transcoders
    forward: Launch  # the forward pass
    computed_tokens: int  # token positions that the model runs, padding included
    padding_tokens: int
    counted: Counted = None
    predicted: PredictedTokens | None = None  # where log-probabilities are wanted


@dataclass(frozen=True, slots=True)
class NotFinite:
    """A text with NaN or infinity at one of its positions at an SAE."""

    text: int
    sae: int
    in_model: bool  # in the model's values; else in the SAE's


@dataclass(frozen=True, slots=True)
class Extraction:
    """The results of N texts: one position of each to analyse, and the features to store."""

    layers: tuple[LayerActivations, ...]  # one per SAE, N rows in the order of the texts
    stored: tuple[StoredFeatures, ...]  # one, or two where SAEs read texts with BOS and without
    not_finite: tuple[
        NotFinite, ...
    ]  # texts whose rows mean nothing, each with its first SAE, in their order
    computed_tokens: int
    padding_tokens: int
    forward_seconds: float
    sae_seconds: float
    log_probs: TokenLogProbs | None = None  # of the texts, with BOS where they come both ways

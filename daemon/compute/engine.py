"""The narrow interface behind which a model and its SAEs run. Knows no files and no samples.

An engine is used by one thread only, the device's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from daemon.analysis.study import LayerActivations
from daemon.records import ModelInfo


@dataclass(frozen=True, slots=True)
class Extraction:
    """What N texts gave at their last token: one `LayerActivations` per SAE, rows in the order given."""

    layers: tuple[LayerActivations, ...]
    computed_tokens: int  # token positions that the model ran, padding included
    padding_tokens: int
    forward_seconds: float
    sae_seconds: float


class Engine(Protocol):
    """A model with its SAEs on one device."""

    @property
    def info(self) -> ModelInfo: ...

    def extract(self, texts: Sequence[Sequence[int]]) -> Extraction:
        """Read N texts, given as token ids, and encode the last token of each with every SAE."""
        ...

    def encode_first(self, x: Tensor) -> Tensor:
        """First SAE: (M, d_in) residuals -> (M, d_sae) dense feature activations."""
        ...

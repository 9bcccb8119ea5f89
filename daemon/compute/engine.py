"""The narrow interface behind which a model and its SAEs run. Knows no files and no samples.

An engine is used by one thread only, the device's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from daemon.analysis.features import StoredFeatures
from daemon.analysis.study import LayerActivations
from daemon.compute.encoding import Encoder
from daemon.records import ModelInfo


@dataclass(frozen=True, slots=True)
class Extraction:
    """What N texts gave: one reading of each to analyse, and the features to store."""

    layers: tuple[LayerActivations, ...]  # one per SAE, N rows in the order of the texts
    stored: StoredFeatures
    computed_tokens: int  # token positions that the model ran, padding included
    padding_tokens: int
    forward_seconds: float
    sae_seconds: float


class Engine(Protocol):
    """A model with its SAEs on one device."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def prepend_bos(self) -> bool: ...

    @property
    def shares_prefixes(self) -> bool:
        """Whether tokens with which several texts begin are computed once, so that padding costs nothing."""
        ...

    @property
    def encoders(self) -> tuple[Encoder, ...]: ...

    def extract(self, texts: Sequence[Sequence[int]]) -> Extraction:
        """Read N texts, given as token ids, and encode them with every SAE."""
        ...

"""The inputs of column functions, and what several columns need of them, computed once.

N = n samples x T texts positions, sample-major: row = sample * T + text. Knows nothing about columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from daemon.analysis.geometry import DecoderRows, Geometry, geometry
from daemon.analysis.sparse import SparseActs
from daemon.analysis.stability import Noise, noise_draws, stability
from daemon.devices import to_device
from daemon.records import FloatArray, IntArray, Positions

Owner = TypeVar("Owner")
Value = TypeVar("Value")


class computed_once(Generic[Owner, Value]):
    """A property that is computed at its first use, by whichever thread.

    `functools.cached_property` of Python 3.11 holds one lock for all objects: pieces of a batch that cores
    analyse side by side would wait for each other.
    """

    def __init__(self, compute: Callable[[Owner], Value]) -> None:
        self._compute = compute

    def __get__(self, owner: Owner, kind: type[Owner]) -> Value:
        value = self._compute(owner)
        vars(owner)[self._compute.__name__] = value  # found there from now on
        return value


class Errors(NamedTuple):
    """Of the reconstruction at N positions; NaN where there is none."""

    absolute: Tensor  # (N,) ||x - decode(f)||, where x is what the reconstruction is to equal
    relative: Tensor  # (N,) that over ||x||; NaN where x is zero


@dataclass(frozen=True, slots=True)
class TokenLogProbs:
    """The log-probabilities, in nats, of the counted tokens of N texts: M tokens, text by text."""

    values: FloatArray  # (M,)
    texts: IntArray  # (M,) the text of each, ascending
    n_texts: int

    @property
    def counts(self) -> IntArray:
        """(N,) tokens of each text."""
        return np.bincount(self.texts, minlength=self.n_texts)


class Stability(NamedTuple):
    """Over draws of noise; NaN where there is none."""

    mean: Tensor  # (n,)
    deviation: Tensor  # (n,)


@dataclass(frozen=True)
class LayerActivations:
    """One SAE's activations at N positions, and their reconstruction."""

    name: str  # of the SAE
    layer: int
    x: Tensor | None  # (N, d_in) what the SAE read; None where features are the maximum of several readings
    target: Tensor | None  # (N, d_out) what the reconstruction is to equal: x, but of a transcoder
    reconstruction: Tensor | None  # (N, d_out)
    acts: SparseActs  # of N positions
    decoder: DecoderRows
    d_sae: int

    @computed_once
    def shape(self) -> Geometry:
        """Of the active decoder rows at N positions."""
        return geometry(self.acts, self.decoder)

    @computed_once
    def errors(self) -> Errors:
        if self.target is None or self.reconstruction is None:
            missing = undefined(self.acts.counts)
            return Errors(missing, missing)
        x = self.target.double()
        error = torch.linalg.vector_norm(x - self.reconstruction.double(), dim=-1)
        relative = torch.where(x.any(-1), error / torch.linalg.vector_norm(x, dim=-1), torch.nan)
        return Errors(error, relative)


@dataclass(frozen=True, slots=True)
class StudySettings:
    seed: int  # of the stability noise
    noise_sigma: float  # standard deviation, in units of x
    noise_draws: int  # per text, out of the noise bank
    stability_top_k: int  # features compared
    entropy_top_k: int  # features whose magnitudes are normalised
    positions: Positions = "last"
    residuals: bool = False  # whether what SAEs read is kept


@dataclass(frozen=True)
class ComparedText:
    """One text of a contrast in each of n samples, and where its reference is."""

    name: str
    layers: Sequence[LayerActivations]  # of all N positions
    rows: Tensor  # (n,) of N that hold the text
    reference_rows: Tensor  # (n,) of N that hold the reference
    sample_ids: Sequence[str]
    settings: StudySettings
    noise: Noise | None  # of the first SAE

    @property
    def first(self) -> LayerActivations:
        """The first SAE's activations, which contrasts read."""
        return self.layers[0]

    @property
    def first_of_layers(self) -> list[LayerActivations]:
        """The first SAE of each layer, in the order of the layers."""
        return list({layer.layer: layer for layer in reversed(self.layers)}.values())[::-1]

    @property
    def undefined(self) -> Tensor:
        """(n,) NaN."""
        return undefined(self.rows)

    @computed_once
    def stability(self) -> Stability:
        """Of the strongest features at the first SAE under noise."""
        x, settings = self.first.x, self.settings
        if self.noise is None or x is None:
            return Stability(self.undefined, self.undefined)
        draws = [
            noise_draws(settings.seed, sample_id, self.name, settings.noise_draws)
            for sample_id in self.sample_ids
        ]
        drawn = to_device(np.stack(draws), x.device)
        return Stability(*stability(self.noise, x[self.rows], drawn, settings.stability_top_k))


def undefined(rows: Tensor) -> Tensor:
    """NaN for each of the rows."""
    return torch.full(rows.shape, torch.nan, dtype=torch.float64, device=rows.device)

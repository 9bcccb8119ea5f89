"""Random SAE-like activations, small and in any dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import settings
from torch import Tensor

from daemon.analysis.column_inputs import LayerActivations, StudySettings
from daemon.analysis.geometry import DecoderRows
from daemon.analysis.sparse import SparseActs, from_dense
from daemon.analysis.stability import Noise, noise_bank

QUICK = settings(max_examples=40, deadline=None)
SETTINGS = StudySettings(seed=3, noise_sigma=0.1, noise_draws=5, stability_top_k=4, entropy_top_k=6)


@dataclass(frozen=True, slots=True)
class RandomSae:
    """A JumpReLU dictionary of which about a third of the features fire on a unit-scale input."""

    W_enc: Tensor  # (d_in, d_sae)
    W_dec: Tensor  # (d_sae, d_in)
    threshold: float = 0.4

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    def pre_acts(self, x: Tensor) -> Tensor:
        return x.to(self.W_enc.dtype) @ self.W_enc

    def activate(self, pre_acts: Tensor) -> Tensor:
        return torch.where(pre_acts > self.threshold, pre_acts, 0)

    def encode(self, x: Tensor) -> Tensor:
        return self.activate(self.pre_acts(x))

    def noise(self, seed: int, sigma: float) -> Noise:
        bank = noise_bank(seed, self.W_enc.shape[0], self.W_enc.dtype)
        return Noise(self.pre_acts, self.activate, sigma * bank @ self.W_enc)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts @ self.W_dec


def random_sae(seed: int, d_in: int, d_sae: int, dtype: torch.dtype = torch.float64) -> RandomSae:
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(d_in, d_sae, generator=generator, dtype=torch.float64) / d_in**0.5
    W_dec = torch.randn(d_sae, d_in, generator=generator, dtype=torch.float64)
    return RandomSae(W_enc.to(dtype), W_dec.to(dtype))


def unprojected(encode: Callable[[Tensor], Tensor], bank: Tensor, sigma: float) -> Noise:
    """Noise that is added to x itself, for an encoder that is not taken apart."""
    return Noise(lambda x: x, encode, sigma * bank)


def residuals(seed: int, n: int, d_in: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(n, d_in, generator=generator, dtype=torch.float64).to(dtype)


def activations(sae: RandomSae, x: Tensor, layer: int) -> LayerActivations:
    feature_acts = sae.encode(x)
    return LayerActivations(
        name=f"l{layer}",
        layer=layer,
        x=x,
        target=x,
        reconstruction=sae.decode(feature_acts),
        acts=from_dense(feature_acts),
        decoder=DecoderRows.of(sae.W_dec),
        d_sae=sae.d_sae,
    )


def random_acts(seed: int, counts: list[int], d_sae: int) -> SparseActs:
    """One position per count, with that many active features of magnitudes in (0.1, 2.1)."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.zeros(len(counts), d_sae, dtype=torch.float64)
    for row, n in enumerate(counts):
        features = torch.randperm(d_sae, generator=generator)[:n]
        dense[row, features] = 0.1 + 2 * torch.rand(n, generator=generator, dtype=torch.float64)
    return from_dense(dense)


def to_dense(acts: SparseActs, d_sae: int) -> Tensor:
    """(N, d_sae), read slot by slot."""
    dense = torch.zeros(len(acts.counts), d_sae, dtype=acts.values.dtype)
    for row, n in enumerate(acts.counts.tolist()):
        for slot in range(n):
            dense[row, acts.indices[row, slot]] = acts.values[row, slot]
    return dense

"""Which rows an SAE can read without leaving the numbers that its dtype holds.

NaN and infinity compare false: where a product overflows, it looks as if nothing fired. The length of what is
read bounds every sum in the product, by Cauchy and Schwarz; only rows beyond that bound are looked at.
Knows no model and no texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MARGIN = 4  # between what is trusted and the largest number: for noise, and for the order of summation
LONGEST = {torch.float32: 1e18, torch.float64: 1e150}  # whose squares can be summed up
SHORTEST = 1e-15  # of what is divided by its length
LOOKED_AT = 512  # rows at a time
NORMALISING = ("layer_norm", "constant_norm_rescale")  # by statistics of each row


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds within which nothing overflows: on the length of x, and on the magnitude of a pre-activation."""

    shortest: float
    longest: float
    pre_act: float

    @classmethod
    def of(cls, sae: Any) -> Bounds:
        """The bounds of a SAELens dictionary. Where there are none, no length is within."""
        d_in = len(sae.W_enc)
        dtype = sae.W_enc.dtype
        column = largest(torch.linalg.vector_norm(sae.W_enc, dim=0))
        bias = largest(sae.b_enc if sae.b_enc is not None else sae.b_gate)
        if sae.cfg.apply_b_dec_to_input and len(sae.b_dec) == d_in:
            bias += column * float(torch.linalg.vector_norm(sae.b_dec.double()))
        factor, added = activation_bounds(sae)
        pre_act = max(0.0, torch.finfo(dtype).max / MARGIN - added) / max(1.0, factor)
        longest = max(0.0, pre_act - bias) / max(column, torch.finfo(dtype).tiny)
        if sae.cfg.normalize_activations in NORMALISING:  # to the length sqrt(d_in), or a hair less
            return cls(SHORTEST, LONGEST[dtype] if longest > 2 * d_in**0.5 else 0.0, pre_act)
        return cls(-1.0, min(LONGEST[dtype], longest), pre_act)

    def trusts(self, x: Tensor) -> Tensor:
        """(N,) bool, for rows x (N, d_in); what is not finite is not trusted."""
        lengths: Tensor = torch.linalg.vector_norm(x, dim=-1)
        return (lengths > self.shortest) & (lengths < self.longest)

    def finite(self, x: Tensor, steps: Callable[[Tensor], Sequence[Tensor]]) -> Tensor:
        """(N,) bool: the rows of x (N, d_in) that are finite, and of which `steps` makes nothing else.

        `steps` gives what is made of n rows on the way, each (n, ...); it is asked for rows that are not
        trusted only.
        """
        finite = self.trusts(x)
        if finite.all():
            return finite
        distrusted = (~finite).nonzero().squeeze(1)
        for start in range(0, len(distrusted), LOOKED_AT):
            rows = distrusted[start : start + LOOKED_AT]
            made = x[rows], *steps(x[rows])
            finite[rows] = torch.stack([all_finite(values) for values in made]).all(0)
        return finite


def all_finite(values: Tensor) -> Tensor:
    """(N,) bool: the rows (N, d) of finite numbers whose squares have a sum in float64."""
    lengths: Tensor = torch.linalg.vector_norm(values.double(), dim=-1)
    return lengths.isfinite()


def activation_bounds(sae: Any) -> tuple[float, float]:
    """By how much an activation multiplies pre-activations at most, and what it adds to them."""
    if getattr(sae, "r_mag", None) is not None:
        return largest(sae.r_mag.double().exp()), largest(sae.b_mag)
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        return largest(torch.linalg.vector_norm(sae.W_dec, dim=-1)), 0.0
    return 1.0, 0.0


def largest(values: Tensor) -> float:
    """The largest magnitude; infinity where there is NaN, so that no bound comes of it."""
    return float(values.abs().max().double().nan_to_num(nan=torch.inf, posinf=torch.inf))

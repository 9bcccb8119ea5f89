"""Measures how well the strongest features of a residual survive noise.

The noise of a text is a function of (seed, sample id, text name) alone, so a result does not depend on how
samples are batched, ordered or restarted. An SAE's pre-activations are linear in x, so the whole bank is
projected once and added there: no product per draw. Knows nothing else about the SAE.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from daemon.analysis.row_sums import row_norm, row_sum
from daemon.devices import on_mps, to_device, to_exact
from daemon.records import IntArray

NOISE_BANK_SIZE = 256  # rows; a byte of a hash is a row
# Rows of the dense (M, d_sae) workspace, or one text's draws.
MAX_ACTIVATED = {"cpu": 512, "mps": 2048, "cuda": 8192}
MAX_NUMBERS = {"cpu": 1 << 25, "mps": 1 << 27, "cuda": 1 << 28}  # in that workspace, whatever d_sae is


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise of one SAE, where it can be added: encode(x + e) = activate(pre_acts(x) + projected(e))."""

    pre_acts: Callable[[Tensor], Tensor]  # (N, d_in) -> (N, d_pre)
    activate: Callable[[Tensor], Tensor]  # (M, d_pre) -> dense feature activations (M, d_sae)
    projected: Tensor  # (NOISE_BANK_SIZE, d_pre) what sigma times each row of the bank adds to pre_acts
    trusts: Callable[[Tensor], Tensor] | None = (
        None  # (N, d_in) -> (N,) bool: rows where no sound noise overflows
    )
    sound: Tensor | None = None  # (NOISE_BANK_SIZE,) bool: noise that overflows in no such row

    def defined(self, x: Tensor, draws: Tensor) -> Tensor:
        """(N,) bool: the rows of x (N, d_in) that stay finite under their draws (N, K) of noise."""
        rows = torch.ones_like(draws[:, 0], dtype=torch.bool) if self.trusts is None else self.trusts(x)
        return rows if self.sound is None else rows & self.sound[draws].all(-1)


def noise_bank(seed: int, d_in: int, dtype: torch.dtype) -> Tensor:
    """Standard normal noise (NOISE_BANK_SIZE, d_in) on the CPU, drawn in float64 and cast."""
    entropy = int.from_bytes(_digest(str(seed), "bank", str(d_in)), "big")
    generator = np.random.Generator(np.random.PCG64(entropy))
    return torch.from_numpy(generator.standard_normal((NOISE_BANK_SIZE, d_in))).to(dtype)


def noise_draws(seed: int, sample_id: str, text_name: str, k: int) -> IntArray:
    """The k distinct rows of the bank (k,) that perturb one text.

    They are the first k distinct bytes of a stream of BLAKE2b digests of the other arguments, so they are
    the same on every platform and release. Raises ValueError where the bank is too small.
    """
    if k > NOISE_BANK_SIZE:
        raise ValueError(f"{k} draws out of a noise bank of {NOISE_BANK_SIZE}")
    drawn: dict[int, None] = {}
    for row in _byte_stream(str(seed), sample_id, text_name):
        if len(drawn) == k:
            break
        drawn[row] = None
    return np.fromiter(drawn, dtype=np.int64, count=k)


def stability(noise: Noise, x: Tensor, draws: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation, over draws, of the Jaccard similarity of the sets of the
    `top_k` strongest active features of x and of x + sigma * noise.

    x: (N, d_in); draws: (N, K) int64 rows of the bank. Returns two (N,) float64 tensors. Two empty sets are
    alike: 1. NaN where noise takes a row out of the numbers that its dtype holds.
    """
    n, k = draws.shape
    pre_acts = noise.pre_acts(x)
    kind = pre_acts.device.type
    allowed = min(MAX_ACTIVATED[kind], MAX_NUMBERS.get(kind, MAX_NUMBERS["cuda"]) // pre_acts.shape[1])
    rows = max(1, allowed // (k + 1))
    pieces = [slice(start, start + rows) for start in range(0, max(1, n), rows)]
    sets = torch.cat([_sets(noise, pre_acts[piece], draws[piece], top_k) for piece in pieces])
    jaccard = _similarity(sets).where(noise.defined(x, draws).unsqueeze(1), torch.nan)
    mean = row_sum(jaccard) / k
    return mean, row_norm(jaccard - mean.unsqueeze(1)) / k**0.5


def strongest(feature_acts: Tensor, top_k: int) -> Tensor:
    """The `top_k` largest positive entries of each row (M, d_sae) as indices (M, <= top_k); -1 for none.

    Ties go to the lower index. On the exact device, wherever the activations are.
    """
    d_sae = feature_acts.shape[-1]
    largest_values, largest_indices = map(to_exact, feature_acts.topk(min(top_k + 1, d_sae), dim=-1))
    values, indices = largest_values[:, :top_k], largest_indices[:, :top_k]
    if d_sae > top_k:  # topk leaves open which of equals it takes
        tied = (values[:, -1] == largest_values[:, top_k]) & (values[:, -1] > 0)
        if tied.any():
            rows = tied.nonzero().squeeze(1)
            equal = to_exact(feature_acts[to_device(rows, feature_acts.device)])
            indices = indices.clone()
            indices[rows] = equal.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return indices.where(values > 0, -1)


def _sets(noise: Noise, pre_acts: Tensor, draws: Tensor, top_k: int) -> Tensor:
    """pre_acts: (m, d_pre), draws: (m, K) -> the strongest features (m, 1 + K, <= top_k)."""
    m, k = draws.shape
    drawn, unmoved = noise.projected[to_device(draws, pre_acts.device)], pre_acts.unsqueeze(1)
    if on_mps(pre_acts.device):  # writes to parts of a tensor have been lost there
        inputs = torch.cat((unmoved, drawn + unmoved), dim=1)
    else:
        inputs = pre_acts.new_empty(m, k + 1, pre_acts.shape[1])
        inputs[:, 0] = pre_acts
        torch.add(drawn, unmoved, out=inputs[:, 1:])
    return strongest(noise.activate(inputs.flatten(0, 1)), top_k).view(m, k + 1, -1)


def _similarity(sets: Tensor) -> Tensor:
    """(m, 1 + K, <= top_k) -> Jaccard similarities (m, K) float64 of the first set with each other one."""
    base, noisy = sets[:, :1], sets[:, 1:]
    same = (noisy.unsqueeze(-1) == base.unsqueeze(-2)) & (noisy >= 0).unsqueeze(-1)
    shared = same.sum((-1, -2))
    either = (base >= 0).sum(-1) + (noisy >= 0).sum(-1) - shared
    return torch.where(either > 0, shared.double() / either.clamp(min=1), 1)


def _byte_stream(*parts: str) -> Iterator[int]:
    for block in count():
        yield from _digest(*parts, str(block))


def _digest(*parts: str) -> bytes:
    """64 bytes that depend on each part and on where one ends and the next begins."""
    digest = hashlib.blake2b(person=b"lensd noise")
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")  # ids may hold lone surrogates
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.digest()

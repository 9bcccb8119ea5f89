"""How well the strongest features of a residual survive noise.

The noise of a text is a function of (seed, sample id, text name) alone, so a result does not depend on how
samples are batched, ordered or restarted. Knows nothing about the SAE but its `encode`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import torch
from torch import Tensor

from daemon.records import IntArray

NOISE_BANK_SIZE = 256  # rows; a byte of a hash is a row
MAX_ENCODED_ROWS = 512  # rows of the dense (M, d_sae) workspace, or one text's draws if they are more

Encode = Callable[[Tensor], Tensor]


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


def stability(
    x: Tensor, encode: Encode, bank: Tensor, draws: Tensor, sigma: float, top_k: int
) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation, over draws, of the Jaccard similarity of the sets of the
    `top_k` strongest active features of x and of x + sigma * noise.

    x: (N, d_in); bank: (rows, d_in); draws: (N, K) int64 rows of the bank; sigma in units of x.
    `encode` maps (M, d_in) to dense activations (M, d_sae). Returns two (N,) float64 tensors. Two
    empty sets are alike: 1.
    """
    n, k = draws.shape
    rows = max(1, MAX_ENCODED_ROWS // (k + 1))
    similarity = [
        _similarity(x[start : start + rows], encode, sigma * bank[draws[start : start + rows]], top_k)
        for start in range(0, max(1, n), rows)
    ]
    jaccard = torch.cat(similarity)
    return jaccard.mean(-1), jaccard.std(-1, correction=0)


def top_k_set(feature_acts: Tensor, top_k: int) -> Tensor:
    """Membership (M, d_sae) bool in the set of the `top_k` largest positive entries of each row.

    Ties go to the lower index; with fewer positive entries than `top_k`, all of them.
    """
    k = min(top_k, feature_acts.shape[-1])
    threshold = feature_acts.topk(k, dim=-1).values[:, -1:].clamp(min=0)
    above = feature_acts > threshold
    tied = (feature_acts == threshold) & (threshold > 0)
    room = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


def _similarity(x: Tensor, encode: Encode, noise: Tensor, top_k: int) -> Tensor:
    """x: (m, d_in), noise: (m, K, d_in) -> Jaccard similarities (m, K) float64."""
    clean = x.unsqueeze(1)
    inputs = torch.cat([clean, clean + noise], dim=1)
    members = top_k_set(encode(inputs.flatten(0, 1)), top_k).view(*inputs.shape[:2], -1)
    base, noisy = members[:, :1], members[:, 1:]
    shared = (base & noisy).sum(-1)
    either = (base | noisy).sum(-1)
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

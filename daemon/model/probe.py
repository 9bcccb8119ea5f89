"""Random texts on which an engine is tried at the start, and how far its values are from plain modules'.

Knows no engine and no SAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from daemon.devices import to_device, to_exact

PROBE_TOLERANCE = {  # relative, of an engine's values to plain ones: of the worst token, of the median
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 1e-4),
    torch.bfloat16: (1.0, 0.05),  # rounding alone moves a few tokens, such as attention sinks, by half
    torch.float16: (1.0, 0.01),
}
PADDED_LENGTHS = (40, 7, 23)  # tokens


@dataclass(frozen=True, slots=True)
class Difference:
    """How far values are from plain ones, as a share of their size."""

    worst: float  # token
    median: float

    @classmethod
    def of(cls, expected: Tensor, got: Tensor) -> Difference:
        """Of two times (N, d). Tokens whose plain values are not finite say nothing of an engine."""
        errors = relative_errors(expected, got)
        errors = errors[to_exact(expected).isfinite().all(-1)]
        if not len(errors):
            return cls(0.0, 0.0)
        return cls(float(errors.max()), float(errors.median()))

    def within(self, dtype: torch.dtype) -> bool:
        worst, median = PROBE_TOLERANCE[dtype]
        return self.worst <= worst and self.median <= median  # NaN is not

    def __str__(self) -> str:
        return f"{self.worst:.1e} of their size at worst, {self.median:.1e} in the median"


def relative_errors(expected: Tensor, got: Tensor) -> Tensor:
    """(N,) the difference of each two rows (N, d), relative to the length of the first."""
    expected, got = to_exact(expected).double(), to_device(to_exact(got), to_exact(expected).device).double()
    difference: Tensor = torch.linalg.vector_norm(got - expected, dim=-1)
    return torch.where(difference == 0, 0.0, difference / torch.linalg.vector_norm(expected, dim=-1))


def packed_texts(vocabulary: int) -> list[list[int]]:
    """Random token sequences that share beginnings, contain one another, and span blocks of queries."""
    ids = random_ids(vocabulary, 400)
    return [ids[:150], ids[:7], ids[:90] + ids[200:300], ids[:90] + ids[300:310], ids[350:400], ids[:90]]


def padded_texts(vocabulary: int, special: Sequence[int]) -> list[list[int]]:
    """Random token sequences of different lengths, with the special tokens, and that of padding, inside."""
    ids = random_ids(vocabulary, sum(PADDED_LENGTHS))
    texts, start = [], 0
    for length in PADDED_LENGTHS:
        texts.append(ids[start : start + length])
        start += length
    known = [token for token in dict.fromkeys((0, *special)) if 0 <= token < vocabulary]
    for place, token in enumerate(known[: PADDED_LENGTHS[0] // 2]):
        texts[0][2 + place] = token
    return texts


def random_ids(vocabulary: int, n: int) -> list[int]:
    generator = np.random.Generator(np.random.PCG64(0))
    ids: list[int] = generator.integers(0, vocabulary, n).tolist()
    return ids

"""Results on their way off an accelerator and back. Knows nothing about what they mean.

By pinned memory, which torch keeps for later copies.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(values: Tensor) -> Tensor:
    """The same on the CPU."""
    if values.device.type != "cuda":
        return values.cpu()
    return pinned(values).copy_(values)


def to_host_later(values: Tensor) -> Tensor:
    """The same on the CPU, once CUDA's current stream is there."""
    return pinned(values).copy_(values, non_blocking=True)


def to_device_later(values: Tensor, device: torch.device) -> Tensor:
    """The same on CUDA; the host does not wait for what its current stream does before."""
    return values.pin_memory().to(device, non_blocking=True)


def pinned(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

"""Copies results off an accelerator. Knows nothing about what they mean."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_numpy(values: Tensor) -> npt.NDArray[Any]:
    """On the CPU; from CUDA by pinned memory, which torch keeps for later copies."""
    on_host = values
    if values.device.type == "cuda":
        on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)
    array: npt.NDArray[Any] = on_host.numpy()
    return array

"""The kinds of devices that torch computes on: how tensors reach and leave each, and its memory.

Tensors cross between host and device by `to_device`, `to_host` and `to_exact` alone. Apple's GPU (MPS) has no
float64: what needs it is computed on the exact device, which then is the host. Knows no model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from daemon.model_info import SEPARATOR, compute_devices

OUT_OF_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "MPS backend out of memory",
    "Invalid buffer size",  # of MPS, for a tensor larger than Metal allows
)


def on_cuda(device: str | torch.device) -> bool:
    """Whether it is one CUDA device; a model may have several."""
    return SEPARATOR not in str(device) and torch.device(device).type == "cuda"


def on_mps(device: str | torch.device) -> bool:
    return SEPARATOR not in str(device) and torch.device(device).type == "mps"


def best_device(dtype: torch.dtype) -> str:
    """The first of CUDA, MPS and CPU that is here and has the dtype."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() and dtype != torch.float64 else "cpu"


def exact_device(device: str) -> str:
    """Where float64 is computed: on the device itself, but for MPS."""
    return "cpu" if on_mps(device) else device


def to_device(values: npt.NDArray[np.integer[Any]] | Tensor, device: str | torch.device) -> Tensor:
    """On the device; arrays to CUDA by pinned memory, so that the host goes on while they are copied."""
    if isinstance(values, Tensor):
        return values.to(device)
    on_host = torch.from_numpy(values)
    if on_cuda(device):
        return on_host.pin_memory().to(device, non_blocking=True)
    return on_host.to(device)


def to_host(values: Tensor) -> Tensor:
    """On the CPU; from CUDA by pinned memory, which torch keeps for later copies."""
    if values.device.type != "cuda":
        return values.cpu()
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)


def to_numpy(values: Tensor) -> npt.NDArray[Any]:
    """`to_host`, as an array."""
    array: npt.NDArray[Any] = to_host(values).numpy()
    return array


def to_exact(values: Tensor) -> Tensor:
    """Where float64 is computed: the tensor itself, but for MPS."""
    return values.cpu() if values.device.type == "mps" else values


@contextlib.contextmanager
def on_exact_device(module: nn.Module, device: str) -> Iterator[None]:
    """Within it a module of this device is on the exact one."""
    exact = exact_device(device)
    if exact != device:
        module.to(exact)
    try:
        yield
    finally:
        if exact != device:
            module.to(device)


def finish(device: str) -> None:
    """Wait for the operations that this thread started: of its streams on CUDA, of all on MPS."""
    for one in compute_devices(device):
        if on_cuda(one):
            torch.cuda.current_stream(one).synchronize()
        elif on_mps(one):
            torch.mps.synchronize()


def device_bytes(device: str) -> dict[str, int]:
    """By kind, accelerators' memory: of torch's tensors, of all that torch holds, all that there is.

    Empty for the CPU. Of MPS, whose memory is the host's, the last is what Metal recommends to stay below.
    """
    devices = compute_devices(device)
    if on_cuda(devices[0]):
        return {
            "allocated": sum(map(torch.cuda.memory_allocated, devices)),
            "reserved": sum(map(torch.cuda.memory_reserved, devices)),
            "total": sum(torch.cuda.get_device_properties(one).total_memory for one in devices),
        }
    if on_mps(device):
        return {
            "allocated": torch.mps.current_allocated_memory(),
            "reserved": torch.mps.driver_allocated_memory(),
            "total": torch.mps.recommended_max_memory(),
        }
    return {}


def release_memory() -> None:
    """Give what torch keeps of accelerators' memory back to them."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether an error says that memory ran out; torch has a type of its own for that on CUDA only."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in OUT_OF_MEMORY)

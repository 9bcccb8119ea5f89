"""Starts work on a device without waiting for it, and overlaps it with the next batch's. Knows no model.

On CUDA the host only starts a forward pass; its results are encoded and analysed on a stream of their own,
beside the next batch's forward pass. On MPS, and over several devices, the host waits for each; on a CPU
every call has ended when it returns. Devices go by the name that `ModelInfo.device` has.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import torch

from daemon.devices import finish, on_cuda, on_mps
from daemon.model_info import SEPARATOR


class Launch:
    """The operations started between entering and leaving; CUDA may run them still afterwards."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._marks: list[Any] = []  # events on CUDA, elsewhere seconds

    def __enter__(self) -> Launch:
        self._mark()
        return self

    def __exit__(self, *_: object) -> None:
        if SEPARATOR in self._device:
            finish(self._device)
        self._mark()

    def _mark(self) -> None:
        if not on_cuda(self._device):
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def seconds(self) -> float:
        """The seconds that they took. Waits for their end."""
        began, ended = self._marks
        if on_mps(self._device):
            finish(self._device)
            return time.perf_counter() - float(began)
        if not on_cuda(self._device):
            return float(ended - began)
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Run operations after these, beside those launched since. Waits for their end on leaving."""
        if not on_cuda(self._device):
            yield
            return
        stream = beside(self._device)
        stream.wait_event(self._marks[-1])
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            stream.synchronize()  # what it read may be freed from here on


@functools.cache
def beside(device: str) -> Any:
    """A CUDA stream whose small kernels go before those of the forward pass that it runs beside."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

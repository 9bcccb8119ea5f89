"""`daemon.analysis.kernels` by Triton's interpreter, in a process of its own.

The part of Triton that is written in Triton is interpreted only where TRITON_INTERPRET was set before the
first import of it, and SAELens imports it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor


class InterpretedKernels:
    """The functions of the module, on tensors of the CPU."""

    def __init__(self, process: ProcessPoolExecutor) -> None:
        self._process = process

    def centred(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._call("centred", *tensors)

    def weighted_sums(self, *tensors: Tensor) -> Tensor:
        (sums,) = self._call("weighted_sums", *tensors)
        return sums

    def eigen_on_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._call("eigen_on_device", *tensors)

    def _call(self, name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        arrays = [one.numpy() for one in tensors]
        return tuple(map(torch.from_numpy, self._process.submit(call, name, arrays).result()))


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[InterpretedKernels]:
    new = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=new, initializer=interpret) as process:
        yield InterpretedKernels(process)


def interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.cuda.device = lambda device: contextlib.nullcontext()  # a tensor of the CPU is on none


def call(name: str, arrays: list) -> list:
    from daemon.analysis import kernels

    found = getattr(kernels, name)(*map(torch.from_numpy, arrays))
    return [one.numpy() for one in ((found,) if isinstance(found, Tensor) else found)]

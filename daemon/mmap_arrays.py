"""Arrays outside the C library's heap, whose memory goes back to the system with the last of them.

For large arrays that outlive their batch: long-lived allocations fragment the heap, which then grows. Knows
nothing about their contents.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNMENT = 64  # bytes

Like = tuple[tuple[int, ...], npt.DTypeLike]  # shape and type of an array


def zeros(*wanted: Like) -> list[npt.NDArray[Any]]:
    """Arrays in one piece of memory of their own. Raises MemoryError."""
    likes = [(shape, np.dtype(kind), int(np.prod(shape, dtype=np.int64))) for shape, kind in wanted]
    sizes = [-(-n * dtype.itemsize // ALIGNMENT) * ALIGNMENT for _, dtype, n in likes]
    try:
        room = mmap.mmap(-1, max(1, sum(sizes)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(str(error)) from None
    arrays: list[npt.NDArray[Any]] = []
    begin = 0
    for (shape, dtype, n), size in zip(likes, sizes, strict=True):
        arrays.append(np.frombuffer(room, dtype, n, begin).reshape(shape))
        begin += size
    return arrays


def copies(arrays: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Copies of arrays in one piece of memory of their own. Raises MemoryError."""
    made = zeros(*((array.shape, array.dtype) for array in arrays))
    for copy, array in zip(made, arrays, strict=True):
        copy[...] = array
    return made

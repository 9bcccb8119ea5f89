"""The memory that batches work in: asked of the system once, kept, and used again by the next batch.

On a CPU that is the C library's heap, which would else give large pieces back and have the system clear them
anew, page by page, for the next batch; on CUDA it is torch's allocator, which keeps them by itself.
Allocations before the first batch are mapped by themselves (`lasting`); arrays that outlive their batch lie
elsewhere (`daemon.mmap_arrays`). Knows nothing about the computation.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pyarrow as pa

from daemon.devices import device_bytes
from daemon.platform_calls import (
    M_ARENA_MAX,
    M_MMAP_THRESHOLD,
    M_TRIM_THRESHOLD,
    heap_info,
    resident_bytes,
    set_heap,
    trim_heap,
)

KEPT_BYTES = (1 << 31) - 1  # free memory at a heap's end, up to which none of it is given back
MAPPED_BYTES = 32 << 20  # from which on a piece is mapped by itself: the most that the C library allows
LASTING_BYTES = 64 << 10  # the same for what is to stay
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and torch's for it
KEPT_KERNELS = 768  # by oneDNN, which counts two for each shape of a product; they take half a MiB
ARENAS = 2  # heaps that all threads share: with one for each thread, memory grows for hours


def keep_memory() -> None:
    """Have the C library keep and share what it was given, where it can, and bound the kernels of oneDNN.

    Arrow's tables then come from the same heap, which has room once batches are done, not from one of
    Arrow's own (what Arrow needs besides asks its environment: see `daemon.cli.share_heap`). Best before any
    thread starts; oneDNN listens only before its first product.
    """
    pa.set_memory_pool(pa.system_memory_pool())
    for variable in KERNEL_CACHES:
        os.environ.setdefault(variable, str(KEPT_KERNELS))
    set_heap(M_ARENA_MAX, ARENAS)
    set_heap(M_MMAP_THRESHOLD, MAPPED_BYTES)
    set_heap(M_TRIM_THRESHOLD, KEPT_BYTES)


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Map each larger allocation made meanwhile by itself, for memory that stays. After `keep_memory`.

    In the heap, loading a model would leave holes between long-lived pieces, and batches would work in those.
    """
    set_heap(M_MMAP_THRESHOLD, LASTING_BYTES)
    try:
        yield
    finally:
        set_heap(M_MMAP_THRESHOLD, MAPPED_BYTES)
        trim_heap()


def memory_bytes(device: str) -> dict[str, int]:
    """By kind, the memory that bounds batches: of the process on a CPU, else of all devices."""
    if kinds := device_bytes(device):
        return kinds
    resident = resident_bytes()
    return {} if resident is None else {"resident": resident}


def pool_bytes(device: str) -> int:
    """The memory that is kept for batches on these devices, in use or free; 0 where nobody counts it."""
    if kinds := device_bytes(device):
        return kinds["reserved"]
    info = heap_info()
    return 0 if info is None else int(info.arena + info.hblkhd)

"""Runs independent pieces of CPU work side by side, each on one core.

Small batched operations gain little from threads inside each; whole pieces beside each other gain all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(function: Callable[[T], R], pieces: Iterable[T]) -> list[R]:
    """[function(piece) for each piece], on as many threads as torch uses."""
    work = list(pieces)
    threads = torch.get_num_threads()
    if threads == 1 or len(work) < 2:
        return [function(piece) for piece in work]

    inference = torch.is_inference_mode_enabled()  # each thread has a mode of its own

    def run(piece: T) -> R:
        with torch.inference_mode(inference):
            return function(piece)

    workers = pool(threads)
    torch.set_num_threads(1)  # MKL's count is one for all threads
    try:
        return list(workers.map(run, work))
    finally:
        torch.set_num_threads(threads)


@functools.lru_cache(maxsize=1)
def pool(threads: int) -> ThreadPoolExecutor:
    """Threads on which torch uses one core each."""
    executor = ThreadPoolExecutor(threads, thread_name_prefix="analysis")
    everyone = Barrier(threads)

    def start(_: int) -> None:
        torch.set_num_threads(1)
        everyone.wait()

    list(executor.map(start, range(threads)))
    return executor

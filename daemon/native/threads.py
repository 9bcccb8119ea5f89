"""Runs independent pieces of CPU work side by side, each on a core of its own.

Small batched operations gain little from threads inside each; whole pieces beside each other gain all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Barrier
from typing import TypeVar

import torch

PIECES = 4  # of the work for each thread, so that none waits long for the last

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(function: Callable[[T], R], pieces: Iterable[T]) -> list[R]:
    """[function(piece) for each piece], on as many threads as torch uses, which use one core each.

    After an error it begins no more pieces, and raises the error once those under way have ended.
    """
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
        calls = [workers.submit(run, piece) for piece in work]
        wait(calls, return_when=FIRST_EXCEPTION)
        for call in calls:
            call.cancel()  # does nothing to what has begun
        wait(calls)
        return [call.result() for call in calls]
    finally:
        torch.set_num_threads(threads)


def one_thread_each(function: Callable[[T], R], pieces: Iterable[T]) -> list[R]:
    """`side_by_side`, where a single piece has one thread too."""
    work = list(pieces)
    threads = torch.get_num_threads()
    if threads == 1 or len(work) != 1:
        return side_by_side(function, work)
    torch.set_num_threads(1)
    try:
        return [function(work[0])]
    finally:
        torch.set_num_threads(threads)


def in_ranges(function: Callable[[int, int], R], n: int, step: int) -> list[R]:
    """[function(first, last)] of ranges of n, cut at multiples of `step`, on the threads that torch uses."""
    threads = torch.get_num_threads()
    if threads == 1:
        return [function(0, n)]
    size = max(step, -(-n // (PIECES * threads * step)) * step)
    return side_by_side(lambda piece: function(*piece), itertools.pairwise([*range(0, n, size), n]))


@functools.cache
def pool(workers: int) -> ThreadPoolExecutor:
    """Threads that wait for work, on which torch uses one core each."""
    executor = ThreadPoolExecutor(workers, thread_name_prefix="core")
    everyone = Barrier(workers)

    def start(_: int) -> None:
        torch.get_num_threads()  # the first time, a thread takes over the number that another set last
        torch.set_num_threads(1)
        everyone.wait()

    list(executor.map(start, range(workers)))
    return executor

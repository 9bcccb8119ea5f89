"""Runs independent pieces of CPU work side by side, each on a core of its own or on a few.

Small batched operations gain little from threads inside each; whole pieces beside each other gain all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Barrier, Lock, local
from typing import TypeVar

import torch

PIECES = 4  # of the work for each thread, so that none waits long for the last

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(function: Callable[[T], R], pieces: Iterable[T], threads_each: int = 1) -> list[R]:
    """[function(piece) for each piece], on as many threads as torch uses, or on fewer with several each.

    After an error no more is begun; it is raised once what was under way has ended.
    """
    work = list(pieces)
    threads = torch.get_num_threads()
    if threads <= threads_each or len(work) < 2:
        return [function(piece) for piece in work]

    inference = torch.is_inference_mode_enabled()  # each thread has a mode of its own

    def run(piece: T) -> R:
        with torch.inference_mode(inference):
            return function(piece)

    workers = own.pools.get(threads // threads_each, threads_each)
    torch.set_num_threads(threads_each)  # MKL's count is one for all threads
    try:
        calls = [workers.submit(run, piece) for piece in work]
        wait(calls, return_when=FIRST_EXCEPTION)
        for call in calls:
            call.cancel()  # does nothing to what has begun
        wait(calls)
        return [call.result() for call in calls]
    finally:
        torch.set_num_threads(threads)


def in_ranges(function: Callable[[int, int], R], n: int, step: int) -> list[R]:
    """[function(first, last)] of ranges of n, cut at multiples of `step`, on the threads that torch uses."""
    threads = torch.get_num_threads()
    if threads == 1:
        return [function(0, n)]
    size = max(step, -(-n // (PIECES * threads * step)) * step)
    return side_by_side(lambda piece: function(*piece), itertools.pairwise([*range(0, n, size), n]))


class Pools:
    """Threads that wait for work, by how many they are and how many cores each is to use."""

    def __init__(self) -> None:
        self._by_size: dict[tuple[int, int], ThreadPoolExecutor] = {}
        self._making = Lock()

    def get(self, workers: int, threads_each: int) -> ThreadPoolExecutor:
        size = workers, threads_each
        with self._making:
            if size not in self._by_size:
                self._by_size[size] = new_pool(*size)
            return self._by_size[size]


class Own(local):
    """What each thread has: all the same pools, but those in a pool, which have their own.

    Pieces that use several cores each would else wait for one another's.
    """

    pools = Pools()


own = Own()


def new_pool(workers: int, threads_each: int) -> ThreadPoolExecutor:
    """Threads on which torch uses so many cores each."""
    executor = ThreadPoolExecutor(workers, thread_name_prefix="core")
    everyone = Barrier(workers)

    def start(_: int) -> None:
        own.pools = Pools()
        torch.get_num_threads()  # the first time, a thread takes over what any other set last
        torch.set_num_threads(threads_each)
        everyone.wait()

    list(executor.map(start, range(workers)))
    return executor

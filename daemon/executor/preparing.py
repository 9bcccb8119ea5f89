"""Makes ready what later batches use, piece by piece between batches, so that the first need not wait for it.

Knows neither what is prepared nor batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence

from daemon.executor.device_thread import DeviceThread
from daemon.model.buffers import lasting
from daemon.native.threads import side_by_side

MAX_SECONDS = 5.0  # of all pieces: a second does for those of a small model
PIECES = 2  # at a time, side by side: a batch that comes waits for these

Pieces = Sequence[Callable[[], None]]


@contextlib.asynccontextmanager
async def preparing(device: DeviceThread, pieces: Pieces) -> AsyncIterator[None]:
    """Within it the pieces are run on the device thread, after whatever was asked of it before each."""
    task = asyncio.create_task(prepare(device, pieces))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def prepare(device: DeviceThread, pieces: Pieces) -> None:
    left = MAX_SECONDS
    for first in range(0, len(pieces), PIECES):
        some = pieces[first : first + PIECES]
        left -= await device.call(lambda some=some: seconds_of(some))  # type: ignore[misc]
        if left <= 0:
            return


def prepare_all(pieces: Pieces) -> None:
    """Run the pieces before anything else, on the device thread."""
    left = MAX_SECONDS
    for first in range(0, len(pieces), PIECES):
        left -= seconds_of(pieces[first : first + PIECES])
        if left <= 0:
            return


def seconds_of(pieces: Pieces) -> float:
    """Run a few pieces, and return how long that took."""
    began = time.perf_counter()
    with lasting():
        side_by_side(lambda piece: piece(), pieces)
    return time.perf_counter() - began

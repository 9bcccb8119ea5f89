"""A bounded queue between two stages, measured in what it holds rather than in items.

Knows nothing about what passes through it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class EndOfStream(Exception):
    """The sender closed the channel and everything in it was taken."""


class Channel(Generic[T]):
    """First in, first out, for one sender and one receiver on one event loop.

    `capacity` is the total weight held (tokens, bytes) before `put` waits. An item that alone is heavier
    still passes, once the channel is empty. The sender calls `close` on normal return only: a stage that
    crashes must not look like one that came to its end.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.weight = 0
        self._items: deque[tuple[T, int]] = deque()
        self._closed = False
        self._waiting: list[asyncio.Future[None]] = []  # for any change

    def __len__(self) -> int:
        return len(self._items)

    async def put(self, item: T, weight: int = 1) -> None:
        """Add an item, after waiting for room."""
        await self.put_all([(item, weight)])

    async def put_all(self, items: Iterable[tuple[T, int]]) -> None:
        """Add items with their weights, each after waiting for room."""
        for item, weight in items:
            if self._items and self.weight + weight > self.capacity:
                self._wake()  # once: senders that wait too would wake each other for ever
            while self._items and self.weight + weight > self.capacity:
                await self._change()
            self._items.append((item, weight))
            self.weight += weight
        self._wake()

    async def close(self) -> None:
        """Mark the end of the stream."""
        self._closed = True
        self._wake()

    async def get(self) -> T:
        """Take the oldest item, waiting for one. Raises EndOfStream at the end."""
        await self.wait()
        if not self._items:
            raise EndOfStream
        return self._take()

    def get_nowait(self) -> T | None:
        """Take the oldest item if there is one. Raises EndOfStream at the end."""
        if self.ended:
            raise EndOfStream
        return self._take() if self._items else None

    @property
    def ended(self) -> bool:
        """Whether the sender closed the channel and everything in it was taken."""
        return self._closed and not self._items

    async def batches(
        self, enough: Callable[[], int] = lambda: 1, wait_seconds: float = 0.0
    ) -> AsyncIterator[list[T]]:
        """Everything that is there, as often as there is something, until the end.

        Waits a moment for company where that is fewer than `enough` items, and more can come.
        """
        while True:
            await self.wait()
            if not self._items:
                return
            if len(self._items) < enough():
                await self._company(enough, wait_seconds)
            yield self._take_all()

    async def wait(self) -> None:
        """Wait until there is an item, or the end."""
        while not self._items and not self._closed:
            await self._change()

    async def _company(self, enough: Callable[[], int], wait_seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_seconds):
                while len(self._items) < enough() and self.weight < self.capacity and not self._closed:
                    await self._change()

    async def _change(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        await waiter

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():  # cancelled
                waiter.set_result(None)

    def __aiter__(self) -> Channel[T]:
        return self

    async def __anext__(self) -> T:
        try:
            return await self.get()
        except EndOfStream:
            raise StopAsyncIteration from None

    def _take_all(self) -> list[T]:
        taken = [item for item, _ in self._items]
        self._items.clear()
        self.weight = 0
        self._wake()
        return taken

    def _take(self) -> T:
        item, weight = self._items.popleft()
        self.weight -= weight
        self._wake()
        return item

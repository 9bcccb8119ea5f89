"""The one thread that owns the device, behind an async face.

Models, SAEs and every tensor stay on that thread; only NumPy arrays leave it. Knows no batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

import torch

from daemon.devices import is_out_of_memory, release_memory
from daemon.errors import OutOfMemory
from daemon.platform_calls import thread_lives

R = TypeVar("R")
THREAD_CLOCKS = hasattr(time, "pthread_getcpuclockid")


class DeviceThread:
    """Runs blocking calls one at a time on one thread, and says since when it has been at it.

    `last_progress` is the clock's reading when the last call ended.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None  # from the first call on
        self._closed = False
        self._cpu_seconds = 0.0  # as of the last look
        # Seconds in calls that ended, and since when in this one: together, for others look at both.
        self._busy: tuple[float, float | None] = (0.0, None)
        self.last_progress = clock()

    @property
    def alive(self) -> bool:
        """False once the thread died, and with it whatever was or will be asked of it."""
        return self._thread is None or self._closed or runs(self._thread)

    @property
    def busy_since(self) -> float | None:
        """The clock's reading at the start of the current call, None while idle."""
        return self._busy[1]

    @property
    def busy_seconds(self) -> float:
        """How long it has worked, up to now."""
        seconds, since = self._busy
        return seconds if since is None else seconds + self._clock() - since

    @property
    def cpu_seconds(self) -> float:
        """Processor time of the thread, up to now; 0 where the system does not tell that of one thread."""
        thread = self._thread
        if thread is not None and thread.ident is not None and THREAD_CLOCKS and runs(thread):
            with contextlib.suppress(OSError):  # it ended meanwhile
                self._cpu_seconds = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        return self._cpu_seconds

    @property
    def has_waiting_calls(self) -> bool:
        """Whether something else is to run after the current call."""
        return not self._calls.empty()

    async def call(self, function: Callable[[], R]) -> R:
        """Run `function()` on the device thread. Raises OutOfMemory where its memory is too small.

        Never returns where the thread dies: see `alive`.
        """
        if self._thread is None:
            # A daemon, so that a thread that died without Python knowing does not keep the process.
            self._thread = threading.Thread(target=self._work, name="device", daemon=True)
            self._thread.start()
        future: Future[R] = Future()
        self._calls.put(lambda: self._answer(future, function))
        return await asyncio.wrap_future(future)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # it holds the result

    def _answer(self, future: Future[R], function: Callable[[], R]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = self._timed(function)
        except BaseException as error:
            future.set_exception(error)
            del future  # it holds the error, whose traceback holds this frame
        else:
            future.set_result(result)

    def _timed(self, function: Callable[[], R]) -> R:
        seconds, began = self._busy[0], self._clock()
        self._busy = seconds, began
        try:
            with torch.inference_mode(), telling_out_of_memory():  # inference mode is thread-local
                return function()
        finally:
            self.last_progress = self._clock()
            self._busy = seconds + self.last_progress - began, None

    def close(self) -> None:
        """Wait for the current call and end the thread."""
        self._calls.put(None)
        if self._thread is not None and runs(self._thread):
            self._thread.join()
        self._closed = True


def runs(thread: threading.Thread) -> bool:
    """Whether a thread that was started lives, by Python's word and by the kernel's, where it has one."""
    return thread.is_alive() and thread_lives(thread.native_id)


@contextlib.contextmanager
def telling_out_of_memory() -> Iterator[None]:
    """Raise OutOfMemory for an error that says so, whatever its type; free what torch keeps of the device."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        release_memory()
        raise OutOfMemory(str(error).partition("\n")[0]) from None

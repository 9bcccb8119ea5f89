"""Hooks inside a daemon that is made to stall or to lose a thread; named by `Job.hook`."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from unittest import mock

from daemon import service, supervisor
from daemon.executor import preparing
from daemon.observe import health
from daemon.records import Batch
from tests.reliability.hooks import before_each_batch, bound_by_modes, gated

BEAT_SECONDS = 0.05
STALE_SECONDS = 0.5
SYS_EXIT = {"x86_64": 60, "aarch64": 93}.get(platform.machine())  # <asm/unistd.h>: of one thread


@contextlib.contextmanager
def quick(dead_seconds: float = 3600.0) -> Iterator[None]:
    """A hook: looks come often; a daemon without its device stays for `dead_seconds`."""
    with (
        mock.patch.object(supervisor, "LOOK_SECONDS", BEAT_SECONDS),
        mock.patch.object(supervisor, "COUNT_SECONDS", BEAT_SECONDS),
        mock.patch.object(supervisor, "DEVICE_DEAD_SECONDS", dead_seconds),
    ):
        yield


@contextlib.contextmanager
def quick_bound_by_modes() -> Iterator[None]:
    """A hook: `quick` and `bound_by_modes`."""
    with bound_by_modes(), quick():
        yield


@contextlib.contextmanager
def stalling_loop(stall: str) -> Iterator[None]:
    """A hook: while the file `stall` is there the event loop stands still."""
    look = supervisor.Supervisor.look

    def stall_and_look(self: supervisor.Supervisor) -> None:
        while Path(stall).exists():
            time.sleep(0.01)
        look(self)

    with (
        quick(),
        mock.patch.object(supervisor, "HEARTBEAT_STALE_SECONDS", STALE_SECONDS),
        mock.patch.object(health, "HEARTBEAT_STALE_SECONDS", STALE_SECONDS),
        mock.patch.object(supervisor.Supervisor, "look", stall_and_look),
    ):
        yield


@contextlib.contextmanager
def stuck_device(go: str) -> Iterator[None]:
    """A hook: the device's first call takes until the file `go` is there."""
    with quick(), gated(f"{go}.reached", go):
        yield


@contextlib.contextmanager
def slow_loading(go: str) -> Iterator[None]:
    """A hook: loading takes until the file `go` is there."""
    loaded = service.Service.loaded

    def wait() -> None:
        while not Path(go).exists():
            time.sleep(0.01)

    @contextlib.asynccontextmanager
    async def wait_and_load(self: service.Service) -> AsyncIterator[object]:
        await self.device.call(wait)
        async with loaded(self) as now:
            yield now

    with quick(), mock.patch.object(service.Service, "loaded", wait_and_load):
        yield


@contextlib.contextmanager
def dying_idle(die: str, dead_seconds: float) -> Iterator[None]:
    """A hook: once the file `die` is there the device thread, which must be idle, gets an exception.

    Then the file `die.told` is there.
    """

    def watch() -> None:
        threads: list[threading.Thread] = []
        while not (threads and Path(die).exists()):
            time.sleep(0.01)
            threads = [thread for thread in threading.enumerate() if thread.name == "device"]
        (thread,) = threads
        set_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc
        set_exception(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        Path(f"{die}.told").touch()

    async def nothing(*_: object) -> None:
        """In place of what would keep the thread busy for a while after the start."""

    with quick(dead_seconds), mock.patch.object(preparing, "prepare", nothing):
        threading.Thread(target=watch, daemon=True).start()
        yield


@contextlib.contextmanager
def dying_in_a_call(dead_seconds: float) -> Iterator[None]:
    """A hook: the kernel ends the device thread in its first batch, and Python is not told."""

    def die(_: Batch) -> None:
        ctypes.CDLL(None).syscall(SYS_EXIT, 0)

    with quick(dead_seconds), before_each_batch(die):
        yield

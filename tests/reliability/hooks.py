"""Hooks inside a daemon under test: each is a context manager that `Job.hook` names."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from unittest import mock

from daemon.executor.runner import BatchRunner
from daemon.fs import durable
from daemon.records import Batch, BatchResult

PATIENCE_SECONDS = 5  # of a daemon that is to kill itself at some step
LINUX_CAPABILITY_VERSION_3 = 0x20080522  # <linux/capability.h>
CODE_OWNER = Path(__file__).stat().st_uid if os.geteuid() == 0 else os.geteuid()  # who can read the code


@contextlib.contextmanager
def dying_at(step: int) -> Iterator[None]:
    """A hook: the process kills itself just before its `step`-th operation on disk.

    Where it comes to no such step it dies anyway, by SIGALRM, after some seconds.
    """
    left = step

    def observe(_: durable.Operation) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    signal.alarm(PATIENCE_SECONDS)
    with durable.watch_operations(observe):
        yield


@contextlib.contextmanager
def poisoned(prefix: str) -> Iterator[None]:
    """A hook: a batch with a sample whose id starts so kills the process."""

    def before(batch: Batch) -> None:
        if any(entry.sample.sample_id.startswith(prefix) for entry in batch.samples):
            os.kill(os.getpid(), signal.SIGKILL)

    with before_each_batch(before):
        yield


@contextlib.contextmanager
def gated(reached: str, go: str) -> Iterator[None]:
    """A hook: the device makes the file `reached`, then waits for the file `go` before it works."""

    def before(_: Batch) -> None:
        Path(reached).touch()
        while not Path(go).exists():
            time.sleep(0.01)

    with before_each_batch(before):
        yield


@contextlib.contextmanager
def blind_watcher() -> Iterator[None]:
    """A hook: the folder's watcher works and reports nothing."""

    async def nothing(*_: object, stop_event: asyncio.Event, **options: object) -> AsyncIterator[None]:
        await stop_event.wait()
        for _ in ():
            yield

    with mock.patch("watchfiles.awatch", nothing):
        yield


@contextlib.contextmanager
def limited_files(size: int) -> Iterator[None]:
    """A hook: the process may write no file of more bytes than that, as under `ulimit -f`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    yield


@contextlib.contextmanager
def another_user(user: int) -> Iterator[None]:
    """A hook: from here on the process is a user without rights, which only root may become."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    yield


@contextlib.contextmanager
def bound_by_modes() -> Iterator[None]:
    """A hook: from here on the process is `CODE_OWNER`, whom modes bind even where that is root.

    Of one thread, and so of those that it starts; the group stays.
    """
    if os.geteuid() == 0:
        os.setgroups([])
        os.setuid(CODE_OWNER)
        header = struct.pack("=Ii", LINUX_CAPABILITY_VERSION_3, 0)
        if ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)) != 0:  # 2 x 3 sets, all empty
            raise OSError(ctypes.get_errno(), "capset")
    yield


@contextlib.contextmanager
def before_each_batch(before: Callable[[Batch], None]) -> Iterator[None]:
    run = BatchRunner.run

    def call(study: BatchRunner, batch: Batch) -> BatchResult:
        before(batch)
        return run(study, batch)

    with mock.patch.object(BatchRunner, "run", call):
        yield

"""Hooks inside a daemon whose messages to the service manager a test reads; named by `Job.hook`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from daemon import supervisor
from tests.reliability.hooks import gated

BEAT_SECONDS = 0.05


@contextlib.contextmanager
def quick_supervisor() -> Iterator[None]:
    """A hook: looks come often."""
    with mock.patch.object(supervisor, "LOOK_SECONDS", BEAT_SECONDS):
        yield


@contextlib.contextmanager
def hanging_device(reached: str, go: str) -> Iterator[None]:
    """A hook: the device hangs in its first call, having made `reached`, until `go` is there."""
    with quick_supervisor(), gated(reached, go):
        yield


@contextlib.contextmanager
def stalling_loop(stall: str, reached: str) -> Iterator[None]:
    """A hook: while the file `stall` is there the event loop stands still, having made `reached`."""
    look = supervisor.Supervisor.look

    def stall_and_look(self: supervisor.Supervisor) -> None:
        while Path(stall).exists():
            Path(reached).touch()
            time.sleep(0.01)
        look(self)

    with quick_supervisor(), mock.patch.object(supervisor.Supervisor, "look", stall_and_look):
        yield

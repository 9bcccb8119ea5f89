"""What runs inside a daemon whose talk with the service manager is listened to; named by `Job.hook`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from daemon import heart
from tests.reliability.hooks import gated

BEAT_SECONDS = 0.05


@contextlib.contextmanager
def quick_heart() -> Iterator[None]:
    """A hook: heartbeats come often."""
    with mock.patch.object(heart, "HEARTBEAT_SECONDS", BEAT_SECONDS):
        yield


@contextlib.contextmanager
def hanging_device(reached: str, go: str) -> Iterator[None]:
    """A hook: the device hangs in its first call, having made `reached`, until `go` is there."""
    with quick_heart(), gated(reached, go):
        yield


@contextlib.contextmanager
def stalling_loop(stall: str, reached: str) -> Iterator[None]:
    """A hook: while the file `stall` is there the event loop stands still, having made `reached`."""
    sample = heart.Heart.sample

    def stall_and_sample(self: heart.Heart) -> None:
        while Path(stall).exists():
            Path(reached).touch()
            time.sleep(0.01)
        sample(self)

    with quick_heart(), mock.patch.object(heart.Heart, "sample", stall_and_sample):
        yield

"""Troubles inside a daemon under test: context managers that `Job.hook` names."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from prometheus_client import CollectorRegistry, generate_latest

from daemon import service
from daemon.fs import durable
from daemon.observe.metrics import Metrics
from daemon.records import Batch
from tests.reliability.hooks import before_each_batch

FITTING_SAMPLES = 5


@contextlib.contextmanager
def troubled(bad_disk: str, last_words: str) -> Iterator[None]:
    """A small device, one claim refused, and no fsync while the file `bad_disk` exists.

    At the end of the process its metrics go to `last_words`.
    """
    registry = CollectorRegistry()
    refused = False

    def small_device(batch: Batch) -> None:
        if len(batch.samples) > FITTING_SAMPLES:
            raise MemoryError

    def disk(operation: durable.Operation) -> None:
        nonlocal refused
        if operation.name == "rename" and not refused:
            refused = True
            raise OSError(errno.ENOSPC, "refused once", str(operation.path))
        if operation.name.startswith("fsync") and Path(bad_disk).exists():
            raise OSError(errno.EIO, "bad disk", str(operation.path))

    with (
        mock.patch.object(service, "Metrics", lambda _: Metrics(registry)),
        before_each_batch(small_device),
        durable.watch_operations(disk),
    ):
        try:
            yield
        finally:
            Path(last_words).write_bytes(generate_latest(registry))

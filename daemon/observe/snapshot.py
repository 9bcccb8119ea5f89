"""One moment of the daemon, as the supervisor sees it. Plain values, gathered by the service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from daemon.observe.workload import Workload
from daemon.records import InboxLoad, Queued, WorkerLoad


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment of the daemon, for whoever watches it."""

    device_alive: bool
    device_busy_seconds: float  # that the device worked since the start
    coordinator_seconds: float  # processor time of the process, without that of its device thread
    done: int  # samples, of `total` read so far
    total: int
    rate: float  # samples a second
    inbox: InboxLoad | None = None  # of its owner's last look
    recovered: int = 0  # files taken over from dead processes since the last snapshot
    found: int = 0  # files first seen by a look that nothing asked for, since the last snapshot
    queued: Queued | None = None  # None while no pipeline runs
    slots: int = 0  # batches that the executor takes at a time
    batches_in_flight: int = 0  # that it has
    workers_wanted: int = 0  # beside this process
    workers: Sequence[WorkerLoad] = ()  # that there are
    workload: Workload | None = None
    memory_bytes: Mapping[str, int] = field(default_factory=dict)  # by kind
    pool_bytes: int = 0

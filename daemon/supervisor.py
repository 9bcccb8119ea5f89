"""Looks once a second at everything that can go wrong, and tells metrics, readiness, log, page and manager.

Is given snapshots of the daemon; knows neither how a run starts nor how it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import Protocol

import structlog

from daemon.errors import MachineError
from daemon.machine import Machine
from daemon.observe.board import StatusBoard
from daemon.observe.health import DEVICE, DRAINING, EVENT_LOOP, HEARTBEAT_STALE_SECONDS, LOADING, Health
from daemon.observe.metrics import Metrics
from daemon.observe.notify import Notify, status_line
from daemon.observe.snapshot import Snapshot
from daemon.records import PAUSE_REASONS, InboxLoad

LOOK_SECONDS = 1.0
COUNT_SECONDS = 10.0  # between two counts of the inbox
EXTEND_SECONDS = 30.0  # asked of the service manager at each look during a drain
DEVICE_DEAD_SECONDS = 60.0  # that a daemon without its device thread stays, for monitoring to see

log = structlog.get_logger()


class Daemon(Protocol):
    """The daemon, as the supervisor sees it."""

    def snapshot(self) -> Snapshot:
        """Describe this moment, without blocking."""

    def count_waiting(self) -> InboxLoad:
        """Count what waits in the inbox. Blocks; raises OSError."""

    def end(self, error: BaseException) -> None:
        """End the run with this error."""


class Supervisor:
    """Looks and tells while `watch_daemon` and `watch_machine` run."""

    def __init__(
        self,
        daemon: Daemon,
        *,
        health: Health,
        machine: Machine,
        metrics: Metrics,
        board: StatusBoard,
        notify: Notify,
    ) -> None:
        self._daemon = daemon
        self._health = health
        self._machine = machine
        self._metrics = metrics
        self._board = board
        self._notify = notify
        self._load: InboxLoad | None = None  # what waits in the inbox, as last counted by anyone
        self._load_of_inbox: InboxLoad | None = None  # as last counted by whoever claims from it
        self._counted_at = float("-inf")
        self._paused: set[str] = set()  # reasons that were told
        self._device_stalled = False  # and told
        self._device_died_at: float | None = None
        for loop in (EVENT_LOOP, DEVICE):
            metrics.heartbeat_timestamp_seconds.labels(loop).set_function(partial(self._last_seen, loop))

    async def watch_daemon(self) -> None:
        """Look, on the event loop, so that a silence of this task means a stalled loop."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_SECONDS)

    def look(self) -> None:
        """Take one snapshot and tell everyone."""
        silence = self._health.beat()
        self._machine.see_unanswered()
        snapshot = self._daemon.snapshot()
        self._check_loops(silence, snapshot)
        self._tell_pause()
        if snapshot.inbox is not None and snapshot.inbox is not self._load_of_inbox:
            self._load_of_inbox = snapshot.inbox
            self._take_load(snapshot.inbox)
        self._metrics.observe_snapshot(snapshot, self._load, time.monotonic())
        self._board.look(
            self._load, snapshot.workload, ready=not self._health.unmet(), workers=snapshot.workers
        )
        self._tell_manager(snapshot)

    async def watch_machine(self) -> None:
        """Look at folders and disk in a thread, since a disk or network that is gone does not answer."""
        while True:
            await asyncio.to_thread(self._machine.look)
            self._tell_pause()
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self._metrics.observe_disk, self._machine.folders)
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self._count_waiting)
            await asyncio.sleep(LOOK_SECONDS)

    def _count_waiting(self) -> None:
        """Count the inbox where nobody else did lately: in a pause, or while the queues are full."""
        if time.monotonic() - self._counted_at >= COUNT_SECONDS:
            self._take_load(self._daemon.count_waiting())

    def _take_load(self, load: InboxLoad) -> None:
        self._counted_at = time.monotonic()
        self._load = load

    def _last_seen(self, loop: str) -> float:
        """When a loop last showed progress, in Unix time."""
        return time.time() - self._health.silence_seconds(loop)

    def _check_loops(self, silence: float, snapshot: Snapshot) -> None:
        """Log what stalls, and what did: an event loop that stalled can tell only afterwards.

        A device thread that died does not come back: the run ends, once monitoring had time to see it.
        """
        if silence > HEARTBEAT_STALE_SECONDS:
            log.error("service.stalled", loop=EVENT_LOOP, seconds=round(silence, 1), over=True)
        stalled = self._health.stalled()
        if stalled and not self._device_stalled:
            log.error("service.stalled", loop=DEVICE, message="; ".join(stalled))
        elif self._device_stalled and not stalled:
            log.info("service.recovered", loop=DEVICE)
        self._device_stalled = bool(stalled)
        if snapshot.device_alive:
            return
        self._device_died_at = self._device_died_at or time.monotonic()
        if time.monotonic() - self._device_died_at >= DEVICE_DEAD_SECONDS:
            died = "the device thread died: unfinished files were put back into the inbox"
            self._daemon.end(MachineError(died))

    def _tell_pause(self) -> None:
        """Tell why claiming pauses, in metrics, readiness and log."""
        reasons = self._machine.reasons
        self._health.pause(reasons.values())
        for reason in PAUSE_REASONS:
            self._metrics.paused.labels(reason).set(reason in reasons)
        for reason in reasons.keys() - self._paused:
            log.warning("service.paused", reason=reason, message=reasons[reason])
        for reason in self._paused - reasons.keys():
            log.info("service.resumed", reason=reason)
        self._paused = set(reasons)

    def _tell_manager(self, snapshot: Snapshot) -> None:
        """Feed the service manager's watchdog while everything makes progress, and describe the daemon.

        A drain, or a wait for the folders, may take as long as it makes progress; loading may not.
        """
        stalled, unmet = self._health.stalled(), self._health.unmet()
        if not stalled:
            self._notify.alive()
            if LOADING not in unmet and (DRAINING in unmet or snapshot.queued is None):
                self._notify.extend(EXTEND_SECONDS)
        load = self._load
        self._notify.status(
            status_line(
                "; ".join(stalled or unmet) or "running",
                files=load.files if load else 0,
                oldest_seconds=load.oldest_seconds(time.time()) if load else 0.0,
                done=snapshot.done,
                total=snapshot.total,
                rate=snapshot.rate,
            )
        )

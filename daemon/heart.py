"""The heartbeat: once a second a look at all that can go wrong, told in metrics, readiness, log and page.

Knows what is healthy and who is to hear of what is not; neither how a run starts nor how it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import structlog

from daemon.compute.buffers import memory_bytes, pool_bytes
from daemon.compute.device import Device
from daemon.errors import MachineError
from daemon.intake.inbox import Inbox
from daemon.intake.inputs import InputNames
from daemon.intake.scan import InboxLoad, count_waiting
from daemon.machine import Machine
from daemon.observe.board import DRAINING, PAUSED, StatusBoard
from daemon.observe.health import DEVICE, EVENT_LOOP, HEARTBEAT_STALE_SECONDS, LOADING, Health
from daemon.observe.metrics import Metrics
from daemon.observe.notify import Notify, status_line
from daemon.observe.progress import Progress
from daemon.pause import REASONS, Pause
from daemon.pipeline import Pipeline

HEARTBEAT_SECONDS = 1.0
COUNT_SECONDS = 10.0  # between two counts of the inbox
EXTEND_SECONDS = 30.0  # asked of the service manager at each heartbeat of a drain
DEVICE_DEAD_SECONDS = 60.0  # that a daemon without its device thread stays, for monitoring to see

log = structlog.get_logger()


class Heart:
    """Beats within `beating`; looks at what it was given, and at inbox and pipeline once they are there."""

    def __init__(
        self,
        *,
        folders: dict[str, Path],
        device: Device,
        health: Health,
        machine: Machine,
        pause: Pause,
        metrics: Metrics,
        progress: Progress,
        board: StatusBoard,
        notify: Notify,
        end: Callable[[BaseException], None],
    ) -> None:
        """`folders` are the inbox and the outbox by their role; `end` ends the run with an error."""
        self.folders = folders
        self.device = device
        self.health = health
        self.machine = machine
        self.pause = pause
        self.metrics = metrics
        self.progress = progress
        self.board = board
        self.notify = notify
        self.end = end
        self.names: InputNames | None = None  # what of the inbox is counted; None: by the built-in ones
        self.inbox: Inbox | None = None
        self.pipeline: Pipeline | None = None
        self.load: InboxLoad | None = None  # what waits in the inbox, as last counted by anyone
        self._inbox_load: InboxLoad | None = None  # what the inbox counted at its last look
        self._counted_at = float("-inf")
        self._paused: set[str] = set()  # reasons that were told
        self._device_stalled = False  # and told
        self._device_died_at: float | None = None
        for loop in (EVENT_LOOP, DEVICE):
            metrics.heartbeat_timestamp_seconds.labels(loop).set_function(partial(self.last_seen, loop))

    @contextlib.asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(work()) for work in (self.watch_machine, self.beat)]
        for task in tasks:
            task.add_done_callback(self.see_end)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def see_end(self, task: asyncio.Task[None]) -> None:
        """A background task ended: a bug, unless it was told to."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.end(error)

    async def beat(self) -> None:
        """On the event loop: whatever stalls it is seen by the silence of this."""
        while True:
            self.check_loops(self.health.beat())
            self.machine.see_unanswered()
            self.tell_pause()
            self.tell_manager()
            self.sample()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def watch_machine(self) -> None:
        """Look at folders and disk, which may take its time: a disk that is gone answers nothing."""
        while True:
            await asyncio.to_thread(self.machine.look)
            self.tell_pause()
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self.metrics.observe_disk, self.folders)
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self.count_inbox)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    def count_inbox(self) -> None:
        """Count what waits where nobody else did lately: in a pause, or while all hands are full."""
        if time.monotonic() - self._counted_at >= COUNT_SECONDS:
            self._take_load(count_waiting(self.folders["inbox"], self.names))

    def _take_load(self, load: InboxLoad) -> None:
        self._counted_at = time.monotonic()
        self.load = load

    def last_seen(self, loop: str) -> float:
        """When a loop last showed progress, in Unix time."""
        return time.time() - self.health.silence_seconds(loop)

    def check_loops(self, silence: float) -> None:
        """Say what stalls, and what did: an event loop that stalled can tell only afterwards.

        A device thread that died does not come back: the run ends, once monitoring had time to see it.
        """
        if silence > HEARTBEAT_STALE_SECONDS:
            log.error("service.stalled", loop=EVENT_LOOP, seconds=round(silence, 1), over=True)
        stalled = self.health.stalled()
        if stalled and not self._device_stalled:
            log.error("service.stalled", loop=DEVICE, message="; ".join(stalled))
        elif self._device_stalled and not stalled:
            log.info("service.recovered", loop=DEVICE)
        self._device_stalled = bool(stalled)
        if self.device.alive:
            return
        self._device_died_at = self._device_died_at or time.monotonic()
        if time.monotonic() - self._device_died_at >= DEVICE_DEAD_SECONDS:
            self.end(MachineError("the device thread died: unfinished files were put back into the inbox"))

    def tell_pause(self) -> None:
        """Say where claiming pauses, and why, in metrics, readiness and log."""
        reasons = self.pause.reasons
        for reason in REASONS:
            self.metrics.paused.labels(reason).set(reason in reasons)
        self.health.unmet = {text for text in self.health.unmet if not text.startswith(PAUSED)}
        self.health.unmet |= {f"{PAUSED}{message}" for message in reasons.values()}
        for reason in reasons.keys() - self._paused:
            log.warning("service.paused", reason=reason, message=reasons[reason])
        for reason in self._paused - reasons.keys():
            log.info("service.resumed", reason=reason)
        self._paused = set(reasons)

    def tell_manager(self) -> None:
        """Feed the service manager's watchdog while all makes progress, and say how things are.

        A drain, or a wait for the folders, may take as long as it makes progress; loading may not.
        """
        stalled, unmet = self.health.stalled(), self.health.unmet
        if not stalled:
            self.notify.alive()
            if LOADING not in unmet and (DRAINING in unmet or self.pipeline is None):
                self.notify.extend(EXTEND_SECONDS)
        load = self.load
        self.notify.status(
            status_line(
                "; ".join(stalled or sorted(unmet)) or "running",
                files=load.files if load else 0,
                oldest_seconds=load.oldest_seconds(time.time()) if load else 0.0,
                done=self.progress.done,
                total=self.progress.total,
                rate=self.progress.rate,
            )
        )

    def sample(self) -> None:
        """Set the gauges that describe this moment."""
        metrics = self.metrics
        metrics.observe_device(self.device.busy_seconds, time.monotonic())
        if self.inbox is not None:
            metrics.observe_inbox(self.inbox.take_recovered(), self.inbox.take_found())
            load = self.inbox.pending()
            if load is not None and load is not self._inbox_load:  # it looked since the last beat
                self._inbox_load = load
                self._take_load(load)
        if self.load is not None:
            metrics.observe_load(self.load)
        if self.pipeline is not None:
            for stage, items in self.pipeline.queued().items():
                metrics.queue_items.labels(stage).set(items)
            metrics.queue_tokens.set(self.pipeline.tokenized.weight + self.pipeline.packer.tokens)
            device = self.pipeline.study.engine.info.device
            metrics.observe_memory(memory_bytes(device), pool_bytes(device))
        self.board.look(
            self.load,
            self.pipeline.workload if self.pipeline is not None else None,
            ready=not self.health.unmet,
        )

"""Start, serve, drain, stop, in order. The first SIGTERM or SIGINT drains, the second forces.

Knows the configuration and the lifecycle; what happens to a file is `daemon.pipeline`'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry

from daemon.build import (
    QUEUED_RESULT_BYTES,
    QUEUED_TEXT_BYTES,
    Compute,
    load_compute,
    read_limits,
    results_key,
)
from daemon.compute.buffers import keep_memory, memory_bytes, pool_bytes
from daemon.compute.device import Device
from daemon.compute.packing import Packer
from daemon.config import Config
from daemon.durable import make_folder
from daemon.errors import ConfigError, MachineError, SyncFailed
from daemon.intake.inbox import Inbox
from daemon.machine import Machine
from daemon.observe.apart import apart
from daemon.observe.board import DRAINING, PAUSED, StatusBoard
from daemon.observe.health import DEVICE, EVENT_LOOP, HEARTBEAT_STALE_SECONDS, LOADING, Health
from daemon.observe.http import serve_http
from daemon.observe.metrics import Metrics
from daemon.observe.notify import Notify, status_line
from daemon.observe.page import status_routes
from daemon.observe.progress import Progress
from daemon.output.commit import Outbox
from daemon.output.delivery import Delivery, Outcome
from daemon.pause import FOLDERS, REASONS, FoldersLost, Pause
from daemon.pipeline import Limits, Pipeline, Tally

HEARTBEAT_SECONDS = 1.0
EXTEND_SECONDS = 30.0  # asked of the service manager at each heartbeat of a drain
DEVICE_DEAD_SECONDS = 60.0  # that a daemon without its device thread stays, for monitoring to see

log = structlog.get_logger()


class Forced(MachineError):
    """A second signal ended the drain."""


def ignore(outcome: Outcome) -> None:
    pass


def serve(
    config: Config,
    *,
    once: bool,
    on_outcome: Callable[[Outcome], None] = ignore,
    load: Callable[[Config], Compute] = load_compute,
) -> Tally:
    """Run the daemon until it is told to stop, or with `once` until the inbox is drained.

    `load` gives the model, the SAEs and the tokenizer; it is called on the device thread.

    Raises ConfigError before anything is touched, MachineError where the machine fails or a second signal
    forces the end.
    """
    check_folders(config.inbox.path, config.outbox.path)
    keep_memory()
    try:
        return asyncio.run(Service(config, once=once, on_outcome=on_outcome, load=load).run())
    except* (ConfigError, MachineError, OSError) as group:
        raise first_leaf(group) from None


def first_leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first plain exception inside a group of groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def check_folders(inbox: Path, outbox: Path) -> None:
    """Make both folders and see that results can be published by a rename. Raises ConfigError."""
    for key, folder in (("inbox.path", inbox), ("outbox.path", outbox)):
        try:
            make_folder(folder)
        except OSError as error:
            raise ConfigError(f"{key} = {folder}: can't be made: {error.strerror}") from None
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigError(f"{key} = {folder}: not readable and writable for this user")
    if inbox.stat().st_dev != outbox.stat().st_dev:
        raise ConfigError(
            f"inbox.path = {inbox} and outbox.path = {outbox} are on different file systems:"
            " put them on one, so that a rename publishes"
        )
    if inbox.resolve() == outbox.resolve():
        raise ConfigError(f"inbox.path and outbox.path are the same folder, {inbox}: use two")


class Service:
    """One run of the daemon."""

    def __init__(
        self,
        config: Config,
        *,
        once: bool,
        on_outcome: Callable[[Outcome], None],
        load: Callable[[Config], Compute],
    ) -> None:
        self.config = config
        self.load_compute = load
        self.once = once
        self.on_outcome = on_outcome
        self.stop = asyncio.Event()
        self.metrics = Metrics(CollectorRegistry())
        self.device = Device()
        self.health = Health(self.device, stall_seconds=config.http.stall_seconds)
        for loop in (EVENT_LOOP, DEVICE):
            self.metrics.heartbeat_timestamp_seconds.labels(loop).set_function(partial(self.last_seen, loop))
        self.progress = Progress()
        self.board = StatusBoard(
            inbox=config.inbox.path,
            outbox=config.outbox.path,
            metrics=self.metrics,
            progress=self.progress,
        )
        self.notify = Notify()
        self.pause = Pause(patient=not once, on_retry=self.metrics.observe_retry)
        self.machine = Machine(
            config.inbox.path,
            config.outbox.path,
            min_free_bytes=config.outbox.min_free_bytes,
            pause=self.pause,
        )
        self.paused: set[str] = set()  # reasons that were told
        self.device_stalled = False  # and told
        self.device_died_at: float | None = None
        self.fatal: BaseException | None = None  # what ends the run from outside the pipeline
        self.main_task: asyncio.Task[object] | None = None
        self.tally = Tally()
        self.inbox: Inbox | None = None
        self.pipeline: Pipeline | None = None

    async def run(self) -> Tally:
        self.health.unmet.add(LOADING)
        with self.signals():
            async with self.http(), self.heartbeat():
                try:
                    compute = await self.load()
                    self.health.unmet.discard(LOADING)
                    await self.work(compute)
                    return self.tally
                except* SyncFailed:
                    self.metrics.sync_errors_total.inc()
                    raise
                finally:
                    self.device.close()

    async def load(self) -> Compute:
        began = time.monotonic()
        log.info("model.loading", model=self.config.model.name)
        compute = await self.device.call(lambda: self.load_compute(self.config))
        gc.collect()
        gc.freeze()  # the libraries' million objects stay: no collection needs to look at them again
        info = compute.engine.info
        self.metrics.describe(info, compute.max_batch_tokens)
        self.board.describe(info, compute.max_batch_tokens)
        log.info(
            "model.loaded",
            model=info.name,
            dtype=info.dtype,
            device=info.device,
            engine=info.engine,
            max_batch_tokens=compute.max_batch_tokens,
            saes=[sae.hook_name for sae in info.saes],
            seconds=round(time.monotonic() - began, 1),
        )
        return compute

    async def work(self, compute: Compute) -> None:
        """Run pipelines to their end; another one where the folders of the first were taken away."""
        with self.progress:
            while True:
                try:
                    return await self.drain(compute)
                except* FoldersLost as lost:
                    if self.once or self.stop.is_set():
                        raise
                    log.error("service.folders_lost", reason=str(first_leaf(lost)))
                    self.pause.hold(FOLDERS, str(first_leaf(lost)))
                    self.progress.total = self.progress.done  # what was read is read again
                await self.folders_back()

    async def folders_back(self) -> None:
        """Wait until inbox and outbox are there and fit each other."""
        while (
            trouble := await asyncio.to_thread(self.machine.folder_trouble)
        ) is not None and not self.stop.is_set():
            self.pause.hold(FOLDERS, trouble)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def drain(self, compute: Compute) -> None:
        """Open inbox and outbox and run a pipeline to its end."""
        config = self.config
        inbox = Inbox(
            config.inbox.path,
            settle_seconds=config.inbox.settle_seconds,
            rescan_seconds=config.inbox.rescan_seconds,
            on_success=config.inbox.on_success,
            pause=self.pause,
        )
        outbox = Outbox(config.outbox.path)
        await self.pause.outlast(inbox.open, "start")
        try:
            removed = await self.pause.outlast(lambda: asyncio.to_thread(outbox.open), "start")
            self.metrics.recovered_files_total.labels("staging_removed").inc(removed)
            self.inbox = inbox
            self.pipeline = self.assemble(compute, inbox, outbox)
            self.notify.ready()
            try:
                await self.pipeline.run(self.stop, once=self.once)
            finally:
                self.pipeline.delivery.close()
        finally:
            await asyncio.to_thread(outbox.close)
            await inbox.close()

    def assemble(self, compute: Compute, inbox: Inbox, outbox: Outbox) -> Pipeline:
        config = self.config
        return Pipeline(
            inbox=inbox,
            delivery=Delivery(
                inbox=inbox,
                outbox=outbox,
                info=compute.engine.info,
                values=config.outbox.values,
                settings=config.model_dump(mode="json"),
                pause=self.pause,
            ),
            tokenizer=compute.tokenizer,
            device=self.device,
            study=compute.study,
            packer=Packer(
                compute.max_batch_tokens,
                config.batching.max_batch_samples,
                shares_prefixes=compute.engine.shares_prefixes,
            ),
            recipe=config.recipe,
            read_limits=read_limits(config),
            limits=Limits(
                queued_text_bytes=QUEUED_TEXT_BYTES,
                queued_tokens=config.batching.window_tokens,
                queued_result_bytes=QUEUED_RESULT_BYTES,
                max_attempts=config.inbox.max_attempts,
            ),
            results_key=results_key(config, compute.engine),
            pause=self.pause,
            tally=self.tally,
            metrics=self.metrics,
            progress=self.progress,
            on_outcome=self.settled,
        )

    def settled(self, outcome: Outcome) -> None:
        self.board.settle(outcome)
        self.on_outcome(outcome)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        self.main_task = task = asyncio.current_task()
        assert task is not None

        def handle(received: signal.Signals) -> None:
            if not self.stop.is_set():
                log.info("service.draining", signal=received.name)
                self.health.unmet.add(DRAINING)
                self.notify.stopping()
                self.stop.set()
                self.pause.give_up()
            else:
                log.warning("service.forced", signal=received.name)
                task.cancel()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, handle, number)
        try:
            yield
        except asyncio.CancelledError:
            if self.fatal is not None:
                raise self.fatal from None
            raise Forced("forced to stop: unfinished files were put back into the inbox") from None
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    @contextlib.asynccontextmanager
    async def http(self) -> AsyncIterator[None]:
        if not self.config.http.enabled:
            yield
            return
        address, registry, health = self.config.http.address, self.metrics.registry, self.health
        routes = status_routes(lambda: self.board.status(health))
        async with apart(lambda: serve_http(address, registry, health, routes)) as url:
            log.info("http.listening", url=url)
            yield

    def tell_pause(self) -> None:
        """Say where claiming pauses, and why, in metrics, readiness and log."""
        reasons = self.pause.reasons
        for reason in REASONS:
            self.metrics.paused.labels(reason).set(reason in reasons)
        self.health.unmet = {text for text in self.health.unmet if not text.startswith(PAUSED)}
        self.health.unmet |= {f"{PAUSED}{message}" for message in reasons.values()}
        for reason in reasons.keys() - self.paused:
            log.warning("service.paused", reason=reason, message=reasons[reason])
        for reason in self.paused - reasons.keys():
            log.info("service.resumed", reason=reason)
        self.paused = set(reasons)

    def sample(self) -> None:
        """Set the gauges that describe this moment."""
        metrics = self.metrics
        metrics.observe_device(self.device.busy_seconds, time.monotonic())
        if self.inbox is not None:
            metrics.observe_inbox(self.inbox.pending(), self.inbox.take_recovered(), self.inbox.take_found())
        if self.pipeline is not None:
            for stage, items in self.pipeline.queued().items():
                metrics.queue_items.labels(stage).set(items)
            metrics.queue_tokens.set(self.pipeline.tokenized.weight + self.pipeline.packer.tokens)
            device = self.pipeline.study.engine.info.device
            metrics.observe_memory(memory_bytes(device), pool_bytes(device))
        self.board.look(
            self.inbox.pending() if self.inbox is not None else None,
            self.pipeline.workload if self.pipeline is not None else None,
            ready=not self.health.unmet,
        )

    def tell_manager(self) -> None:
        """Feed the service manager's watchdog while all makes progress, and say how things are.

        A drain, or a wait for the folders, may take as long as it makes progress; loading may not.
        """
        stalled = self.health.stalled()
        if not stalled:
            self.notify.alive()
            if LOADING not in self.health.unmet and (self.stop.is_set() or self.pipeline is None):
                self.notify.extend(EXTEND_SECONDS)
        load = self.inbox.pending() if self.inbox is not None else None
        self.notify.status(
            status_line(
                "; ".join(stalled or sorted(self.health.unmet)) or "running",
                files=load.files if load else 0,
                oldest_seconds=load.oldest_seconds if load else 0.0,
                done=self.progress.done,
                total=self.progress.total,
                rate=self.progress.rate,
            )
        )

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
        if stalled and not self.device_stalled:
            log.error("service.stalled", loop=DEVICE, message="; ".join(stalled))
        elif self.device_stalled and not stalled:
            log.info("service.recovered", loop=DEVICE)
        self.device_stalled = bool(stalled)
        if self.device.alive:
            return
        self.device_died_at = self.device_died_at or time.monotonic()
        if time.monotonic() - self.device_died_at >= DEVICE_DEAD_SECONDS:
            self.end(MachineError("the device thread died: unfinished files were put back into the inbox"))

    def end(self, error: BaseException) -> None:
        """End the run with this error, whatever it is at."""
        if self.fatal is None and self.main_task is not None:
            self.fatal = error
            self.main_task.cancel()

    def see_end(self, task: asyncio.Task[None]) -> None:
        """A background task ended: a bug, unless it was told to."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.end(error)

    async def beat(self) -> None:
        """The heart of the event loop: whatever stalls it is seen by its silence."""
        while True:
            self.check_loops(self.health.beat())
            self.machine.see_unanswered()
            self.tell_pause()
            self.tell_manager()
            self.sample()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def watch_machine(self) -> None:
        """Look at folders and disk, which may take its time: a disk that is gone answers nothing."""
        folders = {"inbox": self.config.inbox.path, "outbox": self.config.outbox.path}
        while True:
            await asyncio.to_thread(self.machine.look)
            self.tell_pause()
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self.metrics.observe_disk, folders)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    @contextlib.asynccontextmanager
    async def heartbeat(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(work()) for work in (self.watch_machine, self.beat)]
        for task in tasks:
            task.add_done_callback(self.see_end)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

"""Start, serve, stop, in order. The first SIGTERM or SIGINT drains, the second forces; SIGHUP reloads.

Knows the configuration and the lifecycle; what happens to a file is `daemon.pipeline`'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import structlog
from prometheus_client import CollectorRegistry

from daemon.analysis.sae_fit import FitComparison
from daemon.config import Config
from daemon.errors import ConfigError, MachineError, SyncFailed
from daemon.executor.device_thread import DeviceThread
from daemon.machine import Machine, check_folders
from daemon.model.buffers import keep_memory, memory_bytes, pool_bytes
from daemon.model_wiring import Compute, load_compute
from daemon.observe import logs
from daemon.observe.board import StatusBoard
from daemon.observe.health import DRAINING, LOADING, Health
from daemon.observe.metrics import Metrics
from daemon.observe.notify import Notify
from daemon.observe.progress import Progress
from daemon.observe.recorder import Recorder, Tally
from daemon.observe.reports import report_routes
from daemon.observe.snapshot import Snapshot
from daemon.observe.threaded_server import threaded_server
from daemon.pause import FOLDERS, FoldersLost, Pause
from daemon.pipeline import Pipeline
from daemon.ports import Executor
from daemon.records import InboxLoad, Outcome
from daemon.reload import Reload
from daemon.settings import AT_ONCE, SettingsSource, is_in
from daemon.sink.report import REPORT
from daemon.source.inbox import Inbox
from daemon.source.scan import count_waiting
from daemon.supervisor import Supervisor
from daemon.wiring import (
    Computing,
    computing,
    folders_of_use,
    input_names,
    open_folders,
    pipeline_of,
    with_settings,
)

LOOK_SECONDS = 1.0  # between two looks for folders that are gone

log = structlog.get_logger()


class Forced(MachineError):
    """A second signal ended the drain."""


def serve(
    config: Config,
    *,
    once: bool,
    on_outcome: Callable[[Outcome], None] = lambda _: None,
    load: Callable[[Config], Compute] = load_compute,
    settings_source: SettingsSource | None = None,
) -> Tally:
    """Run the daemon until it is told to stop, or with `once` until the inbox is drained.

    `load` gives the model, the SAEs and the tokenizer; it is called on the device thread. The settings are
    read again from `settings_source` when they change; without it they don't.

    Raises ConfigError before anything is touched, MachineError where the machine fails or a second signal
    forces the end.
    """
    check_folders(config.inbox.path, config.outbox.path, taken=folders_of_use(config))
    keep_memory()
    try:
        service = Service(
            config, once=once, on_outcome=on_outcome, load=load, settings_source=settings_source
        )
        return asyncio.run(service.run())
    except BaseExceptionGroup as group:
        known, bugs = group.split((ConfigError, MachineError, OSError))
        if known is None or bugs is not None:
            raise
        # Not by `except*`: from there, Python 3.11.2 gives what is raised in a group again.
        raise first_leaf(known) from None


def first_leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first plain exception inside a group of groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@contextlib.asynccontextmanager
async def background(
    *works: Coroutine[Any, Any, None], on_error: Callable[[BaseException], None]
) -> AsyncIterator[None]:
    """Run coroutines within the context, and cancel them at its end; `on_error` is told how one fails."""

    def see_end(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            on_error(error)

    tasks = [asyncio.create_task(work) for work in works]
    for task in tasks:
        task.add_done_callback(see_end)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@dataclasses.dataclass(frozen=True, slots=True)
class PipelineRun:
    """One pipeline between one pair of open folders, and who records its work."""

    inbox: Inbox
    pipeline: Pipeline
    recorder: Recorder


class Service:
    """One run of the daemon."""

    def __init__(
        self,
        config: Config,
        *,
        once: bool,
        on_outcome: Callable[[Outcome], None],
        load: Callable[[Config], Compute],
        settings_source: SettingsSource | None = None,
    ) -> None:
        self.once = once
        self.on_outcome = on_outcome
        self.load_compute = load
        self.stop = asyncio.Event()  # of the run
        self.end_pipeline = asyncio.Event()  # of one pipeline: the run ends, or another one takes over
        self.metrics = Metrics(CollectorRegistry())
        self.device = DeviceThread()
        self.health = Health(self.device, stall_seconds=config.http.stall_seconds)
        self.progress = Progress()
        self.notify = Notify()
        self.pause = Pause(patient=not once, on_retry=self.metrics.observe_retry)
        inbox, outbox = config.inbox.path, config.outbox.path
        self.board = StatusBoard(
            inbox=inbox,
            outbox=outbox,
            executor=config.executor.kind,
            metrics=self.metrics,
            progress=self.progress,
        )
        self.machine = Machine(inbox, outbox, min_free_bytes=config.outbox.min_free_bytes, pause=self.pause)
        self.supervisor = Supervisor(
            self,
            health=self.health,
            machine=self.machine,
            metrics=self.metrics,
            board=self.board,
            notify=self.notify,
        )
        self.reload = Reload(
            config,
            settings_source,
            metrics=self.metrics,
            on_change=self.apply_settings,
            on_refused=self.board.refuse_settings,
        )
        self.current: PipelineRun | None = None  # the current one
        self.executor: Executor | None = None  # one of workers is there before any of them is ready
        self.fatal: BaseException | None = None  # what ends the run from outside the pipeline
        self.main_task: asyncio.Task[object] | None = None
        self.tally = Tally()

    @property
    def config(self) -> Config:
        return self.reload.config

    async def run(self) -> Tally:
        """Start, serve, stop."""
        async with (
            self.started(),
            self.loaded() as now,
            background(self.reload.follow(self.stop, self.notify), on_error=self.end),
        ):
            await self.serve(now)
        log.info("service.stopped", **dataclasses.asdict(self.tally))
        return self.tally

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        """Signals, endpoints and supervisor, around a run."""
        self.health.require(LOADING)
        folders = {role: str(folder) for role, folder in self.machine.folders.items()}
        log.info("service.starting", version=version("lensd"), **folders)
        with self.signals():
            async with (
                self.http(),
                background(
                    self.supervisor.watch_machine(), self.supervisor.watch_daemon(), on_error=self.end
                ),
            ):
                try:
                    yield
                except* SyncFailed:
                    self.metrics.sync_errors_total.inc()
                    raise
                finally:
                    self.device.close()

    @contextlib.asynccontextmanager
    async def loaded(self) -> AsyncIterator[Computing]:
        """The model, loaded by whoever runs it."""
        began = time.monotonic()
        log.info("model.loading", model=self.config.model.name, executor=self.config.executor.kind)
        async with computing(
            self.config,
            device=self.device,
            pause=self.pause,
            patient=not self.once,
            stall_seconds=lambda: self.health.stall_seconds,
            events=self.metrics,
            load=self.load_compute,
            on_executor=self.see_executor,
        ) as now:
            gc.collect()
            gc.freeze()  # the libraries' million objects stay: no collection needs to look at them again
            info = now.executor.info
            self.metrics.describe(info, now.max_batch_tokens)
            self.board.describe(info, now.max_batch_tokens)
            self.health.meet(LOADING)
            log.info(
                "model.loaded",
                model=info.name,
                dtype=info.dtype,
                device=info.device,
                engine=info.engine,
                bits=info.bits,
                max_batch_tokens=now.max_batch_tokens,
                saes=[sae.where for sae in info.saes],
                seconds=round(time.monotonic() - began, 1),
            )
            yield now

    async def serve(self, now: Computing) -> None:
        """Run pipelines until the run stops: another for changed settings, or once lost folders are back."""
        made_for = self.config
        with self.progress:
            while True:
                self.end_pipeline = asyncio.Event()  # before the settings are taken: a later change sets it
                config = self.config
                if config is not made_for:
                    now = await with_settings(now, config)
                    made_for = config
                try:
                    await self.run_pipeline(now, config)
                    if self.once or self.stop.is_set():
                        return
                except* FoldersLost as lost:
                    if self.once or self.stop.is_set():
                        raise
                    log.error("service.folders_lost", reason=str(first_leaf(lost)))
                    self.pause.hold(FOLDERS, str(first_leaf(lost)))
                    self.progress.total = self.progress.done  # what was read is read again
                await self.folders_back()

    async def run_pipeline(self, now: Computing, config: Config) -> None:
        """Open inbox and outbox and run a pipeline to its end."""
        info = now.executor.info
        recorder = Recorder(
            info,
            metrics=self.metrics,
            progress=self.progress,
            tally=self.tally,
            departures=FitComparison(info).of,
            on_outcomes=self.settled,
        )
        async with open_folders(config, self.pause) as folders:
            self.metrics.recovered_files_total.labels("staging_removed").inc(folders.removed)
            pipeline = pipeline_of(config, now, folders, pause=self.pause, observer=recorder)
            self.current = PipelineRun(folders.inbox, pipeline, recorder)
            self.notify.ready()
            if self.stop.is_set():
                self.end_pipeline.set()
            await pipeline.run(self.end_pipeline, once=self.once)
            self.tally.left = folders.inbox.left

    async def folders_back(self) -> None:
        """Wait until inbox and outbox are there and fit each other."""
        while (
            trouble := await asyncio.to_thread(self.machine.folder_trouble)
        ) is not None and not self.stop.is_set():
            self.pause.hold(FOLDERS, trouble)
            await asyncio.sleep(LOOK_SECONDS)

    def settled(self, outcomes: Sequence[Outcome]) -> None:
        self.board.settle(*outcomes)
        for outcome in outcomes:
            self.on_outcome(outcome)

    def snapshot(self) -> Snapshot:
        """Describe this moment; implements `daemon.supervisor.Daemon`."""
        executor = self.executor
        snapshot = Snapshot(
            device_alive=self.device.alive,
            device_busy_seconds=self.device.busy_seconds,
            coordinator_seconds=max(0.0, time.process_time() - self.device.cpu_seconds),
            done=self.progress.done,
            total=self.progress.total,
            rate=self.progress.rate,
            slots=executor.slots if executor is not None else 0,
            workers_wanted=executor.workers_wanted if executor is not None else 0,
            workers=executor.workers() if executor is not None else (),
        )
        if self.current is None:
            return snapshot
        inbox, pipeline = self.current.inbox, self.current.pipeline
        is_local = self.config.executor.kind == "local"
        device = pipeline.executor.info.device if is_local else "cpu"  # of this process
        return dataclasses.replace(
            snapshot,
            inbox=inbox.pending(),
            recovered=inbox.take_recovered(),
            found=inbox.take_found(),
            queued=pipeline.queued(),
            batches_in_flight=pipeline.batches_in_flight,
            workload=self.current.recorder.workload,
            memory_bytes=memory_bytes(device),
            pool_bytes=pool_bytes(device),
        )

    def see_executor(self, executor: Executor) -> None:
        self.executor = executor

    def count_waiting(self) -> InboxLoad:
        return count_waiting(self.config.inbox.path, input_names(self.config))

    def end(self, error: BaseException) -> None:
        """End the run with this error, whatever it is at."""
        if self.fatal is None and self.main_task is not None:
            self.fatal = error
            self.main_task.cancel()

    def apply_settings(self, config: Config, changed: list[str]) -> None:
        """Apply settings of which those keys changed.

        Unless all of them are AT_ONCE, the pipeline ends with its files and another begins.
        """
        if any(is_in(key, ("log",)) for key in changed):
            logs.configure(config.log.format, config.log.level)
        self.health.stall_seconds = config.http.stall_seconds
        self.machine.min_free_bytes = config.outbox.min_free_bytes
        if not all(is_in(key, AT_ONCE) for key in changed):
            self.end_pipeline.set()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        self.main_task = task = asyncio.current_task()
        assert task is not None

        def handle(received: signal.Signals) -> None:
            if not self.stop.is_set():
                log.info("service.draining", signal=received.name)
                self.health.require(DRAINING)
                self.notify.stopping()
                self.stop.set()
                self.end_pipeline.set()
                self.pause.give_up()
            else:
                log.warning("service.forced", signal=received.name)
                task.cancel()

        def hang_up() -> None:
            if on_terminal and not sys.stderr.isatty():  # which is gone
                handle(signal.SIGHUP)
            else:
                self.reload.asked.set()

        on_terminal = sys.stderr.isatty()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, handle, number)
        if self.reload.source is not None:
            loop.add_signal_handler(signal.SIGHUP, hang_up)
        try:
            yield
        except asyncio.CancelledError:
            if self.fatal is not None:
                raise self.fatal from None
            raise Forced("forced to stop: unfinished files were put back into the inbox") from None
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    @contextlib.asynccontextmanager
    async def http(self) -> AsyncIterator[None]:
        if not self.config.http.enabled:
            yield
            return
        from daemon.observe.http import serve_http
        from daemon.observe.page import status_routes

        address, registry, health = self.config.http.address, self.metrics.registry, self.health
        routes = [
            *status_routes(lambda: self.board.status(health)),
            *report_routes(
                self.config.outbox.path, name=REPORT, enabled=lambda: self.reload.config.report.each_file
            ),
        ]
        async with threaded_server(lambda: serve_http(address, registry, health, routes)) as url:
            log.info("http.listening", url=url)
            yield

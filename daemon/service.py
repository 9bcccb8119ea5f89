"""Start, serve, drain, stop, in order. The first SIGTERM or SIGINT drains, the second forces; SIGHUP reloads.

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
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version

import structlog
from prometheus_client import CollectorRegistry

from daemon.build import (
    QUEUED_RESULT_BYTES,
    QUEUED_TEXT_BYTES,
    Compute,
    folders_of_use,
    load_compute,
    read_limits,
    results_key,
    with_settings,
)
from daemon.compute.buffers import keep_memory
from daemon.compute.device import Device
from daemon.compute.packing import Packer
from daemon.config import Config
from daemon.errors import ConfigError, MachineError, SyncFailed
from daemon.heart import Heart
from daemon.intake.inbox import Inbox
from daemon.intake.inputs import InputNames
from daemon.machine import Machine, check_folders
from daemon.observe import logs
from daemon.observe.board import DRAINING, StatusBoard
from daemon.observe.health import LOADING, Health
from daemon.observe.http import serve_http
from daemon.observe.metrics import Metrics
from daemon.observe.notify import Notify
from daemon.observe.page import status_routes
from daemon.observe.progress import Progress
from daemon.observe.threaded_server import threaded_server
from daemon.output.commit import Outbox
from daemon.output.delivery import Delivery, Outcome
from daemon.pause import FOLDERS, FoldersLost, Pause
from daemon.pipeline import Limits, Pipeline, Tally
from daemon.settings import AT_ONCE, Source, changes, is_in

LOOK_SECONDS = 1.0  # between two looks for folders that are gone, or for changed settings

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
    source: Source | None = None,
) -> Tally:
    """Run the daemon until it is told to stop, or with `once` until the inbox is drained.

    `load` gives the model, the SAEs and the tokenizer; it is called on the device thread. `source` is where
    the settings are read again when they change; without it they don't.

    Raises ConfigError before anything is touched, MachineError where the machine fails or a second signal
    forces the end.
    """
    check_folders(config.inbox.path, config.outbox.path, taken=folders_of_use(config))
    keep_memory()
    try:
        return asyncio.run(Service(config, once=once, on_outcome=on_outcome, load=load, source=source).run())
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


def input_names(config: Config) -> InputNames:
    """Which names in the inbox are inputs, and which sub-folders lensd made there."""
    inbox, outbox = config.inbox.path.absolute(), config.outbox.path.absolute()
    nested = outbox.relative_to(inbox).parts[:1] if outbox.is_relative_to(inbox) else ()
    return InputNames(config.inbox.ignore, folders=nested)


class Service:
    """One run of the daemon."""

    def __init__(
        self,
        config: Config,
        *,
        once: bool,
        on_outcome: Callable[[Outcome], None],
        load: Callable[[Config], Compute],
        source: Source | None = None,
    ) -> None:
        self.config = config
        self.load_compute = load
        self.once = once
        self.on_outcome = on_outcome
        self.source = source
        self.stop = asyncio.Event()  # of the run
        self.turn = asyncio.Event()  # of one pipeline, with the run or for another one with other settings
        self.hung_up = asyncio.Event()  # SIGHUP came
        self.metrics = Metrics(CollectorRegistry())
        self.device = Device()
        self.health = Health(self.device, stall_seconds=config.http.stall_seconds)
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
        self.heart = Heart(
            folders={"inbox": config.inbox.path, "outbox": config.outbox.path},
            device=self.device,
            health=self.health,
            machine=self.machine,
            pause=self.pause,
            metrics=self.metrics,
            progress=self.progress,
            board=self.board,
            notify=self.notify,
            end=self.end,
        )
        self.heart.names = input_names(config)
        self.fatal: BaseException | None = None  # what ends the run from outside the pipeline
        self.main_task: asyncio.Task[object] | None = None
        self.tally = Tally()

    async def run(self) -> Tally:
        self.health.unmet.add(LOADING)
        folders = {"inbox": str(self.config.inbox.path), "outbox": str(self.config.outbox.path)}
        log.info("service.starting", version=version("lensd"), **folders)
        with self.signals():
            async with self.http(), self.heart.beating():
                try:
                    compute = await self.load()
                    self.health.unmet.discard(LOADING)
                    async with self.following_settings():
                        await self.work(compute)
                    log.info("service.stopped", **dataclasses.asdict(self.tally))
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
        """Run pipelines until the run stops: another for changed settings, or once lost folders are back."""
        made_for = self.config
        with self.progress:
            while True:
                self.turn = asyncio.Event()  # before the settings are taken: a later change sets it
                config = self.config
                if config is not made_for:
                    compute = await self.device.call(partial(with_settings, compute, config))
                    made_for = config
                try:
                    await self.drain(compute, config)
                    if self.once or self.stop.is_set():
                        return
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
            await asyncio.sleep(LOOK_SECONDS)

    async def drain(self, compute: Compute, config: Config) -> None:
        """Open inbox and outbox and run a pipeline to its end."""
        self.heart.names = names = input_names(config)
        inbox = Inbox(
            config.inbox.path,
            names=names,
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
            pipeline = self.assemble(compute, config, inbox, outbox)
            self.heart.inbox, self.heart.pipeline = inbox, pipeline
            self.notify.ready()
            if self.stop.is_set():
                self.turn.set()
            try:
                await pipeline.run(self.turn, once=self.once)
            finally:
                pipeline.delivery.close()
        finally:
            await asyncio.to_thread(outbox.close)
            await inbox.close()

    def assemble(self, compute: Compute, config: Config, inbox: Inbox, outbox: Outbox) -> Pipeline:
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
            on_outcomes=self.settled,
        )

    def settled(self, outcomes: Sequence[Outcome]) -> None:
        self.board.settle(*outcomes)
        for outcome in outcomes:
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
                self.turn.set()
                self.pause.give_up()
            else:
                log.warning("service.forced", signal=received.name)
                task.cancel()

        def hang_up() -> None:
            if on_terminal and not sys.stderr.isatty():  # which is gone
                handle(signal.SIGHUP)
            else:
                self.hung_up.set()

        on_terminal = sys.stderr.isatty()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, handle, number)
        if self.source is not None:
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
        address, registry, health = self.config.http.address, self.metrics.registry, self.health
        routes = status_routes(lambda: self.board.status(health))
        async with threaded_server(lambda: serve_http(address, registry, health, routes)) as url:
            log.info("http.listening", url=url)
            yield

    @contextlib.asynccontextmanager
    async def following_settings(self) -> AsyncIterator[None]:
        """Within the context settings are read again at SIGHUP and when their file changed."""
        if self.source is None:
            yield
            return
        task = asyncio.create_task(self.follow_settings(self.source))
        task.add_done_callback(self.heart.see_end)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def follow_settings(self, source: Source) -> None:
        while not self.stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.hung_up.wait(), LOOK_SECONDS)
            if self.hung_up.is_set() or await asyncio.to_thread(source.changed):
                self.hung_up.clear()
                self.notify.reloading()
                await self.reload(source)
                self.notify.ready()

    async def reload(self, source: Source) -> None:
        """Take up changed settings, or none of them. Files under way are finished under the ones before."""
        before = self.config
        try:
            config = await asyncio.to_thread(source.read, before)
        except ConfigError as error:
            log.error("settings.rejected", message=str(error))
            self.metrics.config_reloads_total.labels("rejected").inc()
            self.board.refuse_settings(str(error))
            return
        changed = changes(before, config)
        self.config = config
        if any(is_in(key, ("log",)) for key in changed):
            logs.configure(config.log.format, config.log.level)
        self.health.stall_seconds = config.http.stall_seconds
        self.machine.min_free_bytes = config.outbox.min_free_bytes
        if not all(is_in(key, AT_ONCE) for key in changed):
            self.turn.set()
        log.info("settings.applied", changed=changed)
        self.metrics.config_reloads_total.labels("applied").inc()
        self.board.refuse_settings(None)

    def end(self, error: BaseException) -> None:
        """End the run with this error, whatever it is at."""
        if self.fatal is None and self.main_task is not None:
            self.fatal = error
            self.main_task.cancel()

"""Start, serve, drain, stop, in order. The first SIGTERM or SIGINT drains, the second forces.

Knows the configuration and the lifecycle; what happens to a file is `daemon.pipeline`'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
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
from daemon.compute.device import Device
from daemon.compute.packing import Packer
from daemon.config import Config
from daemon.durable import make_folder
from daemon.errors import ConfigError, MachineError
from daemon.intake.inbox import Inbox
from daemon.observe.http import Health, serve_http
from daemon.observe.metrics import Metrics
from daemon.observe.progress import Progress
from daemon.output.commit import Outbox
from daemon.output.delivery import Delivery, Outcome
from daemon.pause import DISK, FOLDERS, REASONS, FoldersLost, Pause, describe
from daemon.pipeline import Limits, Pipeline, Tally

HEARTBEAT_SECONDS = 1.0
M_ARENA_MAX = -8  # <malloc.h>
PAUSED = "paused: "  # how readiness words a reason to pause

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
    share_arenas()
    try:
        return asyncio.run(Service(config, once=once, on_outcome=on_outcome, load=load).run())
    except* (ConfigError, MachineError, OSError) as group:
        raise first_leaf(group) from None


def share_arenas() -> None:
    """Let all threads use two heaps, where the C library can: with one for each, memory grows for hours."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 2)


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
        self.progress = Progress()
        self.pause = Pause(patient=not once)
        self.paused: set[str] = set()  # reasons that were told
        self.tally = Tally()
        self.inbox: Inbox | None = None
        self.pipeline: Pipeline | None = None

    async def run(self) -> Tally:
        self.health.unmet.add("loading the model")
        with self.signals():
            async with self.http(), self.heartbeat():
                try:
                    compute = await self.load()
                    self.health.unmet.discard("loading the model")
                    await self.work(compute)
                    return self.tally
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
                await self.folders_back()

    async def folders_back(self) -> None:
        """Wait until inbox and outbox are there and fit each other."""
        while (
            trouble := await asyncio.to_thread(self.folder_trouble)
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
        await self.pause.outlast(inbox.open)
        try:
            removed = await self.pause.outlast(lambda: asyncio.to_thread(outbox.open))
            self.metrics.recovered_files_total.labels("staging_removed").inc(removed)
            self.inbox = inbox
            self.pipeline = self.assemble(compute, inbox, outbox)
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
            on_outcome=self.on_outcome,
        )

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def handle(received: signal.Signals) -> None:
            if not self.stop.is_set():
                log.info("service.draining", signal=received.name)
                self.health.unmet.add("draining")
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
            raise Forced("forced to stop: unfinished files were put back into the inbox") from None
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    @contextlib.asynccontextmanager
    async def http(self) -> AsyncIterator[None]:
        if not self.config.http.enabled:
            yield
            return
        async with serve_http(self.config.http.address, self.metrics.registry, self.health) as url:
            log.info("http.listening", url=url)
            yield

    def folder_trouble(self) -> str | None:
        """Why inbox and outbox can't be worked with, if so. Blocks."""
        for folder in (self.config.inbox.path, self.config.outbox.path):
            if not folder.is_dir():
                return f"{folder}: no such folder"
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                return f"{folder}: not readable and writable for this user"
        if self.config.inbox.path.stat().st_dev != self.config.outbox.path.stat().st_dev:
            return f"{self.config.inbox.path} and {self.config.outbox.path} are on different file systems"
        return None

    def check_machine(self) -> None:
        """Whether folders and disk allow work; sets the reasons to pause. Blocks."""
        try:
            self.pause.hold(FOLDERS, self.folder_trouble())
            self.check_disk()
        except OSError as error:  # one of them went while it was looked at
            self.pause.hold(FOLDERS, describe(error))

    def check_disk(self) -> None:
        self.metrics.observe_disk({"inbox": self.config.inbox.path, "outbox": self.config.outbox.path})
        free, floor = shutil.disk_usage(self.config.outbox.path).free, self.config.outbox.min_free_bytes
        low = (
            f"{self.config.outbox.path}: {free} bytes free, outbox.min_free_bytes = {floor}: free some space"
        )
        self.pause.hold(DISK, low if free < floor else None)

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
        metrics.heartbeat_timestamp_seconds.labels("event_loop").set_to_current_time()
        since = self.device.busy_since  # a device that is idle, or between two calls, is alive now
        metrics.heartbeat_timestamp_seconds.labels("device").set(
            time.time() - (time.monotonic() - since if since is not None else 0.0)
        )
        metrics.observe_device(self.device.busy_seconds, time.monotonic())
        if self.inbox is not None:
            metrics.observe_inbox(self.inbox.pending(), self.inbox.take_recovered())
        if self.pipeline is not None:
            for stage, items in self.pipeline.queued().items():
                metrics.queue_items.labels(stage).set(items)
            metrics.queue_tokens.set(self.pipeline.tokenized.weight + self.pipeline.packer.tokens)

    @contextlib.asynccontextmanager
    async def heartbeat(self) -> AsyncIterator[None]:
        async def beat() -> None:
            while True:
                self.health.beat()
                self.sample()
                await asyncio.to_thread(self.check_machine)
                self.tell_pause()
                await asyncio.sleep(HEARTBEAT_SECONDS)

        task = asyncio.create_task(beat())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

"""The workers of a Ray cluster, kept at the number that is wanted: connected to, started, watched, replaced.

Knows no batches; who is given which one is `daemon.executor.ray`'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Protocol, TypeVar

import structlog

from daemon.analysis.column_inputs import StudySettings
from daemon.errors import ConfigError, LensdError, MachineError
from daemon.executor.ray_cluster import Cluster, one_line
from daemon.executor.remote_worker import Gone, RemoteWorker
from daemon.executor.worker import Loaded, Ready
from daemon.model_info import ModelInfo
from daemon.pause import WORKERS, Pause

LOOK_SECONDS = 1.0  # between two looks at workers and cluster
FAILURES = 3  # to start a worker, in a row and without any worker, after which a drain gives up
RETRY_SECONDS = 1.0  # before another start after a failure, twice as long after each
MAX_RETRY_SECONDS = 60.0
START_SECONDS = 60.0  # without any worker's process, after which this is told
GIVE_UP_SECONDS = 300.0  # the same, after which a drain gives up
RESTUDY_SECONDS = 60.0  # that a worker has to take changed settings

T = TypeVar("T")

log = structlog.get_logger()


class WorkerEvents(Protocol):
    """Hears what happens to workers."""

    def worker_restarted(self, number: int) -> None: ...

    def worker_computed(self, number: int, samples: int, busy_seconds: float) -> None:
        """A worker ended a batch; its device worked so long on it and since the one before."""


class Crew:
    """The workers of one cluster. Use it `running`."""

    def __init__(
        self,
        cluster: Cluster,
        load: Callable[[bool], Loaded],
        *,
        pause: Pause,
        patient: bool,
        stall_seconds: Callable[[], float],
        events: WorkerEvents,
    ) -> None:
        """`load` loads the model in a worker, and measures how many tokens a batch should have where it is
        told to. Unless `patient`, or once the pause was given up, a cluster that fails ends the run. A worker
        that ends no batch for `stall_seconds` is replaced.
        """
        self.workers: dict[int, RemoteWorker] = {}
        self.wanted = 0
        self.first: Ready | None = None  # that is ready and says how many tokens a batch should have
        self._cluster = cluster
        self._load = load
        self._pause = pause
        self._patient = patient
        self._stall_seconds = stall_seconds
        self._events = events
        self._settings: StudySettings | None = None  # other than those that `load` came with
        self._model: ModelInfo | None = None  # that the first of all loaded
        self._kept: set[int] = set()  # numbers of the workers that are wanted
        self._keepers: dict[int, asyncio.Task[None]] = {}
        self._failure: BaseException | None = None  # that ends the run
        self._held: str | None = None  # the last message of why nothing is computed
        self._failures = 0  # in a row, without any worker
        self._connecting = asyncio.Lock()
        self._changed = asyncio.Event()  # replaced at each change

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Ready]:
        """Connect, start workers, and yield the first one that is ready; the others join as they come.

        Raises ConfigError, and MachineError where a cluster can't be had.
        """
        watch: asyncio.Task[None] | None = None
        try:
            await self._connect()
            watch = asyncio.create_task(self._watch())
            watch.add_done_callback(self._see_end)
            yield await self.wait_for(lambda: self.first)
        finally:
            tasks = [*self._keepers.values(), *([watch] if watch else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for worker in self.workers.values():
                self.drop(worker, "the daemon stopped")
            self._pause.hold(WORKERS, None)
            await self._disconnect()

    @property
    def has_worker(self) -> bool:
        return any(worker.ready is not None for worker in self.workers.values())

    async def wait_for(self, look: Callable[[], T | None]) -> T:
        """The first result of `look` that is not None. Raises what ended the workers for good."""
        while True:
            if self._failure is not None:
                raise self._failure
            if (found := look()) is not None:
                return found
            await self._changed.wait()

    def tell(self) -> None:
        """Have everyone who waits look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def drop(self, worker: RemoteWorker, why: str) -> None:
        """End a worker's process; what it was asked goes to others."""
        worker.lose(why)
        self._cluster.kill(worker.actor)
        self.tell()

    async def is_connected(self) -> bool:
        return await asyncio.to_thread(lambda: self._cluster.is_alive)

    async def restudy(self, settings: StudySettings) -> None:
        """Analyse the next batches under other settings, on the workers of now and those to come."""
        self._settings = settings
        ready = [worker for worker in self.workers.values() if worker.ready is not None]
        await asyncio.gather(*(self._restudy(worker, settings) for worker in ready))

    async def _restudy(self, worker: RemoteWorker, settings: StudySettings) -> None:
        """Have one worker take settings; one that does not answer is replaced."""
        actor = worker.actor
        try:
            async with asyncio.timeout(RESTUDY_SECONDS):
                await worker.call("restudy", settings)
        except (Gone, TimeoutError) as error:
            if worker.actor is actor:
                self.drop(worker, f"it did not take changed settings: {one_line(error)}")

    @property
    def _waits(self) -> bool:
        """Whether trouble is waited out: not in a drain, nor once the daemon is told to stop."""
        return self._patient and not self._pause.given_up

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self.tell()

    def _see_end(self, task: asyncio.Task[None]) -> None:
        """A background task ended: a bug, unless it was cancelled or came to its end."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    async def _connect(self) -> None:
        """See that there is a cluster. Raises MachineError where none can be had."""
        async with self._connecting:
            if await self.is_connected():
                return
            for worker in self.workers.values():
                worker.lose(f"{self._cluster} is gone", charged=False)
            delay, tries = RETRY_SECONDS, 0
            while True:
                await self._disconnect()
                try:
                    await asyncio.to_thread(self._cluster.connect)
                    break
                except MachineError as error:
                    tries += 1
                    if not self._waits and tries >= (FAILURES if self.first else 1):
                        raise
                    self._hold(str(error))
                finally:
                    take_signals_back()
                await self._pause.rest(delay)
                delay = min(2 * delay, MAX_RETRY_SECONDS)
            await self._want()
            log.info("cluster.connected", cluster=str(self._cluster), workers=self.wanted)

    async def _disconnect(self) -> None:
        await asyncio.to_thread(self._cluster.disconnect)
        take_signals_back()

    async def _want(self) -> None:
        """Keep as many workers as are wanted by now, first of all those that are ready."""
        self.wanted = await asyncio.to_thread(self._cluster.wanted)
        known = sorted(self.workers, key=lambda number: (self.workers[number].ready is None, number))
        free = (number for number in itertools.count() if number not in self.workers)
        self._kept = set(itertools.islice(itertools.chain(known, free), self.wanted))
        for number in self._kept:
            worker = self.workers.setdefault(number, RemoteWorker(number))
            if worker.retiring:
                worker.retire(False)
            if number not in self._keepers or self._keepers[number].done():
                keeper = asyncio.create_task(self._keep(worker))
                keeper.add_done_callback(self._see_end)
                self._keepers[number] = keeper

    async def _keep(self, worker: RemoteWorker) -> None:
        """Start a worker, and again whenever it is gone, as long as it is wanted."""
        delay = RETRY_SECONDS
        number = worker.load.number
        while number in self._kept:
            started = False
            try:
                await self._connect()
                await self._start(worker)
                started, delay = True, RETRY_SECONDS
                why = await worker.end()
            except Exception as error:  # whatever loading raises is this worker's trouble, not the daemon's
                why = one_line(error)
                if not isinstance(error, LensdError | Gone):
                    log.debug("load.failed", what=f"worker {number}", exc_info=error)
                if self._gives_up(error):
                    return
                self._hold(f"no worker of {self._cluster} could be started: {why}")
            self.drop(worker, why)
            if number not in self._kept:
                log.info("worker.left", worker=number, node=worker.load.node, reason=why)
                break
            log.warning("worker.restarting", worker=number, node=worker.load.node, reason=why)
            worker.note(restarts=worker.load.restarts + 1)
            self._events.worker_restarted(number)
            if not started:
                await self._pause.rest(delay)
                delay = min(2 * delay, MAX_RETRY_SECONDS)
        self.workers.pop(number, None)

    def _gives_up(self, error: Exception) -> bool:
        """Whether a worker that could not be started ends the run."""
        self._failures = 0 if self.has_worker else self._failures + 1
        if isinstance(error, ConfigError) and self.first is None:
            self._fail(error)
            return True
        if self._waits or (self.has_worker and self.first is not None):
            return False
        if self._failures < FAILURES and self.first is not None:
            return False
        if self.first is None and self._failures < FAILURES and not self._pause.given_up:
            return False
        self._fail(MachineError(f"no worker of {self._cluster} could be started: {one_line(error)}"))
        return True

    async def _start(self, worker: RemoteWorker) -> None:
        """Have a worker load its model. Raises Gone, ConfigError, and MachineError where it does not fit."""
        worker.begin(self._cluster.worker())
        node = await worker.place()
        ready: Ready = await worker.call("load", partial(self._load, worker.load.number == 0))
        model = dataclasses.replace(ready.info, device="", bits="")  # whatever device it is on
        self._model = self._model or model
        if model != self._model:
            raise MachineError(f"{node} loaded another model or dictionary than the first worker")
        applied = None
        while applied is not self._settings:  # which may change meanwhile
            applied = self._settings
            await worker.call("restudy", applied)
        worker.start(ready)
        if self.first is None and ready.max_batch_tokens:
            self.first = ready
        self._failures, self._held = 0, None
        self._pause.hold(WORKERS, None)
        log.info("worker.ready", worker=worker.load.number, node=node)
        self.tell()

    def _hold(self, message: str) -> None:
        """Tell why nothing is computed; a daemon takes up no files meanwhile."""
        if self.has_worker and self.first is not None:
            return
        if message != self._held:
            log.warning("workers.missing", message=message)
        self._held = message
        if self._patient:
            self._pause.hold(WORKERS, message)

    async def _watch(self) -> None:
        """Replace workers that stall, keep as many as are wanted, and see whether the cluster is there."""
        waited = 0.0
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._look_at_workers()
            if self._connecting.locked():
                continue
            try:
                if not await self.is_connected():
                    await self._connect()
                    continue
                await self._want()
                started = any(worker.load.node for worker in self.workers.values())
                waited = 0.0 if started else waited + LOOK_SECONDS
                if waited >= START_SECONDS:
                    await self._tell_none_starts(waited)
            except MachineError as error:
                if not self._waits:
                    self._fail(error)
                self._hold(str(error))

    def _look_at_workers(self) -> None:
        limit, now = self._stall_seconds(), time.monotonic()
        for worker in list(self.workers.values()):
            if worker.in_flight and now - worker.last_progress > limit:
                self.drop(worker, f"it ended no batch for {limit:.0f} s")
            elif worker.load.number not in self._kept:  # it ends its batches first
                worker.retire(True)
                if not worker.in_flight:
                    self.drop(worker, "it is wanted no more")
        if self._pause.given_up and self.first is None:
            self._fail(MachineError("stopped before a worker was ready"))

    async def _tell_none_starts(self, waited: float) -> None:
        """Tell why Ray may have started no worker: there is no room for one, or others have it.

        Raises MachineError where that is not waited out.
        """
        needs = self._cluster.needs
        if not await asyncio.to_thread(self._cluster.room):
            raise MachineError(
                f"{self._cluster} has no node for a worker, which takes {needs}:"
                " add one, or change executor.worker_cpus and executor.worker_gpus"
            )
        others = "see by `ray status` who has its resources"
        message = f"{self._cluster} has started no worker yet, which takes {needs}: {others}"
        if waited >= GIVE_UP_SECONDS:
            raise MachineError(message)
        self._hold(message)


def take_signals_back() -> None:
    """Have Python's handlers called again: Ray puts others in their place as it comes and goes."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.getsignal(number))

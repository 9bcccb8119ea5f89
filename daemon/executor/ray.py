"""The executor of many workers: batches on the processes of a Ray cluster, each with a model of its own.

Ray places, starts and watches workers; this module gives each free one a batch, and the batches of one that
is gone to another. Knows nothing about files.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Protocol, TypeVar

import structlog

from daemon.analysis.column_inputs import StudySettings
from daemon.errors import ConfigError, LensdError, MachineError, WorkersDied
from daemon.executor.ray_cluster import Cluster
from daemon.executor.remote_worker import Gone, RemoteWorker
from daemon.executor.worker import Computed, Loaded, Ready
from daemon.model_info import ModelInfo
from daemon.pause import WORKERS, Pause
from daemon.records import Batch, BatchResult, WorkerLoad

DEATHS = 2  # of workers that had one batch and nothing else, after which it is halved
DEATHS_OF_HALF = 1  # where it is half of such a batch
DEATHS_OF_SAMPLE = 3  # where it is one sample, which is set aside then
LOOK_SECONDS = 1.0  # between two looks at workers and cluster
FAILURES = 3  # to start a worker, in a row and without any worker, after which a drain gives up
RETRY_SECONDS = 1.0  # before another start after a failure, twice as long after each
MAX_RETRY_SECONDS = 60.0
START_SECONDS = 60.0  # without any worker's process, after which this is told

T = TypeVar("T")

log = structlog.get_logger()


class WorkerEvents(Protocol):
    """Hears what happens to workers."""

    def worker_restarted(self, number: int) -> None: ...

    def worker_computed(self, number: int, samples: int, busy_seconds: float) -> None:
        """A worker ended a batch; its device worked so long on it and since the one before."""


class RayExecutor:
    """Workers of a cluster, kept at the number that is wanted. Use it `running`."""

    def __init__(
        self,
        cluster: Cluster,
        load: Callable[[bool], Loaded],
        *,
        pause: Pause,
        patient: bool,
        stall_seconds: float,
        events: WorkerEvents,
    ) -> None:
        """`load` loads the model in a worker; it may measure how many tokens a batch should have where it is
        told to. Unless `patient`, a cluster that fails ends the run. A worker that ends no batch for
        `stall_seconds` is replaced.
        """
        self.stall_seconds = stall_seconds
        self._cluster = cluster
        self._load = load
        self._pause = pause
        self._patient = patient
        self._events = events
        self._settings: StudySettings | None = None  # other than those that `load` came with
        self._workers: dict[int, RemoteWorker] = {}
        self._keepers: dict[int, asyncio.Task[None]] = {}
        self._wanted = 0
        self._first: Ready | None = None
        self._failure: BaseException | None = None  # that ends the run
        self._held: str | None = None  # the last message of why nothing is computed
        self._failures = 0  # in a row, without any worker
        self._connecting = asyncio.Lock()
        self._changed = asyncio.Event()  # replaced at each change

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Ready]:
        """Connect, start workers, and yield the first one that is ready; the others join as they come.

        Raises ConfigError, and MachineError where a cluster can't be had and the executor is not patient.
        """
        watch: asyncio.Task[None] | None = None
        try:
            await self._connect()
            watch = asyncio.create_task(self._watch())
            watch.add_done_callback(self._see_end)
            yield await self._wait_for(lambda: self._first)
        finally:
            tasks = [*self._keepers.values(), *([watch] if watch else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for worker in self._workers.values():
                self._drop(worker, "the daemon stopped")
            self._pause.hold(WORKERS, None)
            await asyncio.to_thread(self._cluster.disconnect)

    @property
    def info(self) -> ModelInfo:
        assert self._first is not None, "a worker is ready before anything is asked of it"
        return self._first.info

    @property
    def shares_prefixes(self) -> bool:
        assert self._first is not None, "a worker is ready before anything is asked of it"
        return self._first.shares_prefixes

    @property
    def slots(self) -> int:
        return sum(worker.slots for worker in self._workers.values())

    async def more_slots(self, than: int) -> None:
        """Wait until there are more. Raises what ended the workers for good."""
        await self._wait_for(lambda: self.slots > than or None)

    @property
    def workers_wanted(self) -> int:
        return self._wanted

    def workers(self) -> tuple[WorkerLoad, ...]:
        return tuple(self._workers[number].load for number in sorted(self._workers))

    async def run(self, batch: Batch) -> BatchResult:
        """Compute a batch on a worker; on another where that is lost, which it then has for itself.

        Raises OutOfMemory, and WorkersDied once so many workers died that had this batch and nothing else.
        """
        inputs = batch.inputs.without_texts()
        deaths, enough = 0, deaths_of(batch)
        alone = batch.suspect
        while True:
            worker = await (self._place_alone() if alone else self._place())
            try:
                computed = await worker.run(inputs)
            except Gone as gone:
                log.warning("worker.batch_lost", worker=worker.load.number, samples=len(batch.entries))
                deaths += gone.alone and await self._is_connected()
                if deaths == enough:
                    raise WorkersDied(f"{deaths} workers died of it, the last one: {gone}") from None
            else:
                self._count(worker, computed, len(batch.entries))
                return computed.result
            finally:
                if alone:
                    worker.reserved = False
                self._tell()
            alone = True

    async def restudy(self, settings: StudySettings) -> None:
        """Analyse the next batches under other settings, on the workers of now and those to come."""
        self._settings = settings
        ready = [worker for worker in self._workers.values() if worker.ready is not None]
        calls = (worker.call("restudy", settings) for worker in ready)
        for worker, answer in zip(ready, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(answer, Gone):
                self._drop(worker, str(answer))
            elif isinstance(answer, BaseException):
                raise answer

    async def _place(self) -> RemoteWorker:
        """The worker with the fewest batches that has a free slot, as soon as there is one."""

        def choose() -> RemoteWorker | None:
            free = [worker for worker in self._workers.values() if worker.in_flight < worker.slots]
            return min(free, key=lambda worker: worker.in_flight, default=None)

        return await self._wait_for(choose)

    async def _place_alone(self) -> RemoteWorker:
        """A worker that has no other batch and is given none: reserved."""

        def reserve() -> RemoteWorker | None:
            ready = [worker for worker in self._workers.values() if worker.slots]
            return min(ready, key=lambda worker: worker.in_flight, default=None)

        while True:
            worker = await self._wait_for(reserve)
            worker.reserved = True
            await self._wait_for(worker.idle_or_gone)
            if worker.ready is not None:
                return worker
            worker.reserved = False

    async def _wait_for(self, look: Callable[[], T | None]) -> T:
        """The first result of `look` that is not None. Raises what ended the workers for good."""
        while True:
            if self._failure is not None:
                raise self._failure
            if (found := look()) is not None:
                return found
            await self._changed.wait()

    def _tell(self) -> None:
        """Have everyone who waits look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._tell()

    def _see_end(self, task: asyncio.Task[None]) -> None:
        """A background task ended: a bug, unless it was cancelled or came to its end."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _count(self, worker: RemoteWorker, computed: Computed, samples: int) -> None:
        load = worker.load
        busy = max(0.0, computed.busy_seconds - worker.busy_before)
        worker.busy_before = computed.busy_seconds
        worker.note(
            batches=load.batches + 1,
            samples=load.samples + samples,
            busy_seconds=load.busy_seconds + busy,
            memory_bytes=computed.memory_bytes,
        )
        self._events.worker_computed(load.number, samples, busy)

    # The cluster, and its workers one by one.

    async def _connect(self) -> None:
        """See that there is a cluster. Raises MachineError where none can be had, unless patient."""
        async with self._connecting:
            if await self._is_connected():
                return
            for worker in self._workers.values():
                worker.lose(f"{self._cluster} is gone")
            await asyncio.to_thread(self._cluster.disconnect)
            delay, tries = RETRY_SECONDS, 0
            while True:
                try:
                    await asyncio.to_thread(self._cluster.connect)
                    take_signals_back()
                    break
                except MachineError as error:
                    tries += 1
                    if not self._patient and tries == (FAILURES if self._first else 1):
                        raise
                    self._hold(str(error))
                await asyncio.sleep(delay)
                delay = min(2 * delay, MAX_RETRY_SECONDS)
            await self._want()
            log.info("cluster.connected", cluster=str(self._cluster), workers=self._wanted)

    async def _is_connected(self) -> bool:
        return await asyncio.to_thread(lambda: self._cluster.is_alive)

    async def _want(self) -> None:
        """Keep as many workers as are wanted by now."""
        self._wanted = await asyncio.to_thread(self._cluster.wanted)
        for number in range(self._wanted):
            worker = self._workers.setdefault(number, RemoteWorker(number))
            if number not in self._keepers or self._keepers[number].done():
                keeper = asyncio.create_task(self._keep(worker))
                keeper.add_done_callback(self._see_end)
                self._keepers[number] = keeper

    async def _keep(self, worker: RemoteWorker) -> None:
        """Start a worker, and again whenever it is gone, as long as it is wanted."""
        delay = RETRY_SECONDS
        number = worker.load.number
        while number < self._wanted:
            try:
                await self._connect()
                await self._start(worker)
                self._failures, delay = 0, RETRY_SECONDS
                why = await worker.end()
            except (ConfigError, MachineError, Gone) as error:
                why = str(error)
                self._failures += 1
                if self._gives_up(error):
                    return
                self._hold(f"no worker of {self._cluster} could be started: {why}")
            self._drop(worker, why)
            if number >= self._wanted:
                log.info("worker.left", worker=number, node=worker.load.node, reason=why)
                break
            log.warning("worker.restarting", worker=number, node=worker.load.node, reason=why)
            worker.note(restarts=worker.load.restarts + 1)
            self._events.worker_restarted(number)
            if self._failures:
                await asyncio.sleep(delay)
                delay = min(2 * delay, MAX_RETRY_SECONDS)
        self._workers.pop(number, None)

    def _gives_up(self, error: LensdError | Gone) -> bool:
        """Whether a worker that could not be started ends the run."""
        if isinstance(error, ConfigError) and self._first is None:
            self._fail(error)
            return True
        if self._patient or (self._first is not None and self.slots):
            return False
        if self._failures >= FAILURES:
            self._fail(MachineError(f"no worker of {self._cluster} could be started: {error}"))
        return self._failures >= FAILURES

    async def _start(self, worker: RemoteWorker) -> None:
        """Have a worker load its model. Raises Gone, ConfigError, and MachineError where it does not fit."""
        worker.begin(self._cluster.worker())
        node = await worker.place()
        ready: Ready = await worker.call("load", partial(self._load, worker.load.number == 0))
        if self._first is not None and model_of(ready) != model_of(self._first):
            raise MachineError(f"{node} loaded another model or dictionary than the first worker")
        if self._settings is not None:
            await worker.call("restudy", self._settings)
        worker.ready, worker.busy_before = ready, ready.busy_seconds
        worker.note(state="ready")
        if self._first is None and ready.max_batch_tokens:
            self._first = ready
        self._held = None
        self._pause.hold(WORKERS, None)
        log.info("worker.ready", worker=worker.load.number, node=node)
        self._tell()

    def _drop(self, worker: RemoteWorker, why: str) -> None:
        """End a worker's process; what it was asked goes to others."""
        worker.lose(why)
        self._cluster.kill(worker.actor)
        self._tell()

    def _hold(self, message: str) -> None:
        """Tell why nothing is computed; a daemon takes up no files meanwhile."""
        if self.slots:
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
            now = time.monotonic()
            for worker in list(self._workers.values()):
                if worker.in_flight and now - worker.last_progress > self.stall_seconds:
                    self._drop(worker, f"it ended no batch for {self.stall_seconds:.0f} s")
                elif worker.load.number >= self._wanted:
                    self._retire(worker)
            if self._connecting.locked():
                continue
            if not await self._is_connected():
                await self._connect()
                continue
            await self._want()
            started = any(worker.load.node for worker in self._workers.values())
            waited = 0.0 if started else waited + LOOK_SECONDS
            if waited >= START_SECONDS:
                await self._tell_none_starts()

    def _retire(self, worker: RemoteWorker) -> None:
        """Let a worker that is wanted no more end its batches; then end it."""
        worker.note(state="draining")
        worker.reserved = True
        if not worker.in_flight:
            self._drop(worker, "it is wanted no more")

    async def _tell_none_starts(self) -> None:
        """Tell why Ray may have started no worker: there is no room for one, or others have it."""
        needs = self._cluster.needs
        if await asyncio.to_thread(self._cluster.room):
            others = "see by `ray status` who has its resources"
            self._hold(f"{self._cluster} has started no worker yet, which takes {needs}: {others}")
            return
        message = (
            f"{self._cluster} has no node for a worker, which takes {needs}:"
            " add one, or change executor.worker_cpus and executor.worker_gpus"
        )
        if self._patient:
            self._hold(message)
        else:
            self._fail(MachineError(message))


def take_signals_back() -> None:
    """Have Python's handlers called again: Ray puts its own in their place when it connects."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.getsignal(number))


def deaths_of(batch: Batch) -> int:
    """How many workers must die of a batch before it is told."""
    if len(batch.entries) == 1:
        return DEATHS_OF_SAMPLE
    return DEATHS_OF_HALF if batch.suspect else DEATHS


def model_of(ready: Ready) -> ModelInfo:
    """The model whatever device it is on."""
    return dataclasses.replace(ready.info, device="")

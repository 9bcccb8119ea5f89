"""The executor of many workers: batches on the processes of a Ray cluster, each with a model of its own.

Each free worker is given a batch, and the batches of a lost one go to another. Knows nothing about files.
"""

from __future__ import annotations

import structlog

from daemon.analysis.column_inputs import StudySettings
from daemon.errors import WorkersDied
from daemon.executor.crew import Crew, WorkerEvents
from daemon.executor.remote_worker import Gone, RemoteWorker
from daemon.executor.worker import Computed, Ready
from daemon.model_info import ModelInfo
from daemon.records import Batch, BatchResult, WorkerLoad

DEATHS = 2  # of workers that had one batch and nothing else, after which it is halved
DEATHS_OF_HALF = 1  # where it is half of such a batch
DEATHS_OF_SAMPLE = 3  # where it is one sample, which is set aside then

log = structlog.get_logger()


class RayExecutor:
    """Gives batches to the workers of a cluster."""

    def __init__(self, crew: Crew, events: WorkerEvents) -> None:
        """`crew` is `running` while batches are."""
        self._crew = crew
        self._events = events

    @property
    def _first(self) -> Ready:
        assert self._crew.first is not None, "a worker is ready before anything is asked of it"
        return self._crew.first

    @property
    def info(self) -> ModelInfo:
        return self._first.info

    @property
    def shares_prefixes(self) -> bool:
        return self._first.shares_prefixes

    @property
    def slots(self) -> int:
        """Batches that workers take or, of those that take no others, have."""
        return sum(worker.slots or worker.in_flight for worker in self._crew.workers.values())

    async def more_slots(self, than: int) -> None:
        """Wait until there are more. Raises what ended the workers for good."""
        await self._crew.wait_for(lambda: self.slots > than or None)

    @property
    def workers_wanted(self) -> int:
        return self._crew.wanted

    def workers(self) -> tuple[WorkerLoad, ...]:
        return tuple(worker.load for _, worker in sorted(self._crew.workers.items()))

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
                deaths += gone.alone and await self._crew.is_connected()
                if deaths == enough:
                    raise WorkersDied(f"{deaths} workers died of it, the last one: {gone}") from None
            else:
                self._count(worker, computed, len(batch.entries))
                return computed.result
            finally:
                if alone:
                    worker.reserved = False
                self._crew.tell()
            alone = True

    async def restudy(self, settings: StudySettings) -> None:
        """Analyse the next batches under other settings, on the workers of now and those to come."""
        await self._crew.restudy(settings)

    async def _place(self) -> RemoteWorker:
        """The worker with the fewest batches that has a free slot, as soon as there is one."""

        def choose() -> RemoteWorker | None:
            free = [worker for worker in self._crew.workers.values() if worker.in_flight < worker.slots]
            return min(free, key=lambda worker: worker.in_flight, default=None)

        return await self._crew.wait_for(choose)

    async def _place_alone(self) -> RemoteWorker:
        """A worker that has no other batch and is given none: reserved."""

        def reserve() -> RemoteWorker | None:
            ready = [worker for worker in self._crew.workers.values() if worker.slots]
            return min(ready, key=lambda worker: worker.in_flight, default=None)

        while True:
            worker = await self._crew.wait_for(reserve)
            worker.reserved = True
            try:
                await self._crew.wait_for(worker.idle_or_gone)
            except BaseException:
                worker.reserved = False
                raise
            if worker.ready is not None:
                return worker
            worker.reserved = False

    def _count(self, worker: RemoteWorker, computed: Computed, samples: int) -> None:
        self._events.worker_computed(worker.load.number, samples, worker.count(computed, samples))


def deaths_of(batch: Batch) -> int:
    """How many workers must die of a batch before it is told."""
    if len(batch.entries) == 1:
        return DEATHS_OF_SAMPLE
    return DEATHS_OF_HALF if batch.suspect else DEATHS

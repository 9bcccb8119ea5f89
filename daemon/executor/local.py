"""The executor of one process: batches on the one thread that owns the device.

Knows nothing about files.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from daemon.analysis.column_inputs import StudySettings
from daemon.errors import OutOfMemory
from daemon.executor.device_thread import DeviceThread, telling_out_of_memory
from daemon.executor.runner import BatchRunner, BegunBatch
from daemon.model.buffers import lasting
from daemon.model_info import ModelInfo
from daemon.records import Batch, BatchResult, SampleBatch, WorkerLoad

OVERLAPPED_SLOTS = 3  # one batch that is read out, one that the device computes, one that waits for it


@dataclass(frozen=True, slots=True)
class Running:
    """A batch that the device computes, and who waits for its result."""

    begun: BegunBatch
    result: Future[BatchResult]


class LocalExecutor:
    """Runs batches in this process; on CUDA a batch begins before the one ahead of it is read out."""

    def __init__(self, device: DeviceThread, runner: BatchRunner) -> None:
        self._device = device
        self._runner = runner
        self._overlaps = runner.can_overlap
        self._running: Running | None = None  # on the device thread

    @property
    def info(self) -> ModelInfo:
        return self._runner.info

    @property
    def shares_prefixes(self) -> bool:
        return self._runner.engine.shares_prefixes

    @property
    def slots(self) -> int:
        return OVERLAPPED_SLOTS if self._overlaps else 1

    async def more_slots(self, than: int) -> None:
        """Slots are free again only as batches end, so this never returns."""
        await asyncio.Event().wait()

    @property
    def workers_wanted(self) -> int:
        return 0

    def workers(self) -> tuple[WorkerLoad, ...]:
        return ()

    async def run(self, batch: Batch) -> BatchResult:
        """Compute a batch.

        Raises OutOfMemory where the device's memory is too small for it; `shared` where it held two batches,
        after which it takes one at a time.
        """
        return await self.compute(batch.inputs)

    async def compute(self, batch: SampleBatch) -> BatchResult:
        """`run` of samples alone."""
        if not self._overlaps:
            return await self._device.call(lambda: self._run_alone(batch))
        result: Future[BatchResult] = Future()
        await self._device.call(lambda: self._advance(batch, result))
        return await asyncio.wrap_future(result)

    def _run_alone(self, batch: SampleBatch) -> BatchResult:
        """Run a batch, after finishing the one that is under way since batches overlapped."""
        if self._running is not None:
            running, self._running = self._running, None
            with self._failing(running.result):
                running.result.set_result(self._runner.finish(running.begun))
        return self._runner.run(batch)

    async def restudy(self, settings: StudySettings) -> None:
        """Analyse the next batches under other settings."""

        def change() -> None:
            with lasting():
                self._runner = BatchRunner(self._runner.engine, settings)

        await self._device.call(change)

    def _advance(self, batch: SampleBatch, result: Future[BatchResult]) -> None:
        """Begin a batch and finish the one before it; finish this one too where no other waits.

        Runs on the device thread.
        """
        before, self._running = self._running, None
        with self._failing(result, before):
            self._running = Running(self._runner.begin(batch), result)
            if before is not None:
                before.result.set_result(self._runner.finish(before.begun))
        if self._running is not None and not self._device.has_waiting_calls:
            running, self._running = self._running, None
            with self._failing(running.result):
                running.result.set_result(self._runner.finish(running.begun))

    @contextlib.contextmanager
    def _failing(self, result: Future[BatchResult], before: Running | None = None) -> Iterator[None]:
        """Give an error to everyone whose batch was on the device."""
        try:
            with telling_out_of_memory():
                yield
        except Exception as error:
            self._running = None
            shared = before is not None
            if isinstance(error, OutOfMemory) and shared:
                error = OutOfMemory(str(error), shared=True)
                self._overlaps = False
            for waiting in (result, before.result if before else None):
                if waiting is not None and not waiting.done():
                    waiting.set_exception(error)

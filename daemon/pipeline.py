"""The main loop: five stages on bounded channels.

    source -> read -> [parts] -> tokenize -> [tokenized] -> compute -> [finished] -> write
                                                            sink <- publish <- [written] <-

Each stage closes its channel on normal return only: a stage that crashes takes the whole group down instead
of looking like a clean end. Knows ports and messages; no folders, no device, no signals and no settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from daemon.batching.assembler import Assembler
from daemon.batching.batcher import Batcher
from daemon.channel import Channel, EndOfStream
from daemon.errors import FileError, MachineError, OutOfMemory, SyncFailed, WorkersDied
from daemon.ports import Executor, Observer, OpenFile, Sink, Source, Tokenizer
from daemon.records import (
    Arrival,
    Batch,
    Claim,
    FileFailed,
    FinishedFile,
    FinishedPart,
    InputFile,
    KeptPart,
    Outcome,
    Part,
    Queued,
    TokenizedPart,
)
from daemon.settlement import Settlement

SAMPLE_BYTES = 1024  # that a sample takes in memory besides its texts, until it is written
MAX_WAIT_SECONDS = 0.05  # that a partial batch waits for more samples, where some are on their way
GROUP_FILES = 256  # in one group that is written, flushed and published together, at most
GROUP_SECONDS = 0.2  # that a group waits to fill, at most


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may wait between the stages."""

    queued_text_bytes: int
    queued_tokens: int  # tokenized and waiting; planned together
    queued_result_bytes: int
    max_attempts: int  # begun on one file, after which it fails


class Pipeline:
    """Everything between a source and a sink. Run it once."""

    def __init__(
        self,
        source: Source,
        executor: Executor,
        sink: Sink,
        *,
        tokenizer: Tokenizer,
        batcher: Batcher,
        observer: Observer,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.source = source
        self.executor = executor
        self.batches_in_flight = 0  # at the executor
        self.sink = sink
        self.tokenizer = tokenizer
        self.batcher = batcher
        self.observer = observer
        self.limits = limits
        self.clock = clock
        self.settlement = Settlement(source, sink)
        self.assembler = Assembler(tuple(sae.d_out for sae in executor.info.saes))
        self.parts: Channel[Part | KeptPart | FileFailed] = Channel(limits.queued_text_bytes)
        self.tokenized: Channel[TokenizedPart | KeptPart | FileFailed] = Channel(limits.queued_tokens)
        self.finished: Channel[Arrival] = Channel(limits.queued_result_bytes)
        self.written: Channel[FinishedFile] = Channel(limits.queued_result_bytes)
        self._settled: dict[str, asyncio.Event] = {}  # by unit under way; set when its outcome is known
        self._requeued = 0  # files
        self._admitting = False  # claimed files are being opened
        self._publishing = 0  # files written and not settled
        self._on_their_way = 0  # items between being read and reaching the batcher
        self._partial_since: float | None = None  # since when a partial batch has waited for a free slot

    async def run(self, stop: asyncio.Event, *, once: bool) -> None:
        """Take files until `stop` is set, with `once` until the source is drained; finish what was taken."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.read(stop, once), name="read")
                group.create_task(self.tokenize(), name="tokenize")
                group.create_task(self.compute(), name="compute")
                group.create_task(self.write(), name="write")
                group.create_task(self.publish(), name="publish")
        except asyncio.CancelledError:
            await self.give_back(flush=True)
            raise
        except ExceptionGroup as group:  # a bug is not given back: the file that met it is to be counted
            if group.subgroup(MachineError) is not None:
                await self.give_back(flush=group.subgroup(SyncFailed) is None)
            raise
        finally:
            self.sink.close()

    async def give_back(self, *, flush: bool) -> None:
        """Put every claimed file back; stored parts stay. Without `flush`, sync nothing."""
        self.sink.close()
        await self.source.give_back_all(flush=flush)

    async def read(self, stop: asyncio.Event, once: bool) -> None:
        """Stage 1: claim files and read them as parts, until none is left and none comes back."""
        while True:
            requeued = self._requeued
            async for claims in self.source.claims(stop, once):
                # An earlier attempt at this file may have ended the process: it runs alone.
                suspect = claims[0].attempt > 1
                if suspect:
                    await self.wait_settled()
                self._admitting = True
                await self.admit_all(claims)
                self._admitting = False
                if suspect:
                    await self.wait_settled()
            await self.wait_settled()
            if stop.is_set() or self._requeued == requeued:
                break
        await self.parts.close()

    async def wait_settled(self) -> None:
        """Wait until every file that was taken up has its outcome."""
        for settled in list(self._settled.values()):
            await settled.wait()

    async def admit_all(self, claims: Sequence[Claim]) -> None:
        for opened in await self.source.open(claims):
            with contextlib.closing(opened):
                await self.admit(opened)

    async def admit(self, opened: OpenFile) -> None:
        """Read a file part by part, or settle it at once.

        The same content under two names is computed once: the second waits for the first.
        """
        file = opened.file
        if file is None:
            assert opened.error is not None, "a file that can't be used says why"
            self.settle(await self.settlement.refuse(opened.claim, opened.error))
            return
        while (other := self._settled.get(file.unit)) is not None:
            await other.wait()
        stored = await self.sink.stored(file.unit)
        if stored.published is not None:
            self.settle(await self.settlement.duplicate(file, stored.published))
        elif file.claim.attempt > self.limits.max_attempts:
            self.settle(await self.settlement.fail(*attempts_exhausted(file, self.limits.max_attempts)))
        else:
            self._settled[file.unit] = asyncio.Event()
            self.observer.taken_up(file)
            enqueued = 0
            try:
                async for part in opened.parts(stored.extents):
                    await self.enqueue(part)
                    enqueued += 1
            except FileError as error:
                await self.fail(file, error, enqueued)

    async def enqueue(self, part: Part | KeptPart) -> None:
        self.observer.read(part)
        self._on_their_way += 1
        await self.parts.put(part, text_bytes(part) if isinstance(part, Part) else 1)

    async def fail(self, file: InputFile, error: FileError, parts: int) -> None:
        """Have a file fail once `parts` of it, which are on their way, have come to the sink."""
        if parts:
            self._on_their_way += 1
            await self.parts.put(FileFailed(file, error, parts))
        else:
            self.settle(await self.settlement.fail(file, error))

    async def tokenize(self) -> None:
        """Stage 2: texts to token ids, off the event loop."""
        async for items in self.parts.batches():
            parts = [item for item in items if isinstance(item, Part)]
            done = await asyncio.to_thread(self.tokenizer.tokenize, parts)
            self.observer.tokenized(done)
            tokenized = iter(done)
            await self.tokenized.put_all(
                (part := next(tokenized), part.n_tokens) if isinstance(item, Part) else (item, 1)
                for item in items
            )
        await self.tokenized.close()

    async def compute(self) -> None:
        """Stage 3: whenever the executor has a free slot, give it the best batch of what is there."""
        running: set[asyncio.Task[None]] = set()
        try:
            while not await self.gather() or self.batcher or running:
                if self.batcher and len(running) < self.executor.slots and not self.should_wait():
                    began = time.perf_counter()
                    batch = self.batcher.take()
                    running.add(asyncio.create_task(self.run_batch(batch, time.perf_counter() - began)))
                    self._partial_since = None
                else:
                    running = await self.wait_for_change(running)
        finally:
            for task in running:
                task.cancel()
        await self.finished.close()

    async def gather(self) -> bool:
        """Take what is tokenized, up to the window. True once everything was taken."""
        while self.batcher.tokens < self.window:
            try:
                item = self.tokenized.get_nowait()
            except EndOfStream:
                return True
            if item is None:
                return False
            self._on_their_way -= 1
            if not isinstance(item, TokenizedPart):
                await self.finished.put(item)
            elif (finished := self.assembler.open(item)) is not None:
                await self.finished.put(finished, finished.nbytes)
            else:
                self.batcher.add(item)
        return False

    def should_wait(self) -> bool:
        """Whether the next batch is a partial one that others may fill in a moment."""
        if not self.batcher.is_partial or not self.has_room or not self.more_comes:
            return False
        if self._partial_since is None:
            self._partial_since = self.clock()
        return self.clock() - self._partial_since < MAX_WAIT_SECONDS

    @property
    def has_room(self) -> bool:
        """Whether the batcher can take more samples, and there may be some."""
        return self.batcher.tokens < self.window and not self.tokenized.ended

    @property
    def window(self) -> int:
        """How many tokens the batcher holds: two batches at least for each slot beyond the first."""
        more_slots = max(0, self.executor.slots - 1)
        return max(self.limits.queued_tokens, 2 * more_slots * self.batcher.max_batch_tokens)

    @property
    def more_comes(self) -> bool:
        return bool(self._admitting or self._on_their_way or self.source.backlog)

    async def wait_for_change(self, running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
        """Wait until a batch ends, a part arrives, a slot comes free or a partial batch has waited enough.

        Returns the batches that still run. Raises what a batch raised.
        """
        changes: set[asyncio.Task[None]] = set()
        if self.has_room:
            changes.add(asyncio.create_task(self.tokenized.wait()))
        has_slot = len(running) < self.executor.slots
        if self.batcher and not has_slot:
            changes.add(asyncio.create_task(self.executor.more_slots(len(running))))
        try:
            done, _ = await asyncio.wait(
                running | changes,
                timeout=MAX_WAIT_SECONDS if self._partial_since is not None and has_slot else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for change in changes:
                change.cancel()
        for task in done:
            task.result()
        return running - done

    async def run_batch(self, batch: Batch, plan_seconds: float) -> None:
        """Run a batch and hand on the parts that it finishes.

        A batch that is too large for the device comes back as smaller ones; a sample that alone is too large
        becomes a reject.
        """
        self.batches_in_flight += 1
        try:
            result = await self.executor.run(batch)
        except OutOfMemory as error:
            finished = self.out_of_memory(batch, error)
        except WorkersDied as error:
            finished = self.workers_died(batch, error)
        else:
            self.observer.computed(batch, result, plan_seconds)
            finished = self.assembler.scatter(batch, result, plan_seconds)
        finally:
            self.batches_in_flight -= 1
        await self.finished.put_all((part, part.nbytes) for part in finished)

    def out_of_memory(self, batch: Batch, error: OutOfMemory) -> list[FinishedPart]:
        """Run the batch again under a lower limit; reject a sample that does not fit alone.

        Returns the parts that this finishes.
        """
        if not error.shared and len(batch.entries) == 1:
            self.observer.out_of_memory(batch, str(error), None)
            return self.assembler.set_aside(batch.entries[0], "out_of_memory", str(error))
        if error.shared:
            self.batcher.put_back(batch)
        else:
            self.batcher.shrink(batch)
        self.observer.out_of_memory(batch, str(error), self.batcher.max_batch_tokens)
        return []

    def workers_died(self, batch: Batch, error: WorkersDied) -> list[FinishedPart]:
        """Run the halves of the batch; reject a sample that alone made workers die.

        Returns the parts that this finishes.
        """
        self.observer.workers_died(batch, str(error))
        if len(batch.entries) == 1:
            return self.assembler.set_aside(batch.entries[0], "worker_died", str(error))
        self.batcher.halve(batch)
        return []

    async def write(self) -> None:
        """Stage 4: parts to the sink; a file's last part completes its results."""
        async for arrivals in self.finished.batches(self.group_files, GROUP_SECONDS):
            files = await self.sink.write(arrivals)
            self._publishing += len(files)
            await self.written.put_all((file, file.nbytes) for file in files)
        await self.written.close()

    def group_files(self) -> int:
        """How many files are worth waiting for: of those under way, what one group holds."""
        return min(GROUP_FILES, len(self._settled) - self._publishing)

    async def publish(self) -> None:
        """Stage 5: results to disk and to their final names, all that are there together."""
        async for files in self.written.batches():
            outcomes = await self.settlement.publish(files)
            self._publishing -= len(outcomes)
            self.settle(*outcomes)

    def settle(self, *outcomes: Outcome) -> None:
        """Tell whoever waits for these files."""
        self.observer.settled(outcomes)
        for outcome in outcomes:
            self._requeued += outcome.kind == "requeued"
            if outcome.unit is not None and (settled := self._settled.pop(outcome.unit, None)) is not None:
                settled.set()

    def queued(self) -> Queued:
        """Count the items that wait between the stages."""
        return Queued(
            tokenize=len(self.parts),
            compute=len(self.tokenized) + len(self.batcher),
            write=len(self.finished) + len(self.written),
            tokens=self.tokenized.weight + self.batcher.tokens,
        )


def attempts_exhausted(file: InputFile, attempts: int) -> tuple[InputFile, FileError]:
    """The file with its count of attempts from before this claim, and the error that it fails with."""
    error = FileError(
        "attempts_exhausted",
        f"work on it was begun {attempts} times and ended with the process:"
        " see the log of each, then drop it again",
    )
    claim = dataclasses.replace(file.claim, attempt=file.claim.attempt - 1)
    return dataclasses.replace(file, claim=claim), error


def text_bytes(part: Part) -> int:
    """About what a part weighs in the queue: the characters of its texts, and what is around them."""
    return sum(SAMPLE_BYTES + sum(map(len, sample.texts)) for sample in part.samples)

"""The main loop: five stages on bounded channels.

    inbox -> read -> [parts] -> tokenize -> [tokenized] -> compute -> [finished] -> write
                                                          outbox <- publish <- [written] <-

Each stage closes its channel on normal return only, so that a stage which crashes takes the whole group
down instead of looking like a clean end. Knows no signals, no HTTP and no configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from daemon.channel import Channel, EndOfStream
from daemon.compute.assembly import Assembly
from daemon.compute.device import Device, Study
from daemon.compute.packing import Batch, Packer
from daemon.errors import FileError, MachineError, OutOfMemory, SyncFailed
from daemon.intake.inbox import Inbox
from daemon.intake.opening import OpenedFile, Opener
from daemon.intake.reader import ReadLimits, read_parts
from daemon.intake.tokenizer import Tokenizer
from daemon.observe.metrics import Metrics
from daemon.observe.progress import Progress
from daemon.observe.workload import Workload
from daemon.output.delivery import Arrival, Delivery, Outcome
from daemon.output.departures import Departures
from daemon.output.finished import FinishedPart
from daemon.output.staging import FileFailed, Unit
from daemon.pause import Pause
from daemon.records import Claim, KeptPart, Part, Recipe, TokenizedPart

SAMPLE_BYTES = 1024  # that a sample takes in memory besides its texts, until it is written
MAX_WAIT_SECONDS = 0.05  # that a thin batch waits for company, where some is on its way
GROUP_FILES = 256  # written, flushed and published together, where so many are on their way,
GROUP_SECONDS = 0.2  # and come within this time

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may wait between the stages."""

    queued_text_bytes: int
    queued_tokens: int  # tokenized and ahead of the device, sorted by length together
    queued_result_bytes: int
    max_attempts: int  # begun on one file, after which it fails


@dataclass(slots=True)
class Tally:
    """What a run did, for its exit code and its last line."""

    committed: int = 0
    duplicate: int = 0
    requeued: int = 0
    failed: int = 0
    left: int = 0  # inputs that lay in the inbox at the end: not to be claimed, or not whole
    rows: int = 0
    rejects: int = 0


class Pipeline:
    """Everything between an open inbox and an open outbox. Run it once."""

    def __init__(
        self,
        *,
        inbox: Inbox,
        delivery: Delivery,
        tokenizer: Tokenizer,
        device: Device,
        study: Study,
        packer: Packer,
        recipe: Recipe | None,
        read_limits: ReadLimits,
        limits: Limits,
        results_key: str,
        pause: Pause,
        tally: Tally,
        metrics: Metrics,
        progress: Progress,
        on_outcomes: Callable[[Sequence[Outcome]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`results_key` stands for the model and every setting that changes results."""
        self.inbox = inbox
        self.delivery = delivery
        self.tokenizer = tokenizer
        self.device = device
        self.study = study
        self.packer = packer
        self.recipe = recipe
        self.read_limits = read_limits
        self.limits = limits
        self.pause = pause
        self.opener = Opener(
            recipe=recipe,
            limits=read_limits,
            results_key=results_key,
            published=delivery.published,
        )
        self.metrics = metrics
        self.progress = progress
        self.on_outcomes = on_outcomes
        self.clock = clock
        self.tally = tally
        self.departures = Departures(study.engine.info)
        self.parts: Channel[Part | KeptPart | FileFailed] = Channel(limits.queued_text_bytes)
        self.tokenized: Channel[TokenizedPart | KeptPart | FileFailed] = Channel(limits.queued_tokens)
        self.finished: Channel[Arrival] = Channel(limits.queued_result_bytes)
        self.written: Channel[Unit] = Channel(limits.queued_result_bytes)
        self.workload = Workload()
        self._units: dict[str, asyncio.Event] = {}  # under way; set when their outcome is known
        self._taking = False  # claimed files are being opened
        self._publishing = 0  # files written and not settled
        self._on_their_way = 0  # items between being read and reaching the device

    async def run(self, stop: asyncio.Event, *, once: bool) -> Tally:
        """Take files until `stop` is set, with `once` until the inbox is drained; finish what was taken."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.read(stop, once), name="read")
                group.create_task(self.tokenize(), name="tokenize")
                group.create_task(self.compute(), name="compute")
                group.create_task(self.write(), name="write")
                group.create_task(self.publish(), name="publish")
        except asyncio.CancelledError:
            await self.delivery.give_back()
            raise
        except ExceptionGroup as group:  # a bug is not given back: the file that met it is to be counted
            if group.subgroup(MachineError) is not None:
                await self.delivery.give_back(flush=group.subgroup(SyncFailed) is None)
            raise
        return self.tally

    async def read(self, stop: asyncio.Event, once: bool) -> None:
        """Stage 1: claim files and read them as parts, until none is left and none comes back."""
        while True:
            requeued = self.tally.requeued
            async for claims in self.inbox.claims(stop, once):
                # Where work on a file ended with the process, nothing else is to be under way this time.
                suspect = claims[0].attempt > 1
                if suspect:
                    await self.idle()
                self._taking = True
                await self.take(claims)
                self._taking = False
                if suspect:
                    await self.idle()
            await self.idle()
            if stop.is_set() or self.tally.requeued == requeued:
                break
        self.tally.left = self.inbox.left
        await self.parts.close()

    async def idle(self) -> None:
        """Wait until every file that was taken has its outcome."""
        for under_way in list(self._units.values()):
            await under_way.wait()

    async def take(self, claims: Sequence[Claim]) -> None:
        """Hand claimed files on, part by part; or settle them at once."""
        for opened in await self.pause.outlast(
            lambda: asyncio.to_thread(self.opener.open_all, claims), "read"
        ):
            with contextlib.closing(opened):
                if opened.error is not None:
                    self.settle(await self.delivery.fail(opened.claim, opened.error, opened.source))
                elif await self.begin(opened):
                    await self.hand_on(opened)

    async def begin(self, file: OpenedFile) -> bool:
        """Whether the file is to be worked on; where not, it is settled.

        The same content under two names is computed once: the second waits for the first.
        """
        claim, source, folder = file.claim, file.known_source, file.published
        while (other := self._units.get(source.unit)) is not None:
            await other.wait()
            folder = self.delivery.published(source.unit)
        if folder is not None:
            self.settle(await self.delivery.duplicate(claim, source.unit, folder))
            return False
        if claim.attempt > self.limits.max_attempts:
            error = FileError(
                "attempts_exhausted",
                f"work on it was begun {self.limits.max_attempts} times and ended with the process:"
                " see the log of each, then drop it again",
            )
            begun = dataclasses.replace(claim, attempt=claim.attempt - 1)  # not this time
            self.settle(await self.delivery.give_up(dataclasses.replace(source, claim=begun), error))
            return False
        self._units[source.unit] = asyncio.Event()
        self.workload.begin(source)
        self.metrics.input_bytes_total.inc(source.size)
        return True

    async def hand_on(self, file: OpenedFile) -> None:
        """The parts of a file to the next stage."""
        if file.parts is not None:
            for part in file.parts:
                await self.hand_on_part(part)
            return
        handed_on = 0
        try:
            stored = await self.delivery.stored(file.known_source)
            parts = read_parts(
                file.stream, file.known_source, recipe=self.recipe, limits=self.read_limits, stored=stored
            )
            async for part in parts:
                await self.hand_on_part(part)
                handed_on += 1
        except FileError as error:
            source = file.known_source
            if handed_on:
                self._on_their_way += 1
                await self.parts.put(FileFailed(source, error, handed_on))
            else:
                self.settle(await self.delivery.give_up(source, error))

    async def hand_on_part(self, part: Part | KeptPart) -> None:
        self.progress.add_total(part.extent.records)
        self.workload.read(part.source, part.extent, last=part.last)
        self._on_their_way += 1
        if isinstance(part, Part):
            await self.parts.put(part, text_bytes(part))
        else:
            self.progress.advance(part.extent.records)
            await self.parts.put(part)

    async def tokenize(self) -> None:
        """Stage 2: texts to token ids, off the event loop."""
        async for items in self.parts.batches():
            parts = [item for item in items if isinstance(item, Part)]
            done = await asyncio.to_thread(self.tokenizer.tokenize, parts)
            self.metrics.observe_tokenized(*done)
            self.progress.advance(sum(len(part.part.rejects) for part in done))
            tokenized = iter(done)
            await self.tokenized.put_all(
                (part := next(tokenized), part.n_tokens) if isinstance(item, Part) else (item, 1)
                for item in items
            )
        await self.tokenized.close()

    async def compute(self) -> None:
        """Stage 3: whenever the device is free, give it the best batch of what is there."""
        assembly = Assembly(tuple(sae.d_out for sae in self.study.engine.info.saes))
        ended = False
        while not ended or self.packer or self.study.begun is not None:
            ended = ended or await self.gather(assembly)
            if self.packer or self.study.begun is not None:
                finished = await self.run_batch(assembly)
                await self.finished.put_all((part, part.nbytes) for part in finished)
        await self.finished.close()

    async def run_batch(self, assembly: Assembly) -> list[FinishedPart]:
        """The next batch to the device; the parts that are finished by the batch that comes back.

        That is the same one, or the one before where batches overlap. What is too much for the device's
        memory comes back as smaller batches; a sample that alone is too much becomes a reject.
        """
        began = time.perf_counter()
        batch = self.packer.take() if self.packer else None
        pack_seconds = time.perf_counter() - began
        under_way = [one for one in (self.study.begun, batch) if one is not None]
        try:
            done = await self.device.call(lambda: self.study.advance(batch))
        except OutOfMemory as error:
            return self.out_of_memory(under_way, assembly, error)
        if done is None:
            return []
        batch, block = done
        self.metrics.observe_block(batch, block, self.study.engine.info, pack_seconds)
        if block.not_finite:
            message = block.not_finite[0].message
            log.warning("samples.not_finite", samples=len(block.not_finite), message=message)
        self.progress.advance(len(batch.entries))
        return assembly.scatter(batch, block, pack_seconds)

    def out_of_memory(
        self, under_way: Sequence[Batch], assembly: Assembly, error: OutOfMemory
    ) -> list[FinishedPart]:
        """Try again with less: one batch at a time, then half of it; the parts that end with a reject."""
        self.metrics.oom_total.inc()
        batch = under_way[0]
        log.warning("device.out_of_memory", samples=len(batch.entries), message=str(error))
        if len(under_way) > 1:
            self.study.overlaps = False
            for one in reversed(under_way):
                self.packer.put_back(one)
            self.metrics.observe_retry("forward")
            return []
        if len(batch.entries) > 1:
            self.packer.shrink(batch)
            self.metrics.observe_retry("forward")
            self.metrics.max_batch_tokens.set(self.packer.max_batch_tokens)
            return []
        self.metrics.rejects_total.labels("out_of_memory").inc()
        self.progress.advance(1)
        return assembly.set_aside(batch.entries[0], "out_of_memory", str(error))

    async def gather(self, assembly: Assembly) -> bool:
        """Take what is tokenized, up to the window. True at the end of the stream.

        Waits where there is nothing to do, and for a moment where there is little and more is on its way.
        """
        deadline = self.clock() + MAX_WAIT_SECONDS
        while self.packer.tokens < self.limits.queued_tokens:
            try:
                item = await self.next_tokenized(deadline)
            except EndOfStream:
                return True
            if item is None:
                return False
            self._on_their_way -= 1
            if not isinstance(item, TokenizedPart):
                await self.finished.put(item)
            elif (done := assembly.open(item)) is not None:
                await self.finished.put(done, done.nbytes)
            else:
                self.packer.add(item)
        return False

    async def next_tokenized(self, deadline: float) -> TokenizedPart | KeptPart | FileFailed | None:
        """The next item for the device, None where it should not wait for one. Raises EndOfStream."""
        if not self.packer and self.study.begun is None:
            return await self.tokenized.get()
        item = await self.tokenized.get_nowait()
        more_comes = self._taking or self._on_their_way or self.inbox.backlog
        if item is not None or self.study.begun is not None or not self.packer.thin or not more_comes:
            return item
        try:
            async with asyncio.timeout(max(0.0, deadline - self.clock())):
                return await self.tokenized.get()
        except TimeoutError:
            return None

    async def write(self) -> None:
        """Stage 4: parts to Parquet; a file's last part makes its output folder."""
        async for arrivals in self.finished.batches(self.group_files, GROUP_SECONDS):
            units = await self.delivery.write(arrivals)
            self._publishing += len(units)
            await self.written.put_all((unit, unit.nbytes) for unit in units)
        await self.written.close()

    def group_files(self) -> int:
        """How many files are worth waiting for: of those under way, what one group holds."""
        return min(GROUP_FILES, len(self._units) - self._publishing)

    async def publish(self) -> None:
        """Stage 5: folders to disk and to their final names, all that are there together."""
        async for units in self.written.batches():
            outcomes = await self.delivery.publish(units)
            self._publishing -= len(outcomes)
            self.settle(*outcomes)

    def queued(self) -> dict[str, int]:
        """Items waiting for each stage."""
        return {
            "tokenize": len(self.parts),
            "compute": len(self.tokenized) + len(self.packer),
            "write": len(self.finished) + len(self.written),
        }

    def settle(self, *outcomes: Outcome) -> None:
        """Count how files ended."""
        outcomes = tuple(
            dataclasses.replace(outcome, departures=found)
            if (found := self.departures.of(outcome))
            else outcome
            for outcome in outcomes
        )
        self.metrics.observe_outcomes(outcomes, self.study.engine.info.layers)
        for outcome in outcomes:
            kind = outcome.kind
            setattr(self.tally, kind, getattr(self.tally, kind) + 1)
            self.tally.rows += outcome.rows
            self.tally.rejects += outcome.rejects
            self.workload.end(outcome.unit)
            self._known(outcome.unit)
        for outcome in outcomes:
            log.info("file.settled", **outcome.log_fields())
            for hook_name, far in itertools.groupby(outcome.departures, lambda one: one.hook_name):
                message = "; ".join(map(str, far))
                log.warning("sae.departs", file=outcome.name, hook_name=hook_name, message=message)
        self.on_outcomes(outcomes)

    def _known(self, unit: str | None) -> None:
        """Tell whoever waits for the outcome of a unit."""
        if unit is not None and (under_way := self._units.pop(unit, None)) is not None:
            under_way.set()


def text_bytes(part: Part) -> int:
    """About what a part weighs in the queue: the characters of its texts, and what is around them."""
    return sum(SAMPLE_BYTES + sum(map(len, sample.texts)) for sample in part.samples)

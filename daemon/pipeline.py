"""The main loop: four stages on bounded channels.

    inbox -> read -> [parts] -> tokenize -> [tokenized] -> compute -> [finished] -> write -> outbox

Each stage closes its channel on normal return only, so that a stage which crashes takes the whole group
down instead of looking like a clean end. Knows no signals, no HTTP and no configuration.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from daemon.channel import Channel, EndOfStream
from daemon.compute.assembly import Assembly
from daemon.compute.device import Device, Study
from daemon.compute.packing import Packer
from daemon.errors import FileError
from daemon.intake.inbox import Inbox
from daemon.intake.reader import ReadLimits, content_sha256, read_parts
from daemon.intake.tokenizer import Tokenizer
from daemon.observe.metrics import Metrics
from daemon.observe.progress import Progress
from daemon.output.delivery import Delivery, Outcome
from daemon.output.finished import FinishedPart
from daemon.records import Claim, Part, Recipe, Source, TokenizedPart

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class FileFailed:
    """Follows the parts of a file that turned out to be unusable after some of it was read."""

    source: Source
    error: FileError
    parts: int  # handed on before


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may wait between the stages."""

    queued_text_bytes: int
    queued_tokens: int  # tokenized and ahead of the device, sorted by length together
    queued_parts: int


@dataclass(slots=True)
class Tally:
    """What a run did, for its exit code and its last line."""

    committed: int = 0
    duplicate: int = 0
    requeued: int = 0
    failed: int = 0
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
        metrics: Metrics,
        progress: Progress,
        on_outcome: Callable[[Outcome], None],
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
        self.results_key = results_key
        self.metrics = metrics
        self.progress = progress
        self.on_outcome = on_outcome
        self.clock = clock
        self.tally = Tally()
        self.parts: Channel[Part | FileFailed] = Channel(limits.queued_text_bytes)
        self.tokenized: Channel[TokenizedPart | FileFailed] = Channel(limits.queued_tokens)
        self.finished: Channel[FinishedPart | FileFailed] = Channel(limits.queued_parts)
        self._units: dict[str, asyncio.Event] = {}  # under way; set when their outcome is known

    async def run(self, stop: asyncio.Event, *, once: bool) -> Tally:
        """Take files until `stop` is set, with `once` until the inbox is drained; finish what was taken."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.read(stop, once), name="read")
                group.create_task(self.tokenize(), name="tokenize")
                group.create_task(self.compute(), name="compute")
                group.create_task(self.write(), name="write")
        except asyncio.CancelledError:
            await self.delivery.give_back()
            raise
        return self.tally

    async def read(self, stop: asyncio.Event, once: bool) -> None:
        """Stage 1: claim files and read them as parts, until none is left and none comes back."""
        while True:
            requeued = self.tally.requeued
            async for claim in self.inbox.claims(stop, once):
                await self.take(claim)
            for under_way in list(self._units.values()):
                await under_way.wait()
            if stop.is_set() or self.tally.requeued == requeued:
                break
        await self.parts.close()

    async def take(self, claim: Claim) -> None:
        """Hand a claimed file on, part by part; or settle it at once."""
        try:
            source = await self.open(claim)
        except FileError as error:
            await self.settle(await self.delivery.fail(claim, error))
            return
        if source is None:
            return
        handed_on = 0
        try:
            async for part in read_parts(source, recipe=self.recipe, limits=self.read_limits):
                self.progress.add_total(part.records)
                self.metrics.stage_duration_seconds.labels("read").observe(part.read_seconds)
                await self.parts.put(part, text_bytes(part))
                handed_on += 1
        except FileError as error:
            await self.parts.put(FileFailed(source, error, handed_on))

    async def open(self, claim: Claim) -> Source | None:
        """A claim with its content known; None where its results are already published.

        The same content under two names is computed once: the second waits for the first.
        """
        opened_at = self.clock()
        sha256, size = await content_sha256(claim.path)
        unit = hashlib.sha256((sha256 + self.results_key).encode()).hexdigest()[:12]
        if (other := self._units.get(unit)) is not None:
            await other.wait()
        if (folder := await self.delivery.published(unit)) is not None:
            await self.settle(await self.delivery.duplicate(claim, unit, folder))
            return None
        source = Source(claim=claim, sha256=sha256, size=size, unit=unit, opened_at=opened_at)
        self._units[unit] = asyncio.Event()
        self.metrics.input_bytes_total.inc(size)
        return source

    async def tokenize(self) -> None:
        """Stage 2: texts to token ids, off the event loop."""
        async for item in self.parts:
            if isinstance(item, FileFailed):
                await self.tokenized.put(item)
                continue
            part = await asyncio.to_thread(self.tokenizer.tokenize, item)
            self.metrics.observe_tokenized(part)
            self.progress.advance(len(part.part.rejects))
            await self.tokenized.put(part, part.n_tokens)
        await self.tokenized.close()

    async def compute(self) -> None:
        """Stage 3: whenever the device is free, give it the best batch of what is there."""
        assembly = Assembly(tuple(sae.d_in for sae in self.study.engine.info.saes))
        ended = False
        while not ended or self.packer:
            ended = ended or await self.gather(assembly)
            if not self.packer:
                continue
            began = time.perf_counter()
            batch = self.packer.take()
            pack_seconds = time.perf_counter() - began
            block = await self.device.call(lambda batch=batch: self.study.run(batch))  # type: ignore[misc]
            self.metrics.observe_block(batch, block, self.study.engine.info, pack_seconds)
            self.progress.advance(len(batch.entries))
            for finished in assembly.scatter(batch, block, pack_seconds):
                await self.finished.put(finished)
        await self.finished.close()

    async def gather(self, assembly: Assembly) -> bool:
        """Take what is tokenized, up to the window; wait only when idle. True at the end of the stream."""
        while self.packer.tokens < self.limits.queued_tokens:
            try:
                item = await (self.tokenized.get_nowait() if self.packer else self.tokenized.get())
            except EndOfStream:
                return True
            if item is None:
                return False
            if isinstance(item, FileFailed):
                await self.finished.put(item)
            elif (done := assembly.open(item)) is not None:
                await self.finished.put(done)
            else:
                self.packer.add(item)
        return False

    async def write(self) -> None:
        """Stage 4: parts to Parquet; a file's last part publishes it."""
        async for item in self.finished:
            if isinstance(item, FileFailed):
                outcome = await self.delivery.fail_source(item.source, item.error, item.parts)
            else:
                outcome = await self.delivery.write(item)
            if outcome is not None:
                await self.settle(outcome)

    def queued(self) -> dict[str, int]:
        """Items waiting for each stage."""
        return {
            "tokenize": len(self.parts),
            "compute": len(self.tokenized) + len(self.packer),
            "write": len(self.finished),
        }

    async def settle(self, outcome: Outcome) -> None:
        """Count how a file ended."""
        kind = outcome.kind
        setattr(self.tally, kind, getattr(self.tally, kind) + 1)
        self.tally.rows += outcome.rows
        self.tally.rejects += outcome.rejects
        self.metrics.observe_outcome(outcome, self.study.engine.info.layers)
        log.info("file.settled", outcome=kind, **outcome.log_fields())
        if outcome.unit is not None and (under_way := self._units.pop(outcome.unit, None)) is not None:
            under_way.set()
        self.on_outcome(outcome)


def text_bytes(part: Part) -> int:
    """What a part weighs in the queue: the characters of its texts."""
    return sum(len(text) for sample in part.samples for text in sample.texts)

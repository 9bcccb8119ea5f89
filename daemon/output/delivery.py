"""What becomes of each claimed file: published, failed, recognised as a duplicate, or given back.

The one owner of the units being written. What the machine refuses for a while (a full disk, no descriptors)
is waited out and tried again, so every step here is safe to repeat. Knows no device, batches and queues.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from daemon.durable import remove_folder
from daemon.errors import FileError, SyncFailed
from daemon.intake.inbox import Inbox
from daemon.output.commit import Outbox, Staged
from daemon.output.departures import Departure
from daemon.output.finished import FinishedPart
from daemon.output.parts import stored_extents
from daemon.output.schema import ValueType
from daemon.output.staging import FileFailed, Staging, Unit, abandon
from daemon.output.totals import StageSeconds
from daemon.output.writer import UnitWriter
from daemon.pause import Pause
from daemon.records import Claim, KeptPart, ModelInfo, PartExtent, Recipe, Source

P = ParamSpec("P")
R = TypeVar("R")
OutcomeKind = Literal["committed", "failed", "duplicate", "requeued"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one file ended."""

    kind: OutcomeKind
    name: str
    unit: str | None = None
    folder: Path | None = None  # where the results are
    rows: int = 0
    rejects: int = 0
    output_bytes: int = 0
    seconds: float = 0.0  # first read to commit
    fvu: tuple[float | None, ...] = ()  # per SAE
    mean_l0: tuple[float | None, ...] = ()  # the same
    readings: int = 0  # that each SAE made, of which these are means
    clipped: int = 0  # activations that the stored type does not hold
    departures: tuple[Departure, ...] = ()  # in what its SAEs are far from what is known of them
    stages: StageSeconds | None = None
    reason: str | None = None
    message: str | None = None

    def log_fields(self) -> dict[str, Any]:
        fields = {
            "outcome": self.kind,
            "file": self.name,
            "unit": self.unit,
            "rows": self.rows,
            "rejects": self.rejects,
            "clipped": self.clipped or None,
            "seconds": round(self.seconds, 2),
            "folder": str(self.folder) if self.folder else None,
            "reason": self.reason,
            "message": self.message,
        }
        return {key: value for key, value in fields.items() if value is not None}


Arrival = FinishedPart | KeptPart | FileFailed


class Delivery:
    """Takes finished parts of files and settles each file's outcome."""

    def __init__(
        self,
        *,
        inbox: Inbox,
        outbox: Outbox,
        info: ModelInfo,
        values: ValueType,
        settings: dict[str, Any],
        pause: Pause | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`settings` goes into manifests; `values` is the type of stored activations."""
        self.inbox = inbox
        self.outbox = outbox
        self.info = info
        self.values = values
        self.pause = Pause() if pause is None else pause
        self.clock = clock
        self.staging = Staging(info=info, settings=settings, clock=clock)
        self._units: dict[str, Unit] = {}
        # A thread each, so that giving up waits for what a cancelled stage left running.
        self._writer_thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._publisher_thread = ThreadPoolExecutor(1, thread_name_prefix="publisher")

    async def _call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run on the writer's thread, again and again while the machine refuses for a while."""
        return await self._call_on(self._writer_thread, functools.partial(function, *args, **kwargs))

    async def _publisher(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The same on the publisher's thread."""
        return await self._call_on(self._publisher_thread, functools.partial(function, *args, **kwargs))

    async def _call_on(self, thread: ThreadPoolExecutor, function: Callable[[], R]) -> R:
        loop = asyncio.get_running_loop()

        def call() -> R:
            self.staging.check_disk()
            try:
                return function()
            except FileNotFoundError:
                self.outbox.check_lost()
                raise
            except SyncFailed as error:
                self.staging.sync_failed = error
                raise

        return await self.pause.outlast(lambda: loop.run_in_executor(thread, call), "write")

    async def write(self, arrivals: Sequence[Arrival]) -> list[Unit]:
        """Store what came; the units of which nothing more comes, their folders written but not flushed."""
        touched = {self._arrive(arrival).source.unit: None for arrival in arrivals}
        await self._call(self._store, [item for item in arrivals if isinstance(item, FinishedPart)])
        units = [self._units[name] for name in touched]
        suspect = [unit for unit in units if unit.complete and not unit.writer.has_rows]
        if suspect:
            await self._call(self._fail_unusable, suspect)
        complete = [unit for unit in units if unit.complete]
        if complete:
            await self._call(self.staging.write, complete)
        return complete + [unit for unit in units if unit.broken]

    async def publish(self, units: Sequence[Unit]) -> list[Outcome]:
        """What becomes of units that `write` returned, which share their syncs."""
        outcomes = [await self._fail_unit(unit) for unit in units if unit.broken]
        complete = [unit for unit in units if unit.complete]
        return outcomes + (await self._commit(complete) if complete else [])

    def _arrive(self, arrival: Arrival) -> Unit:
        source = arrival.part.part.source if isinstance(arrival, FinishedPart) else arrival.source
        unit = self._units.setdefault(source.unit, Unit(source))
        if isinstance(arrival, FileFailed):
            unit.failed = arrival
            return unit
        unit.arrived += 1
        unit.nbytes += arrival.nbytes if isinstance(arrival, FinishedPart) else 0
        if unit.results is None:
            recipe = arrival.part.part.recipe if isinstance(arrival, FinishedPart) else arrival.recipe
            unit.results = self._writer(source, recipe)
        if isinstance(arrival, KeptPart):
            unit.writer.keep_part(source, arrival.extent, arrival.last)
        return unit

    def _writer(self, source: Source, recipe: Recipe) -> UnitWriter:
        return UnitWriter(
            self.outbox.staging(source.unit),
            source=source,
            recipe=recipe,
            info=self.info,
            values=self.values,
        )

    def _store(self, finished: Iterable[FinishedPart]) -> None:
        """Parts to their units; those stored by an earlier try, or of a file that failed, are left alone."""
        for item in finished:
            part = item.part.part
            unit = self._units[part.source.unit]
            if not unit.failed and not unit.writer.has(part.number):
                unit.writer.write_part(item)

    def _fail_unusable(self, complete: Sequence[Unit]) -> None:
        """Have complete units fail that have no row: every record was rejected, at whatever stage."""
        for unit in complete:
            summary = unit.writer.rejected_whole()
            if summary is not None:
                unit.failed = FileFailed(unit.source, summary.error(), unit.arrived)

    async def _commit(self, units: Sequence[Unit]) -> list[Outcome]:
        staged = await self._publisher(self.staging.flush, units)
        outcomes: list[Outcome] = []
        publish: list[tuple[Unit, Staged]] = []
        presences = await self.inbox.recheck([unit.source.claim for unit in units])
        for unit, folder, presence in zip(units, staged, presences, strict=True):
            if presence == "same":
                publish.append((unit, folder))
            else:
                outcomes.append(await self._withdraw(unit, vanished=presence == "gone"))
        if publish:
            await self._publisher(self.outbox.publish, [folder for _, folder in publish])
            await self._retire([unit.source.claim for unit, _ in publish])
            await self._publisher(self._discard_parts, [unit for unit, _ in publish])
        for unit, folder in publish:
            del self._units[unit.source.unit]
            outcomes.append(published(unit, folder))
        return outcomes

    def _discard_parts(self, units: Sequence[Unit]) -> None:
        kept = self.outbox.kept_parts()
        for unit in units:
            if unit.source.unit in kept:
                unit.writer.discard_parts()

    async def _withdraw(self, unit: Unit, *, vanished: bool) -> Outcome:
        """The source is no longer what was read: its results are worth nothing."""
        del self._units[unit.source.unit]
        await self._publisher(abandon, [unit])
        await self._publisher(unit.writer.discard_parts)
        claim = unit.source.claim
        if vanished:
            error = FileError("vanished", "the file was removed while lensd worked on it: drop it again")
            return await self.fail(claim, error, unit.source)
        return await self._requeue(claim, unit.source.unit)

    async def _changed(self, claim: Claim) -> bool:
        return await self.inbox.recheck([claim]) == ["changed"]

    async def _requeue(self, claim: Claim, unit: str | None) -> Outcome:
        """Put a file that changed under us back into the inbox."""
        await self.pause.outlast(lambda: self.inbox.release([claim]), "settle")
        return Outcome("requeued", claim.name, unit, reason="changed")

    async def _fail_unit(self, unit: Unit) -> Outcome:
        assert unit.failed is not None
        del self._units[unit.source.unit]
        return await self.give_up(unit.source, unit.failed.error)

    async def give_up(self, source: Source, error: FileError) -> Outcome:
        """Set a file aside of which parts may be stored."""
        await self._call(lambda: remove_folder(self.outbox.adopt_parts(source.unit)))
        return await self.fail(source.claim, error, source)

    async def _retire(self, claims: Sequence[Claim]) -> None:
        await self.pause.outlast(lambda: self.inbox.retire(claims), "settle")

    async def duplicate(self, claim: Claim, unit: str, folder: Path) -> Outcome:
        """The same content under the same settings is published already: nothing to compute."""
        if await self._changed(claim):
            return await self._requeue(claim, unit)
        await self._call(self.outbox.flush_names)  # whoever published it may have died before that
        await self._retire([claim])
        return Outcome("duplicate", claim.name, unit, folder)

    async def fail(self, claim: Claim, error: FileError, source: Source | None = None) -> Outcome:
        """Set a file aside with its reason; one that changed since it was claimed gets another chance."""
        if await self._changed(claim):
            return await self._requeue(claim, source.unit if source else None)
        sha256 = source.sha256 if source else None
        await self.pause.outlast(
            lambda: self.inbox.fail(claim, error.reason, str(error), sha256, error.details), "settle"
        )
        return Outcome(
            "failed",
            claim.name,
            source.unit if source else None,
            reason=error.reason,
            message=str(error),
        )

    async def give_back(self, *, flush: bool = True) -> None:
        """Forced stop: put every claimed file back into the inbox. Stored parts stay for the next start.

        Without `flush` nothing is synced: a disk that refused it once is not asked again.
        """
        self.close()
        self._units.clear()
        await self.inbox.release_all(flush=flush)

    def close(self) -> None:
        """Wait for what is being written, and end the threads."""
        self._writer_thread.shutdown()
        self._publisher_thread.shutdown()
        self.staging.close()

    async def stored(self, source: Source) -> dict[int, PartExtent]:
        """Which parts of a file an earlier attempt finished."""

        def look() -> dict[int, PartExtent]:
            return stored_extents(self.outbox.adopt_parts(source.unit))

        return await self._call(look)

    def published(self, unit: str) -> Path | None:
        """The folder that holds a unit's results already, if any. Two looks at the disk."""
        return self.outbox.published(unit)


def published(unit: Unit, staged: Staged) -> Outcome:
    source, totals, publication = unit.source, unit.totals, staged.publication
    assert totals is not None
    assert publication is not None
    if not publication.fresh:
        return Outcome("duplicate", source.claim.name, source.unit, publication.folder)
    return Outcome(
        kind="committed",
        name=source.claim.name,
        unit=source.unit,
        folder=publication.folder,
        rows=totals.rows,
        rejects=totals.rejects,
        output_bytes=totals.bytes,
        seconds=unit.seconds,
        fvu=totals.fvu,
        mean_l0=tuple([layer.mean_l0() for layer in totals.layers]),
        readings=totals.layers[0].rows,
        clipped=totals.clipped,
        stages=totals.seconds,
    )

"""The outbox folder as a sink: parts are stored, and each complete file is published as one folder.

Trouble of the machine that passes (a full disk, no descriptors) is waited out and tried again, so every step
here is safe to repeat. Implements `daemon.ports.Sink`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from daemon.fs.guard import SyncGuard
from daemon.model_info import ModelInfo
from daemon.pause import Pause
from daemon.recipes import Recipe
from daemon.records import (
    Arrival,
    FileFailed,
    FinishedFile,
    FinishedPart,
    KeptPart,
    Outcome,
    Stored,
)
from daemon.sink.outbox import Outbox
from daemon.sink.parts import stored_extents
from daemon.sink.report import ReportMaker
from daemon.sink.schema import ValueType, features_schema, metrics_schema
from daemon.sink.staging import Staging, Unit, abandon
from daemon.sink.tables import stored_parts
from daemon.sink.writer import UnitWriter

R = TypeVar("R")


class FolderSink:
    """Results of many files on their way into one outbox. It owns the units being written."""

    def __init__(
        self,
        outbox: Outbox,
        *,
        info: ModelInfo,
        values: ValueType,
        settings: dict[str, Any],
        pause: Pause,
        reports: ReportMaker | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`settings` goes into manifests; `values` is the type of stored activations.

        With `reports` each folder gets its page of findings.
        """
        self._outbox = outbox
        self._info = info
        self._values: ValueType = values
        self._pause = pause
        self._guard = SyncGuard(outbox.check_lost)
        self._staging = Staging(self._guard, info=info, settings=settings, reports=reports, clock=clock)
        self._units: dict[str, Unit] = {}
        # A thread each, so that closing waits for what a cancelled stage left running.
        self._writer_thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._publisher_thread = ThreadPoolExecutor(1, thread_name_prefix="publisher")

    async def stored(self, unit: str) -> Stored:
        """Tell where a unit is published, else which parts of it an earlier attempt stored."""

        def look() -> Stored:
            published = self._outbox.published(unit)
            extents = {} if published else stored_extents(self._outbox.adopt_parts(unit))
            return Stored(published, extents)

        return await self._call(self._writer_thread, look)

    async def write(self, arrivals: Sequence[Arrival]) -> list[FinishedFile]:
        """Store finished parts; return the files of which everything arrived, not yet flushed."""
        touched = {self._arrive(arrival).file.unit: None for arrival in arrivals}
        parts = [item for item in arrivals if isinstance(item, FinishedPart)]
        await self._call(self._writer_thread, lambda: self._store(parts))
        units = [self._units[name] for name in touched]
        complete = [unit for unit in units if unit.complete]
        await self._call(self._writer_thread, lambda: self._complete(complete))
        return [
            FinishedFile(unit.file, unit.failed.error if unit.failed else None, unit.nbytes)
            for unit in units
            if unit.complete or unit.broken
        ]

    async def flush(self, files: Sequence[FinishedFile]) -> None:
        units = [self._units[file.file.unit] for file in files]
        await self._call(self._publisher_thread, lambda: self._staging.flush(units))

    async def publish(self, files: Sequence[FinishedFile]) -> list[Outcome]:
        """Give flushed folders their final names."""
        units = [self._units[file.file.unit] for file in files]
        staged = [unit.staged for unit in units if unit.staged is not None]
        await self._call(self._publisher_thread, lambda: self._outbox.publish(staged))
        return [unit.outcome() for unit in units]

    async def confirm(self) -> None:
        """Flush the names that are visible in the outbox."""
        await self._call(self._publisher_thread, self._outbox.flush_names)

    async def forget(self, units: Sequence[str]) -> None:
        """Remove unpublished folders and stored parts of these units."""

        def remove() -> None:
            here = [unit for name in units if (unit := self._units.get(name)) is not None]
            abandon([unit for unit in here if unit.results is not None and not unit.is_published])
            self._outbox.remove_parts(units)

        await self._call(self._publisher_thread, remove)
        for name in units:
            self._units.pop(name, None)

    def close(self) -> None:
        """Wait for what is being written, and end the threads. Safe to repeat."""
        self._staging.interrupt()
        self._writer_thread.shutdown()
        self._publisher_thread.shutdown()
        self._staging.close()
        self._units.clear()

    async def _call(self, thread: ThreadPoolExecutor, function: Callable[[], R]) -> R:
        """Run on a thread, again and again while the machine refuses for a while."""
        loop = asyncio.get_running_loop()
        return await self._pause.outlast(
            lambda: loop.run_in_executor(thread, self._guard.run, function), "write"
        )

    def _arrive(self, arrival: Arrival) -> Unit:
        """Count in what arrived; the unit that it belongs to."""
        file = arrival.part.part.file if isinstance(arrival, FinishedPart) else arrival.file
        unit = self._units.setdefault(file.unit, Unit(file))
        if isinstance(arrival, FileFailed):
            unit.failed = arrival
            return unit
        unit.arrived += 1
        unit.nbytes += arrival.nbytes if isinstance(arrival, FinishedPart) else 0
        if unit.results is None:
            recipe = arrival.part.part.recipe if isinstance(arrival, FinishedPart) else arrival.recipe
            unit.results = UnitWriter(
                self._outbox.staging(file.unit),
                file=file,
                recipe=recipe,
                info=self._info,
                values=self._values,
            )
        if isinstance(arrival, KeptPart):
            unit.writer.keep_part(file, arrival.extent, arrival.last)
        return unit

    def _store(self, finished: Iterable[FinishedPart]) -> None:
        """Parts to their units; those stored by an earlier try, or of a file that failed, are left out."""
        by_recipe: dict[Recipe, list[FinishedPart]] = {}
        for item in finished:
            unit = self._units[item.part.part.file.unit]
            if not unit.failed and not unit.writer.has(item.part.part.number):
                by_recipe.setdefault(item.part.part.recipe, []).append(item)
        for recipe, items in by_recipe.items():
            schemas = metrics_schema(self._info.names, recipe), features_schema(self._values)
            for item, stored in zip(items, stored_parts(items, *schemas, self._info), strict=True):
                self._units[item.part.part.file.unit].writer.write_part(item.part.part, stored)

    def _complete(self, units: Sequence[Unit]) -> None:
        """Write the folders of complete units; a unit without a row, every record rejected, fails instead."""
        for unit in units:
            if not unit.writer.has_rows and (summary := unit.writer.rejected_whole()) is not None:
                unit.failed = FileFailed(unit.file, summary.error(), unit.arrived)
        self._staging.write([unit for unit in units if unit.complete])

"""What becomes of each claimed file: published, failed, recognised as a duplicate, or given back.

The one owner of the units being written. Knows no device, no batches and no queues.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from daemon.errors import FileError
from daemon.intake.inbox import Inbox
from daemon.output.commit import find_published, publish, staging_folder
from daemon.output.finished import FinishedPart
from daemon.output.manifest import manifest
from daemon.output.schema import ValueType
from daemon.output.totals import StageSeconds, UnitTotals
from daemon.output.writer import UnitWriter
from daemon.records import Claim, ModelInfo, Recipe, Source

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
    stages: StageSeconds | None = None
    reason: str | None = None
    message: str | None = None

    def log_fields(self) -> dict[str, Any]:
        fields = {
            "file": self.name,
            "unit": self.unit,
            "rows": self.rows,
            "rejects": self.rejects,
            "seconds": round(self.seconds, 2),
            "folder": str(self.folder) if self.folder else None,
            "reason": self.reason,
            "message": self.message,
        }
        return {key: value for key, value in fields.items() if value is not None}


@dataclass(slots=True)
class Unit:
    """A file on its way out."""

    source: Source
    recipe: Recipe
    writer: UnitWriter
    parts: int = 0  # arrived from the device
    error: FileError | None = None
    error_after: int = 0  # parts to wait for before failing


class Delivery:
    """Takes finished parts of files and settles each file's outcome."""

    def __init__(
        self,
        *,
        inbox: Inbox,
        outbox: Path,
        info: ModelInfo,
        values: ValueType,
        settings: dict[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`settings` goes into manifests; `values` is the type of stored activations."""
        self.inbox = inbox
        self.outbox = outbox
        self.info = info
        self.values = values
        self.settings = settings
        self.clock = clock
        self._units: dict[str, Unit] = {}
        # One thread, so that dropping a unit waits for a write that a cancelled stage left running.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")

    async def _call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def write(self, finished: FinishedPart) -> Outcome | None:
        """Store a part; the outcome, once this was the last of its file."""
        part = finished.part.part
        unit = self._units.get(part.source.unit)
        if unit is None:
            unit = self._units[part.source.unit] = await self._call(self._open, part.source, part.recipe)
        unit.parts += 1
        if unit.error is None:
            await self._call(unit.writer.write_part, finished)
        return await self._settle(unit)

    def _open(self, source: Source, recipe: Recipe) -> Unit:
        writer = UnitWriter(
            staging_folder(self.outbox, source.unit),
            source=source,
            recipe=recipe,
            info=self.info,
            values=self.values,
        )
        return Unit(source, recipe, writer)

    async def fail_source(self, source: Source, error: FileError, parts: int) -> Outcome | None:
        """The file failed after `parts` parts were read; the outcome, once all of these came back."""
        unit = self._units.get(source.unit)
        if unit is None and not parts:
            return await self.fail(source.claim, error, source)
        assert unit is not None, "a part of this file came before"
        unit.error = error
        unit.error_after = parts
        return await self._settle(unit)

    async def _settle(self, unit: Unit) -> Outcome | None:
        if unit.error is not None:
            if unit.parts < unit.error_after:
                return None
            del self._units[unit.source.unit]
            await self._call(unit.writer.abandon)
            return await self.fail(unit.source.claim, unit.error, unit.source)
        if not unit.writer.complete:
            return None
        del self._units[unit.source.unit]
        if not await self.inbox.unchanged(unit.source.claim):
            await self._call(unit.writer.abandon)
            await self.inbox.release(unit.source.claim)
            return Outcome("requeued", unit.source.claim.name, unit.source.unit, reason="changed")
        return await self._commit(unit)

    async def _commit(self, unit: Unit) -> Outcome:
        source = unit.source
        totals = await self._call(unit.writer.finish)
        seconds = self.clock() - source.opened_at
        content = manifest(
            source=source,
            recipe=unit.recipe,
            info=self.info,
            totals=totals,
            settings=self.settings,
            seconds=seconds,
            created=datetime.now(UTC),
        )
        published = await self._call(publish, unit.writer.staging, self.outbox, source, content)
        await self.inbox.retire(source.claim)
        if not published.fresh:
            return Outcome("duplicate", source.claim.name, source.unit, published.folder)
        return committed(source, totals, published.folder, seconds)

    async def duplicate(self, claim: Claim, unit: str, folder: Path) -> Outcome:
        """The same content under the same settings is published already: nothing to compute."""
        await self.inbox.retire(claim)
        return Outcome("duplicate", claim.name, unit, folder)

    async def fail(self, claim: Claim, error: FileError, source: Source | None = None) -> Outcome:
        """Set a file aside with its reason."""
        await self.inbox.fail(claim, error.reason, str(error), source.sha256 if source else None)
        return Outcome(
            "failed",
            claim.name,
            source.unit if source else None,
            reason=error.reason,
            message=str(error),
        )

    async def give_back(self) -> None:
        """Forced stop: drop what is half-written and put every claimed file back into the inbox."""
        for unit in self._units.values():
            await self._call(unit.writer.abandon)
        self._units.clear()
        await self.inbox.release_all()

    async def published(self, unit: str) -> Path | None:
        """The folder that holds a unit's results already, if any."""
        return await self._call(find_published, self.outbox, unit)


def committed(source: Source, totals: UnitTotals, folder: Path, seconds: float) -> Outcome:
    return Outcome(
        kind="committed",
        name=source.claim.name,
        unit=source.unit,
        folder=folder,
        rows=totals.rows,
        rejects=totals.rejects,
        output_bytes=totals.bytes,
        seconds=seconds,
        fvu=tuple(layer.fvu() for layer in totals.layers),
        stages=totals.seconds,
    )

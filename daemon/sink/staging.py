"""Output folders before they are published: written, and flushed to disk, many at a time.

One group of files can be flushed while the next is being written. Knows nothing about the inbox and the
outbox. Functions block: call them in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from daemon.fs.guard import SyncGuard
from daemon.model_info import ModelInfo
from daemon.records import FileFailed, InputFile, Outcome, UnitTotals
from daemon.sink.jsontext import fields_of
from daemon.sink.manifest import manifest
from daemon.sink.outbox import Staged, complete, complete_again, seal
from daemon.sink.report import ReportFailed, ReportMaker
from daemon.sink.writer import UnitWriter

Item = TypeVar("Item")
WRITERS = 2  # of units at a time
SYNCS = 16  # at a time: those that overlap share the disk's work


@dataclass(slots=True)
class Unit:
    """A file on its way out."""

    file: InputFile
    results: UnitWriter | None = None  # from the first part on
    arrived: int = 0  # parts
    nbytes: int = 0  # of its results in memory, about
    failed: FileFailed | None = None
    totals: UnitTotals | None = None  # once its files are written
    staged: Staged | None = None  # while its folder is there, whole
    seconds: float = 0.0  # first read to commit
    report: str | None = None  # name of its page of findings
    report_failed: str | None = None  # why it has none

    @property
    def writer(self) -> UnitWriter:
        assert self.results is not None, "a part came before"
        return self.results

    @property
    def broken(self) -> bool:
        """Whether it failed and all that was on its way has come."""
        return self.failed is not None and self.arrived == self.failed.parts

    @property
    def complete(self) -> bool:
        return self.failed is None and self.writer.complete

    @property
    def is_published(self) -> bool:
        return self.staged is not None and self.staged.publication is not None

    def outcome(self) -> Outcome:
        """How it ended, once it is published."""
        totals, publication = self.totals, self.staged.publication if self.staged else None
        assert totals is not None
        assert publication is not None
        name, unit = self.file.claim.name, self.file.unit
        if not publication.fresh:
            return Outcome("duplicate", name, unit, publication.folder)
        return Outcome(
            kind="committed",
            name=name,
            unit=unit,
            folder=publication.folder,
            rows=totals.rows,
            rejects=totals.rejects,
            output_bytes=totals.bytes,
            seconds=self.seconds,
            fvu=totals.fvu,
            mean_l0=tuple(layer.mean_l0() for layer in totals.layers),
            readings=totals.layers[0].rows,
            clipped=totals.clipped,
            stages=totals.seconds,
            report=self.report,
            report_failed=self.report_failed,
        )


class Staging:
    """Makes the folders of complete units."""

    def __init__(
        self,
        guard: SyncGuard,
        *,
        info: ModelInfo,
        settings: dict[str, Any],
        reports: ReportMaker | None,
        clock: Callable[[], float],
    ) -> None:
        """`settings` goes into manifests; `reports` makes a page for each folder, where they are wanted."""
        self.info = info
        self._reports = reports
        self.settings = settings
        self.clock = clock
        self._guard = guard
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="stage")
        self._syncs = ThreadPoolExecutor(SYNCS, thread_name_prefix="sync")

    def interrupt(self) -> None:
        """End pages that are being made: their folders do without them."""
        if self._reports is not None:
            self._reports.close()

    def close(self) -> None:
        """End the threads."""
        self._writers.shutdown()
        self._syncs.shutdown()

    def write(self, units: Sequence[Unit]) -> None:
        """Every unit's results in its folder, whole, not yet flushed; no folder where that fails."""
        missing = [unit for unit in units if unit.staged is None]
        try:
            for_each(self._writers, self._write, missing)
        except OSError:
            abandon(units)  # on a full disk their space is needed
            raise

    def flush(self, units: Sequence[Unit]) -> None:
        """Bring the folders to disk, whole; make them anew where an earlier try removed them.

        Raises SyncFailed where the disk refuses.
        """
        self.write(units)
        staged = [unit.staged for unit in units if unit.staged is not None]
        try:
            for_each(self._syncs, self._seal, staged)
        except OSError:
            abandon(units)
            raise

    def _seal(self, staged: Staged) -> None:
        self._guard.run(lambda: seal(staged))

    def _write(self, unit: Unit) -> None:
        unit.totals = unit.writer.write()
        unit.seconds = self.clock() - unit.file.opened_at
        content = manifest(
            file=unit.file,
            recipe=unit.writer.recipe,
            info=self.info,
            totals=unit.totals,
            settings=self.settings,
            seconds=unit.seconds,
            created=datetime.now(UTC),
        )
        staged = Staged(unit.file, unit.writer.staging, content)
        complete(staged)
        if self._reports is not None:
            self._add_report(unit, staged, self._reports)
        unit.staged = staged

    def _add_report(self, unit: Unit, staged: Staged, reports: ReportMaker) -> None:
        """Make the folder's page, and name it in the manifest, which the page was made from."""
        unit.report = unit.report_failed = None
        try:
            page = reports.make(staged.folder)
        except ReportFailed as error:
            unit.report_failed = str(error)
            return
        staged.manifest["files"].append(fields_of(page))
        complete_again(staged)
        unit.report = page.name


def abandon(units: Sequence[Unit]) -> None:
    """Remove the folders of units, whatever state they are in."""
    for unit in units:
        unit.staged = None
        unit.writer.abandon()


def for_each(pool: ThreadPoolExecutor, function: Callable[[Item], object], items: Sequence[Item]) -> None:
    """Call `function` with each item, on the threads of `pool`. Raises the first error, when all are done."""
    calls = [pool.submit(function, item) for item in items]
    wait(calls)
    for call in calls:
        call.result()

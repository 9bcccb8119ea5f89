"""Writes the results of one input file into its staging folder. Knows no model, no device and no outbox.

Parts may arrive in any order; they are stored in theirs, so that the files are the same however batches
were formed. Everything here blocks: call it in a thread, one call at a time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from daemon.durable import make_folder, make_new_folder, remove_folder
from daemon.output.finished import FinishedPart
from daemon.output.jsontext import to_json
from daemon.output.parquet import ParquetFile
from daemon.output.schema import (
    ValueType,
    features_options,
    features_schema,
    metrics_options,
    metrics_schema,
)
from daemon.output.tables import features_table, metrics_table
from daemon.output.totals import FileTotals, LayerTotals, StageSeconds, UnitTotals
from daemon.records import ModelInfo, Part, Recipe, Reject, Source

METRICS = "metrics.parquet"
FEATURES = "features.parquet"
REJECTS = "rejects.jsonl"
METRICS_GROUP_BYTES = 16 << 20  # of a row group in memory
FEATURES_GROUP_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Assembled:
    """A part as it will be stored; holds no block."""

    part: Part
    metrics: pa.Table
    features: pa.Table
    rejects: tuple[Reject, ...]  # in record order
    layers: tuple[LayerTotals, ...]
    seconds: StageSeconds


class UnitWriter:
    """The files of one unit while they are written.

    `staging` must not exist yet. `complete` turns true with the file's last part; then `finish`. Or
    `abandon`, at any time.
    """

    def __init__(
        self,
        staging: Path,
        *,
        source: Source,
        recipe: Recipe,
        info: ModelInfo,
        values: ValueType,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.staging = staging
        self.source = source
        self.info = info
        self.complete = False
        self._clock = clock
        self._metrics_schema = metrics_schema(info.layers, recipe)
        self._features_schema = features_schema(values)
        self._early: dict[int, Assembled] = {}
        self._next_part = 0
        self._records = 0
        self._n_rejects = 0
        self._layers = tuple(LayerTotals.zero(sae.d_in) for sae in info.saes)
        self._seconds = StageSeconds()
        make_folder(staging.parent)
        make_new_folder(staging)
        self._metrics = ParquetFile(
            staging / METRICS,
            self._metrics_schema,
            group_bytes=METRICS_GROUP_BYTES,
            options=metrics_options(self._metrics_schema),
        )
        self._features = ParquetFile(
            staging / FEATURES,
            self._features_schema,
            group_bytes=FEATURES_GROUP_BYTES,
            options=features_options(values),
        )

    def write_part(self, finished: FinishedPart) -> None:
        """Take a part; store it, and those that waited for it, once all parts before it are stored.

        Raises OSError where the disk refuses, AssertionError where parts do not add up to a file.
        """
        began = self._clock()
        number = finished.part.part.number
        self._check_expected(finished.part.part)
        self._early[number] = self._assemble(finished)
        while (assembled := self._early.pop(self._next_part, None)) is not None:
            self._store(assembled)
        self._seconds += StageSeconds(write=self._clock() - began)

    def finish(self) -> UnitTotals:
        """Close the files and hash them. Nothing is flushed to disk yet: see `daemon.output.commit`."""
        if not self.complete:
            raise AssertionError(f"unit {self.source.unit}: part {self._next_part} is missing")
        began = self._clock()
        self._metrics.close()
        self._features.close()
        files = [
            describe_file(self._metrics.path, self._metrics.rows),
            describe_file(self._features.path, self._features.rows),
        ]
        if self._n_rejects:
            files.append(describe_file(self.staging / REJECTS, self._n_rejects))
        return UnitTotals(
            records=self._records,
            rows=self._metrics.rows,
            rejects=self._n_rejects,
            layers=self._layers,
            seconds=self._seconds + StageSeconds(commit=self._clock() - began),
            files=tuple(files),
        )

    def abandon(self) -> None:
        """Close the files and remove the staging folder, whatever state they are in."""
        self._early.clear()
        try:
            self._metrics.discard()
            self._features.discard()
        finally:
            remove_folder(self.staging)

    def _check_expected(self, part: Part) -> None:
        expected = part.number >= self._next_part and part.number not in self._early
        if part.source.unit != self.source.unit or self.complete or not expected:
            raise AssertionError(
                f"unit {self.source.unit}: part {part.number} of unit {part.source.unit} is not expected,"
                f" {self._next_part} is next"
            )

    def _assemble(self, finished: FinishedPart) -> Assembled:
        return Assembled(
            part=finished.part.part,
            metrics=metrics_table(finished, self._metrics_schema),
            features=features_table(finished, self._features_schema, self.info),
            rejects=tuple(sorted(finished.rejects, key=lambda reject: reject.record_index)),
            layers=finished.layers,
            seconds=finished.seconds,
        )

    def _store(self, assembled: Assembled) -> None:
        part = assembled.part
        self._check_records(assembled)
        self._metrics.append(assembled.metrics)
        self._features.append(assembled.features)
        self._write_rejects(assembled.rejects)
        self._records += part.records
        self._layers = tuple(
            sum_.plus(more) for sum_, more in zip(self._layers, assembled.layers, strict=True)
        )
        self._seconds += assembled.seconds
        self._next_part += 1
        self.complete = part.last
        if part.last and self._early:
            raise AssertionError(f"unit {self.source.unit}: parts beyond the last: {sorted(self._early)}")

    def _check_records(self, assembled: Assembled) -> None:
        """Samples and rejects of a part are its records, and follow those of the part before."""
        indices = [sample.record_index for sample in assembled.part.samples]
        indices += [reject.record_index for reject in assembled.rejects]
        if sorted(indices) != list(range(self._records, self._records + assembled.part.records)):
            raise AssertionError(
                f"unit {self.source.unit} part {assembled.part.number}: its samples and rejects are not the"
                f" {assembled.part.records} records from {self._records} on"
            )

    def _write_rejects(self, rejects: tuple[Reject, ...]) -> None:
        if rejects:
            with (self.staging / REJECTS).open("ab") as file:
                file.writelines(map(reject_line, rejects))
            self._n_rejects += len(rejects)


def reject_line(reject: Reject) -> bytes:
    """One line of `rejects.jsonl`."""
    return (
        to_json(
            {
                "record_index": reject.record_index,
                "id": reject.sample_id,
                "line": reject.line,
                "byte_offset": reject.byte_offset,
                "reason": reject.reason,
                "message": reject.message,
            }
        )
        + b"\n"
    )


def describe_file(path: Path, rows: int) -> FileTotals:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileTotals(name=path.name, rows=rows, bytes=path.stat().st_size, sha256=sha256)

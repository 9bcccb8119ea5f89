"""Turns the finished parts of one input file into the files of its output folder.

Parts may arrive in any order; their results are stored in theirs, so that the files are the same however
batches were formed. Knows no model, no device and no outbox. Everything here blocks: call it in a thread, one
call at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from daemon.fs.durable import make_empty_folder, remove_folder
from daemon.model_info import ModelInfo
from daemon.recipes import Recipe
from daemon.records import (
    FileTotals,
    InputFile,
    LayerTotals,
    Part,
    PartExtent,
    Reject,
    StageSeconds,
    UnitTotals,
)
from daemon.rejects import RejectSummary
from daemon.sink.files import HashedFile
from daemon.sink.jsontext import to_json
from daemon.sink.parquet import ParquetFile
from daemon.sink.parts import StoredPart, parts_of, read_part, write_part
from daemon.sink.schema import (
    Layout,
    features_options,
    features_schema,
    metrics_options,
    metrics_schema,
    texts_options,
    texts_schema,
)

METRICS = "metrics.parquet"
FEATURES = "features.parquet"
TEXTS = "texts.parquet"
REJECTS = "rejects.jsonl"
METRICS_GROUP_BYTES = 8 << 20  # of a row group in memory
FEATURES_GROUP_BYTES = 16 << 20
TEXTS_GROUP_BYTES = 8 << 20


class UnitWriter:
    """The results of one unit while they come together.

    Parts of a file that has several are kept in `parts`, where a later attempt finds them. Once `complete`,
    `write` makes the folder `staging`, whole but for its manifest.
    """

    def __init__(
        self,
        staging: Path,
        *,
        file: InputFile,
        recipe: Recipe,
        info: ModelInfo,
        layout: Layout,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.staging = staging
        self.file = file
        self.recipe = recipe
        self.info = info
        self.layout = layout
        self._clock = clock
        self._extents: dict[int, PartExtent] = {}  # of what is stored
        self._only: StoredPart | None = None  # the part of a file that has one, kept in memory
        self._n_parts: int | None = None  # known from the last one on
        self.has_rows = False  # for sure; what earlier attempts stored is not looked into
        self._write_seconds = 0.0

    @property
    def parts(self) -> Path:
        return parts_of(self.staging)

    @property
    def complete(self) -> bool:
        """Whether every part of the file is stored."""
        return len(self._extents) == self._n_parts

    def has(self, number: int) -> bool:
        """Whether this part is stored."""
        return number in self._extents

    def write_part(self, part: Part, stored: StoredPart) -> None:
        """Store the results of a part. Safe to repeat.

        Raises OSError where the disk refuses, AssertionError where the part does not fit the file.
        """
        began = self._clock()
        self._check_expected(part.file, part.number)
        check_records(part.file, stored, [sample.record_index for sample in part.samples])
        if part.last and part.number == 0:
            self._only = stored
        else:
            write_part(self.parts, stored)
        self._add(part.extent, part.last)
        self.has_rows = self.has_rows or bool(part.samples)
        self._write_seconds += self._clock() - began

    def keep_part(self, file: InputFile, extent: PartExtent, last: bool) -> None:
        """Count in a part that an earlier attempt stored in `parts`."""
        self._check_expected(file, extent.number)
        self._add(extent, last)

    def rejected_whole(self) -> RejectSummary | None:
        """The rejects of a complete file that has no rows; None where it has some."""
        summary = RejectSummary()
        for part in self._stored_parts():  # some may be of an earlier attempt
            if part.extent.records > len(part.rejects):
                return None
            summary.add(part.rejects)
        return summary

    def write(self) -> UnitTotals:
        """Make `staging` anew and write all files but the manifest into it. Nothing is flushed yet."""
        self._check_complete()
        began = self._clock()
        make_empty_folder(self.staging)
        layers = tuple(LayerTotals.zero(sae.d_out) for sae in self.info.saes)
        seconds, clipped = StageSeconds(), 0
        with contextlib.ExitStack() as files:
            metrics = files.enter_context(self._metrics_file())
            features = files.enter_context(self._features_file())
            texts = files.enter_context(self._texts_file()) if self.layout.texts else None
            rejects = RejectsFile(self.staging / REJECTS)
            files.callback(rejects.discard)
            for part in self._stored_parts():
                metrics.append(part.metrics)
                features.append(part.features)
                if texts is not None:
                    assert part.texts is not None, "parts are of one layout"
                    texts.append(part.texts)
                rejects.append(part.rejects)
                layers = tuple(sum_.plus(more) for sum_, more in zip(layers, part.layers, strict=True))
                seconds += part.seconds
                clipped += part.clipped
            tables = [metrics, features, *([] if texts is None else [texts])]
            written = (*(table.close() for table in tables), *rejects.close())
        return UnitTotals(
            records=sum(extent.records for extent in self._extents.values()),
            rows=metrics.rows,
            rejects=rejects.rows,
            layers=layers,
            fvu=tuple([layer.fvu() for layer in layers]),
            seconds=dataclasses.replace(seconds, write=self._write_seconds, commit=self._clock() - began),
            clipped=clipped,
            files=written,
        )

    def abandon(self) -> None:
        """Remove the staging folder, whatever state it is in. Stored parts stay for another attempt."""
        remove_folder(self.staging)

    def _metrics_file(self) -> ParquetFile:
        names = self.info.names
        return ParquetFile(
            self.staging / METRICS,
            metrics_schema(names, self.recipe),
            group_bytes=METRICS_GROUP_BYTES,
            options=metrics_options(names, self.recipe),
        )

    def _features_file(self) -> ParquetFile:
        return ParquetFile(
            self.staging / FEATURES,
            features_schema(self.layout.values),
            group_bytes=FEATURES_GROUP_BYTES,
            options=features_options(self.layout.values),
        )

    def _texts_file(self) -> ParquetFile:
        return ParquetFile(
            self.staging / TEXTS,
            texts_schema(chats=self.recipe.chats),
            group_bytes=TEXTS_GROUP_BYTES,
            options=texts_options(chats=self.recipe.chats),
        )

    def _add(self, extent: PartExtent, last: bool) -> None:
        self._extents[extent.number] = extent
        if last:
            self._n_parts = extent.number + 1

    def _stored_parts(self) -> Iterator[StoredPart]:
        if self._only is not None:
            yield self._only
            return
        for number in range(len(self._extents)):
            part = read_part(self.parts, number)
            if part.extent != self._extents[number]:
                raise AssertionError(f"unit {self.file.unit}: stored part {number} is {part.extent}")
            yield part

    def _check_expected(self, file: InputFile, number: int) -> None:
        beyond = self._n_parts is not None and number >= self._n_parts
        if file.unit != self.file.unit or number in self._extents or beyond:
            raise AssertionError(f"unit {self.file.unit}: part {number} of unit {file.unit} is not expected")

    def _check_complete(self) -> None:
        """Every part is there and each begins where the one before ended."""
        next_record = 0
        for number in range(self._n_parts or 0):
            extent = self._extents.get(number)
            if extent is None or extent.first_record != next_record:
                raise AssertionError(
                    f"unit {self.file.unit}: part {number} is missing or misplaced: {extent}"
                )
            next_record += extent.records
        if not self.complete:
            raise AssertionError(f"unit {self.file.unit}: its last part is missing")


def check_records(file: InputFile, stored: StoredPart, samples: list[int]) -> None:
    """Raises AssertionError unless samples and rejects of a part are its records, each once."""
    extent = stored.extent
    indices = samples + [reject.record_index for reject in stored.rejects]
    if sorted(indices) != list(range(extent.first_record, extent.first_record + extent.records)):
        raise AssertionError(
            f"unit {file.unit} part {extent.number}: its samples and rejects are not the"
            f" {extent.records} records from {extent.first_record} on"
        )


class RejectsFile:
    """`rejects.jsonl`, there only if there is a reject."""

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._path = path
        self._file: HashedFile | None = None

    def append(self, rejects: tuple[Reject, ...]) -> None:
        if not rejects:
            return
        if self._file is None:
            self._file = HashedFile(self._path)
        self._file.write(b"".join(map(reject_line, rejects)))
        self.rows += len(rejects)

    def close(self) -> list[FileTotals]:
        """The file as it is now, if there is one."""
        if self._file is None:
            return []
        self._file.close()
        return [self._file.totals(self.rows)]

    def discard(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()


def reject_line(reject: Reject) -> bytes:
    """One line of `rejects.jsonl`."""
    return (
        to_json(
            {
                "record_index": reject.record_index,
                "id": reject.sample_id,
                "line": reject.line,
                "byte_offset": reject.byte_offset,
                "row_group": reject.row_group,
                "reason": reject.reason,
                "message": reject.message,
            }
        )
        + b"\n"
    )

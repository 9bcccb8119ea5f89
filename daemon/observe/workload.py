"""How many samples are left: those read and not computed are counted, those in unread bytes estimated.

Knows sizes of files and extents of parts, no clock and no contents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from daemon.records import InputFile, PartExtent


@dataclass(slots=True)
class Reading:
    """A file that was taken up."""

    size: int  # bytes of the file
    compressed: bool  # so that an offset in its content says nothing about the file
    records: int = 0  # read so far
    offset: int = 0  # of the last part's first record, or about how far into the file it is
    records_before: int = 0  # that record's index: how many the bytes before it hold
    whole: bool = False  # read to its end

    def unread(self, bytes_per_record: float) -> float:
        """About how many bytes are left to read."""
        if self.whole:
            return 0.0
        if self.compressed or not self.records_before:
            return max(0.0, self.size - self.records * bytes_per_record)
        return max(0.0, self.size - self.offset / self.records_before * self.records)


class Workload:
    """The files under way, and how many bytes a record takes on average in those read so far."""

    def __init__(self) -> None:
        self._readings: dict[str, Reading] = {}
        self._bytes = 0  # of files read whole
        self._records = 0

    def __len__(self) -> int:
        """Files under way."""
        return len(self._readings)

    def begin(self, source: InputFile) -> None:
        compressed = source.claim.name.lower().endswith((".gz", ".zst"))
        self._readings[source.unit] = Reading(source.size, compressed)

    def read(self, source: InputFile, extent: PartExtent, *, last: bool) -> None:
        """One more part of a file was read."""
        reading = self._readings.get(source.unit)
        if reading is None:  # settled meanwhile
            return
        reading.records = extent.first_record + extent.records
        reading.offset, reading.records_before = extent.byte_offset, extent.first_record
        if last:
            reading.whole = True
            self._bytes += reading.size
            self._records += reading.records

    def end(self, unit: str | None) -> None:
        """A file is settled, whether it was taken up or not."""
        if unit is not None:
            self._readings.pop(unit, None)

    @property
    def bytes_per_record(self) -> float | None:
        """None before any is known."""
        size, records = self._bytes, self._records
        for reading in self._readings.values():
            if not reading.whole and not reading.compressed:
                size += reading.offset
                records += reading.records_before
        return size / records if size and records else None

    def unread_records(self, waiting_bytes: int) -> float | None:
        """About how many records the unread bytes hold, `waiting_bytes` of the inbox included.

        0 where none are left, None where nothing read so far tells.
        """
        if not waiting_bytes and all(reading.whole for reading in self._readings.values()):
            return 0.0
        each = self.bytes_per_record
        if each is None:
            return None
        return (waiting_bytes + sum(reading.unread(each) for reading in self._readings.values())) / each

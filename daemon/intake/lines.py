"""Splits a stream of bytes into JSONL records, one line each, in flat memory.

Knows nothing about what a line means.
"""

from __future__ import annotations

from collections.abc import Iterator

from daemon.intake.document import BOM
from daemon.intake.parsing import Place, RawRecord


class LineSplitter:
    """Lines out of chunks; blank ones are skipped, those over the limit keep no text."""

    def __init__(self, max_record_bytes: int) -> None:
        self._max = max_record_bytes
        self._held: list[bytes] = []  # of the current line, while it is within the limit
        self._size = 0  # of the current line
        self._offset = 0  # of the current line
        self._line = 1
        self._index = 0

    def feed(self, chunk: bytes) -> Iterator[RawRecord]:
        """The records that end in this chunk."""
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._extend(piece)
            yield from self._end_line()
        self._extend(rest)

    def finish(self) -> Iterator[RawRecord]:
        """The record that the end of the file ends."""
        yield from self._end_line()

    def _extend(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size <= self._max:
            self._held.append(piece)
        else:
            self._held.clear()

    def _end_line(self) -> Iterator[RawRecord]:
        within = self._size <= self._max
        line = b"".join(self._held)
        start = self._offset
        if start == 0 and line.startswith(BOM):
            line = line.removeprefix(BOM)
            start = len(BOM)
        if not within or line.strip():
            start += len(line) - len(line.lstrip())
            text = line.decode("utf-8", "surrogateescape") if within else None
            yield RawRecord(Place(self._index, self._line, start), text)
            self._index += 1
        self._offset += self._size + 1
        self._line += 1
        self._size = 0
        self._held.clear()

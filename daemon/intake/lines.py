"""Splits a stream of bytes into the records of JSON Lines, or of a JSON text sequence, in flat memory.

A line is a record; a line that holds several objects, as where files were joined that end in no newline, is
as many. Knows nothing about what a record means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from daemon.intake.kinds import LEADING
from daemon.intake.parsing import Place, RawRecord
from daemon.intake.values import ValueEnd

NEWLINE = b"\n"
RECORD_SEPARATOR = b"\x1e"  # of RFC 7464, before each record
# Where one object may end and another begin. Looked for in whole chunks, since that takes a hundredth of the
# time that lines take to be parsed.
JOINT = re.compile(rb"\}(?:[ \t\r\x1e]|\xef\xbb\xbf)*+\{")
BETWEEN = re.compile(rb"(?:[ \t\r\x1e,]|\xef\xbb\xbf)*+")


class LineSplitter:
    """Records out of chunks; blank ones are skipped, those over the limit keep no text.

    Skipped too are a byte-order mark before a record and a comma after an object.
    """

    def __init__(self, max_record_bytes: int, separator: bytes = NEWLINE) -> None:
        self._max = max_record_bytes
        self._separator = separator
        self._held: list[bytes] = []  # of the current line, while it is within the limit
        self._size = 0  # of the current line
        self._offset = 0  # of the current line
        self._line = 1  # where the current line begins; in a sequence it may have several
        self._newlines = 0  # within the current line
        self._index = 0

    def feed(self, chunk: bytes) -> Iterator[RawRecord]:
        """The records that end in this chunk."""
        joints = JOINT.search(chunk) is not None
        *ended, rest = chunk.split(self._separator)
        plain = not joints and self._separator == NEWLINE
        for piece in ended:
            if (
                plain
                and not self._size
                and piece[:1] == b"{"
                and piece[-1:] == b"}"
                and len(piece) <= self._max
            ):
                yield self._record(0, 0, piece)  # nearly every line
                self._offset += len(piece) + 1
                self._line += 1
                continue
            joined = bool(self._size)
            self._extend(piece)
            yield from self._end_line(joints or joined)
        self._extend(rest)

    def finish(self) -> Iterator[RawRecord]:
        """The record that the end of the file ends."""
        yield from self._end_line(joints=True)

    def _extend(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._separator != NEWLINE:
            self._newlines += piece.count(NEWLINE)
        if self._size <= self._max:
            self._held.append(piece)
        else:
            self._held.clear()

    def _end_line(self, joints: bool) -> Iterator[RawRecord]:
        if self._size > self._max:
            yield self._record(0, 0, None)
        else:
            yield from self._records(b"".join(self._held), joints)
        self._offset += self._size + 1
        self._line += 1 if self._separator == NEWLINE else self._newlines
        self._newlines = 0
        self._size = 0
        self._held.clear()

    def _records(self, line: bytes, joints: bool) -> Iterator[RawRecord]:
        """The records of a line that is there whole; `joints` says that it may hold several objects."""
        start = 0
        if line[:1] != b"{":
            found = LEADING.match(line)
            assert found is not None
            start = found.end()
        if start == len(line):
            return
        if joints and JOINT.search(line, start):
            spans = objects_of(line, start)
            if len(spans) > 1:
                for start, end in spans:
                    yield self._record(start, line.count(NEWLINE, 0, start), line[start:end])
                return
        if line[-1:] != b"}":
            line = without_comma(line)
        yield self._record(
            start, line.count(NEWLINE, 0, start) if start else 0, line[start:] if start else line
        )

    def _record(self, start: int, newlines: int, raw: bytes | None) -> RawRecord:
        place = Place(self._index, self._line + newlines, self._offset + start)
        self._index += 1
        return RawRecord(place, None if raw is None else raw.decode("utf-8", "surrogateescape"))


def without_comma(line: bytes) -> bytes:
    """The line without a comma after the object that it ends with."""
    stripped = line.rstrip()
    if stripped[-1:] != b",":
        return line
    before = stripped[:-1].rstrip()
    return before if before[-1:] == b"}" else line


def objects_of(line: bytes, at: int) -> list[tuple[int, int]]:
    """Where the objects begin and end of which the line consists; none where it holds anything else."""
    spans: list[tuple[int, int]] = []
    while True:
        between = BETWEEN.match(line, at)
        assert between is not None
        at = between.end()
        if at == len(line):
            return spans
        end = ValueEnd().find(line, at) if line[at : at + 1] == b"{" else -1
        if end < 0:
            return []
        spans.append((at, end))
        at = end

"""Splits a stream of bytes into the records of JSON Lines, or of a JSON text sequence, in flat memory.

A line is a record; a line that holds several objects, as where files were joined that end in no newline, is
as many. So are several lines that hold objects and arrays of objects in another print. A line that is none of
this is broken, and costs itself alone. Knows nothing about what a record means.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from daemon.source.formats.printed import PrintedValues
from daemon.source.formats.values import ValueEnd
from daemon.source.kinds import LEADING, end_of
from daemon.source.parsing import Place, RawRecord

NEWLINE = b"\n"
RECORD_SEPARATOR = b"\x1e"  # of RFC 7464, before each record
# Where one object may end and another, or an array, begin. Looked for in whole chunks, since that takes a
# hundredth of the time that lines take to be parsed.
JOINT = re.compile(rb"\}(?:[ \t\r\x1e]|\xef\xbb\xbf)*+[\[{]")
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
        self._printed: PrintedValues | None = None  # whose first line is the current one, and that go on

    def feed(self, chunk: bytes) -> Iterator[RawRecord]:
        """The records that end in this chunk."""
        joints = JOINT.search(chunk) is not None
        *ended, rest = chunk.split(self._separator)
        for piece in ended:
            joined = bool(self._size)
            self._extend(piece)
            yield from self._end_line(joints or joined)
        self._extend(rest)

    def finish(self) -> Iterator[RawRecord]:
        """The record that the end of the file ends."""
        yield from self._end_line(joints=True)
        if self._printed is not None:
            yield from self._give_up(self._printed)

    def _extend(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._separator != NEWLINE:
            self._newlines += piece.count(NEWLINE)
        if self._size <= self._max:
            self._held.append(piece)
        else:
            self._held.clear()

    def _end_line(self, joints: bool) -> Iterator[RawRecord]:
        size, newlines = self._size, self._newlines
        line = None if size > self._max else b"".join(self._held)
        self._size = self._newlines = 0
        self._held.clear()
        if self._separator == NEWLINE:
            yield from self._line_of_text(line, size, joints)
            return
        if line is None:
            yield self._record(0, 0, None)
        else:
            yield from self._records(line, joints)
        self._offset += size + 1
        self._line += newlines

    def _line_of_text(self, line: bytes | None, size: int, joints: bool) -> Iterator[RawRecord]:
        """The records that the line ends, whether or not it goes on from those before."""
        if self._printed is not None:
            taken = line is not None and self._printed.take(line)
            if not taken:
                yield from self._give_up(self._printed, but_last=line is not None)
            elif not self._printed.open:
                yield from self._whole(self._printed)
                return
            elif self._printed.is_large(self._max):
                yield from self._shorten(self._printed)
                return
            else:
                return
        if line is None:
            yield self._record(0, 0, None)
        elif n_plain := n_plain_objects(line, joints and JOINT.search(line) is not None):
            yield from self._records(line, joints=n_plain > 1)
        else:
            printed = PrintedValues()
            if printed.take(line):
                if printed.open:
                    self._printed = printed
                else:
                    yield from self._whole(printed)
                return
            yield from self._records(line, joints)
        self._offset += size + 1
        self._line += 1

    def _whole(self, printed: PrintedValues) -> Iterator[RawRecord]:
        """The records of values that all ended."""
        held = bytes(printed.held)
        line, counted = 0, 0
        for start, end in printed.records():
            line += held.count(NEWLINE, counted, start)
            counted = start
            yield self._record(start, line, held[start:end] if end - start <= self._max else None)
        self._printed = None
        self._offset += len(held)
        self._line += len(printed.line_starts)

    def _give_up(self, printed: PrintedValues, *, but_last: bool = False) -> Iterator[RawRecord]:
        """Lines that make no values: each for itself, but for values among them that begin a line and end."""
        starts = [*printed.line_starts, len(printed.held)]
        if but_last:
            starts.pop()  # it is to be looked at anew
        self._printed = None
        yield from self._lines(bytes(printed.held), starts, printed.ends)

    def _lines(self, held: bytes, starts: list[int], ends: dict[int, int]) -> Iterator[RawRecord]:
        """The records of lines, of which `starts` are the starts and the end of the last."""
        number = 0
        while number + 1 < len(starts):
            start, stop = starts[number], starts[number + 1]
            end = ends.get(end_of(LEADING, held, start, stop), -1)
            last = bisect_left(starts, end, number + 1) if end >= 0 else len(starts)
            if last < len(starts) and not held[end : starts[last]].strip(b" \t\r\n,"):
                inside = PrintedValues()
                for one in range(number, last):
                    inside.take(held[starts[one] : starts[one + 1] - 1])
                yield from self._whole(inside)
            else:
                last = number + 1
                yield from self._records(held[start : stop - 1], joints=True)
                self._offset += stop - start
                self._line += 1
            number = last

    def _shorten(self, printed: PrintedValues) -> Iterator[RawRecord]:
        """Give up values that are larger than a record may be, but for what may yet be one within them.

        At least half of what is held is given up, so that no line is looked at again and again.
        """
        held = bytes(printed.held)
        starts = [*printed.line_starts, len(held)]
        kept = [at for at in printed.open_line_values() if 2 * (len(held) - at) <= len(held)]
        number = bisect_right(starts, kept[0]) - 1 if kept else len(starts) - 1
        self._printed = None
        yield from self._lines(held, starts[: number + 1], printed.ends)
        if kept:
            self._printed = PrintedValues()
            for one in range(number, len(starts) - 1):
                self._printed.take(held[starts[one] : starts[one + 1] - 1])

    def _records(self, line: bytes, joints: bool) -> Iterator[RawRecord]:
        """The records of a line that is there whole; `joints` says that it may hold several objects."""
        start = 0 if line[:1] == b"{" else end_of(LEADING, line)
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


def n_plain_objects(line: bytes, joints: bool) -> int:
    """How many objects in a row the line is; 1 for what can't go on in the next, 0 for what may."""
    start = end_of(LEADING, line)
    first = line[start : start + 1]
    if first != b"{":
        return int(first != b"[")
    if joints:
        return len(objects_of(line, start))
    if line.rstrip()[-1:] == b"}":
        return 1
    end = ValueEnd().find(line, start)
    return int(end >= 0 and BETWEEN.fullmatch(line, end) is not None)


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
        at = end_of(BETWEEN, line, at)
        if at == len(line):
            return spans
        end = ValueEnd().find(line, at) if line[at : at + 1] == b"{" else -1
        if end < 0:
            return []
        spans.append((at, end))
        at = end

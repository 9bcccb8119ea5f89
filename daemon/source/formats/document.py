"""Finds the records inside JSON documents: an array, an object with a list of them, or objects in a row.

Reads them in chunks and in flat memory, and follows brackets and quotes alone: what a record means is left to
`daemon.source.parsing`, so that a bad record costs itself and not its file. No streaming parser, ijson among
them, goes on after a bad record or says at which byte a record begins.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from typing import Literal

from daemon.errors import FileError
from daemon.source.formats.values import WORD, ValueEnd, space_after
from daemon.source.kinds import BOM, end_of
from daemon.source.parsing import Fields, Place, RawRecord, is_record, parsed_object, printable

KEY_BYTES = 4096  # a longer key names no list of records
SAMPLES = "samples"  # the key whose list holds the records, whatever else an object has
DECODER = json.JSONDecoder(strict=False)
CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character


class Span:
    """The bytes from a place on, over chunks, kept while they are within a limit."""

    __slots__ = ("_held", "_limit", "column", "line", "offset", "start")

    def __init__(self, limit: int, start: int, offset: int, line: int) -> None:
        self._limit = limit
        self._held: bytearray | None = bytearray()  # of earlier chunks; None when over the limit
        self.start = start  # in the current chunk
        self.offset = offset  # in the file
        self.line = line
        self.column: int | None = None  # unknown while the span begins in the current chunk

    def extend(self, chunk: bytes, end: int) -> None:
        if self._held is None or len(self._held) + end - self.start > self._limit:
            self._held = None
        else:
            self._held += chunk[self.start : end]
        self.start = 0

    def content(self) -> bytes | None:
        return None if self._held is None else bytes(self._held)


Held = Literal["list", "record"]  # what a document holds: records in a list, or itself as one
Steps = Generator[None, None, None]  # pauses where the chunk ends
Records = Generator[RawRecord | None, None, None]  # the same; None is the pause


class DocumentFramer:
    """Records out of chunks of documents, one after the other; those over the limit keep no text.

    An array's elements are records. An object is one, unless it holds them in a list: under `list_key`, or
    with `search` under `samples` or in the first list of objects that it has, and then in no other. An object
    that has the fields of a record before that list is one itself. The reading is one generator, written as
    if the whole were there; it yields None where it needs the next chunk. Holds a chunk and, of a record that
    began before it, at most `max_record_bytes`.
    """

    def __init__(
        self,
        max_record_bytes: int,
        *,
        list_key: str | None = None,
        search: bool = False,
        recipes: Sequence[Fields] = (),
    ) -> None:
        """`recipes` are the fields of which a record has all of one."""
        self._max = max_record_bytes
        self._recipes = recipes
        self._list_key = list_key
        self._search = search
        self._chunk = b""
        self._at = 0
        self._ended = False
        self._offset = 0  # of the chunk
        self._line = 1  # at `_counted`
        self._counted = 0
        self._column = 0  # characters of the current line before the chunk
        self._marks = (0, 0)  # a line, and the byte-order marks on it, which count as no characters
        self._index = 0
        self._spans: list[Span] = []  # that the cursor is within
        self._records = self._documents()

    def feed(self, chunk: bytes) -> Iterator[RawRecord]:
        """The records that are known to have ended. Raises FileError where the frame is damaged."""
        self._advance(chunk)
        yield from self._ready()

    def finish(self) -> Iterator[RawRecord]:
        """The records that the end of the file ends. Raises FileError where it comes too early."""
        self._ended = True
        yield from self._ready()

    def _ready(self) -> Iterator[RawRecord]:
        for record in self._records:
            if record is None:
                return
            yield record

    def _advance(self, chunk: bytes) -> None:
        """Replace the chunk, all of it read."""
        done = len(self._chunk)
        for span in self._spans:
            if span.column is None:
                span.column = self._column_at(span.start)
            span.extend(self._chunk, done)
        self._line_at(done)
        self._column = self._column_at(done) - 1
        self._offset += done
        self._chunk, self._at, self._counted = chunk, 0, 0

    def _documents(self) -> Records:
        before: Held | None = None  # what the document before was
        while opening := (yield from self._next_document(before)):
            if opening == b"[":
                self._at += 1
                yield from self._elements()
                before = "list"
            elif opening == b"{":
                before = yield from self._object()
            elif before == "record" and opening not in b"]}:,":
                span = self._open(self._max)
                yield from self._value()
                yield self._record(span)
            elif before is None:
                raise self._malformed("expected an array of records, or an object")
            else:
                raise self._malformed("expected nothing after the end")

    def _next_document(self, before: Held | None) -> Generator[None, None, bytes]:
        """Skip what may stand between documents; the byte after it, or nothing at the end of the file."""
        opening = yield from self._peek()
        if opening == b"," and before == "record":
            self._at += 1
            opening = yield from self._peek()
        while opening == BOM[:1]:
            yield from self._skip_mark()
            opening = yield from self._peek()
        return opening

    def _skip_mark(self) -> Steps:
        """Move past a byte-order mark, which may lie over the end of a chunk."""
        span = self._open(0)
        for byte in BOM:
            while self._at == len(self._chunk) and not self._ended:
                yield None
            if self._chunk[self._at : self._at + 1] != bytes([byte]):
                raise malformed(
                    span.line, self._column_of(span), "expected an array of records, or an object"
                )
            self._at += 1
        self._close(span)
        line, marks = self._marks
        self._marks = (span.line, marks + 1 if line == span.line else 1)

    def _elements(self) -> Records:
        """From after the opening bracket of an array to after its closing one."""
        if (yield from self._peek()) == b"]":
            self._at += 1
            return
        while True:
            yield from self._peek()
            span = self._open(self._max)
            yield from self._value()
            yield self._record(span)
            mark = yield from self._peek()
            if mark not in (b",", b"]"):
                raise self._malformed("expected a comma or the end of the array")
            self._at += 1
            if mark == b"]":
                return

    def _object(self) -> Generator[RawRecord | None, None, Held]:
        """An object at the top: the records of its list, or one record. Which of them it was."""
        whole = self._open(self._max)
        self._at += 1
        if (self._search or self._list_key is not None) and (yield from self._enter_list()):
            self._spans.clear()
            yield from self._elements()
            yield from self._leave_object()
            return "list"
        yield from self._pass(ValueEnd(depth=1), whole)
        yield self._record(whole)
        return "record"

    def _enter_list(self) -> Generator[None, None, bool]:
        """Move into the list of records of an object; False, and somewhere in the object, if it has none."""
        keys: dict[str, None] = {}  # those that a record may need
        while (yield from self._peek()) == b'"':
            key = yield from self._key()
            if any(key in fields for fields in self._recipes):
                keys[key] = None
            if (yield from self._peek()) != b"[" or is_record(keys, self._recipes):
                yield from self._skip_value()
            elif key == self._list_key or (self._search and key == SAMPLES):
                self._list_key = key
                self._at += 1
                return True
            elif not self._search or self._list_key is not None:
                yield from self._skip_value()
            elif (yield from self._enter_list_of_objects()):
                self._list_key = key
                return True
            if (yield from self._peek()) != b",":
                break
            self._at += 1
        return False

    def _enter_list_of_objects(self) -> Generator[None, None, bool]:
        """Move into the list at the cursor; False, and past it, where it does not begin with an object."""
        span = self._open(0)
        self._at += 1
        found = (yield from self._peek()) == b"{"
        if not found:
            yield from self._pass(ValueEnd(depth=1), span)
        self._close(span)
        return found

    def _leave_object(self) -> Steps:
        """From after the list to after the object's closing bracket."""
        while (yield from self._peek()) == b",":
            self._at += 1
            if (yield from self._peek()) != b'"':
                raise self._malformed("expected a key")
            key = yield from self._key()
            if key == self._list_key:
                raise self._malformed(f"the key {printable(key)} comes twice")
            if (yield from self._peek()) == b"[" and self._search and self._list_key != SAMPLES:
                yield from self._check_list(key)
            else:
                yield from self._skip_value()
        if (yield from self._peek()) != b"}":
            raise self._malformed("expected a comma or the end of the object")
        self._at += 1

    def _check_list(self, key: str) -> Steps:
        """Move past a list after the records. Raises FileError where it holds records too."""
        list_span = self._open(0)
        self._at += 1
        if (yield from self._peek()) == b"{":
            span = self._open(self._max)
            yield from self._value()
            first = parsed_object(self._close(span) or b"")
            if first is not None and is_record(first, self._recipes):
                raise several_lists(self._list_key or "", key)
        yield from self._pass(ValueEnd(depth=1), list_span)
        self._close(list_span)

    def _key(self) -> Generator[None, None, str]:
        """Move past the key at the cursor and its colon; its text, or nothing where that can't matter."""
        span = self._open(KEY_BYTES)
        yield from self._value()
        raw = self._close(span)
        if (yield from self._peek()) != b":":
            raise self._malformed("expected a colon")
        self._at += 1
        try:
            return str(DECODER.decode(as_text(raw or b"")))
        except ValueError:
            return ""  # the record it belongs to says so

    def _skip_value(self) -> Steps:
        span = self._open(0)
        yield from self._value()
        self._close(span)

    def _value(self) -> Steps:
        """Move past the value at the cursor, the start of the innermost span."""
        span = self._spans[-1]
        first = self._chunk[self._at : self._at + 1]
        if not first:
            raise self._truncated(span)
        if first in b'"[{':
            yield from self._pass(ValueEnd(), span)
            return
        if first in b",]}":
            raise self._malformed("expected a value")
        while True:
            self._at = end_of(WORD, self._chunk, self._at)
            if self._at < len(self._chunk) or self._ended:
                return
            yield None

    def _pass(self, value: ValueEnd, span: Span) -> Steps:
        """Move past a value with brackets or quotes; `span` is what is truncated where it never ends."""
        while (end := value.find(self._chunk, self._at)) < 0:
            self._at = len(self._chunk)
            if self._ended:
                raise self._truncated(span)
            yield None
        self._at = end

    def _peek(self) -> Generator[None, None, bytes]:
        """Skip white space; the byte after it, or nothing at the end of the file."""
        while True:
            self._at = space_after(self._chunk, self._at)
            if self._at < len(self._chunk) or self._ended:
                return self._chunk[self._at : self._at + 1]
            yield None

    def _open(self, limit: int) -> Span:
        span = Span(limit, self._at, self._offset + self._at, self._line_at(self._at))
        self._spans.append(span)
        return span

    def _close(self, span: Span) -> bytes | None:
        """The span's bytes, up to the cursor; None where there are too many."""
        self._spans.remove(span)
        span.extend(self._chunk, self._at)
        return span.content()

    def _record(self, span: Span) -> RawRecord:
        raw = self._close(span)
        record = RawRecord(Place(self._index, span.line, span.offset), None if raw is None else as_text(raw))
        self._index += 1
        return record

    def _line_at(self, position: int) -> int:
        """The line at a position in the chunk, none before the last one asked for."""
        self._line += self._chunk.count(b"\n", self._counted, position)
        self._counted = position
        return self._line

    def _column_at(self, position: int) -> int:
        """The column, in characters, at a position in the chunk."""
        newline = self._chunk.rfind(b"\n", 0, position)
        before = self._column if newline < 0 else 0
        return before + n_characters(self._chunk[newline + 1 : position]) + 1

    def _column_of(self, span: Span) -> int:
        return self._unmarked(span.line, self._column_at(span.start) if span.column is None else span.column)

    def _unmarked(self, line: int, column: int) -> int:
        """The column, less the byte-order marks before it."""
        return column - self._marks[1] if line == self._marks[0] else column

    def _truncated(self, span: Span) -> FileError:
        why = "the file ends in the middle: it may be truncated"
        return malformed(span.line, self._column_of(span), why)

    def _malformed(self, why: str) -> FileError:
        line = self._line_at(self._at)
        return malformed(line, self._unmarked(line, self._column_at(self._at)), why)


def several_lists(one: str, other: str) -> FileError:
    return FileError(
        "no_usable_record",
        f"the object has lists of objects under {printable(one)} and {printable(other)}: keep the one with"
        f" the records, or name it {SAMPLES}",
    )


def as_text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def n_characters(raw: bytes) -> int:
    return len(raw) if raw.isascii() else len(raw.translate(None, CONTINUATION))


def malformed(line: int, column: int, why: str) -> FileError:
    return FileError(
        "malformed_json", f"not valid JSON at line {line}, column {column}: {why}: export it again"
    )

"""Finds the records inside one JSON document: an array, an object with `samples`, or one object.

Reads it in chunks and in flat memory, and follows brackets and quotes alone: what a record means is left to
`daemon.intake.parsing`, so that a bad record costs itself and not its file. No streaming parser, ijson among
them, goes on after a bad record or says at which byte a record begins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator

from daemon.errors import FileError
from daemon.intake.parsing import Place, RawRecord

BOM = b"\xef\xbb\xbf"
BINARY_PROBE_BYTES = 8192
KEY_BYTES = 64  # `"samples"` written with escapes only is shorter
DECODER = json.JSONDecoder(strict=False)
CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character


def nested(levels: int) -> bytes:
    """The pattern of what stands between two brackets, where brackets nest no deeper than that."""
    items = [ATOM, rb"[\[{]" + nested(levels - 1) + rb"[\]}]"] if levels else [ATOM]
    return rb"(?:" + rb"|".join(items) + rb"|)*+"


# All possessive, so that no bytes make them slow. A repeated group ends in an empty alternative: in Debian's
# Python 3.11.2 a possessive repetition that fails halfway through its group leaves the match where it failed.
SPACE = rb"[ \t\r\n]*+"
STRING_BODY = rb'[^"\\]*+(?:\\.[^"\\]*+|)*+'
STRING = rb'"' + STRING_BODY + rb'"'
ATOM = rb'[^"\[\]{}]*+' + STRING + rb'|[^"\[\]{}]++'
WORD_BYTE = rb'[^,\[\]{}" \t\r\n]'
SPACES = re.compile(SPACE)
WORD = re.compile(WORD_BYTE + rb"*+")
IN_STRING = re.compile(STRING_BODY, re.DOTALL)
BALANCED = re.compile(nested(3), re.DOTALL)
BRACKET_RUN = re.compile(rb"[\[{]++|[\]}]++")
PLAIN_VALUE = rb"[\[{]" + nested(3) + rb"[\]}]|" + STRING + rb"|" + WORD_BYTE + rb"++"
PLAIN_ELEMENT = re.compile(SPACE + rb"(" + PLAIN_VALUE + rb")" + SPACE + rb"([,\]])", re.DOTALL)


def check_text(head: bytes) -> None:
    """Raises FileError where the first bytes of a file are no text."""
    if b"\0" in head[:BINARY_PROBE_BYTES]:
        raise FileError("binary", "the file is binary, not JSON text: save it as UTF-8 JSON")


class ValueEnd:
    """Finds where a value ends, in chunks, given that it begins with a quote or a bracket."""

    __slots__ = ("_depth", "_escaped", "_in_string")

    def __init__(self, *, depth: int = 0) -> None:
        self._depth = depth  # of brackets open; 0 before the first, and in a value that is a string
        self._in_string = False
        self._escaped = False  # by a backslash that ended the last chunk

    def find(self, chunk: bytes, at: int) -> int:
        """The position after the value's last byte; -1 where the chunk ends first."""
        while at < len(chunk):
            if self._in_string:
                at = self._pass_string(chunk, at)
                if not self._in_string and self._depth == 0:
                    return at
                continue
            if self._depth:
                found = BALANCED.match(chunk, at)
                assert found is not None
                at = found.end()
            run = BRACKET_RUN.match(chunk, at)
            if run is None:  # a quote, or the end
                self._in_string = at < len(chunk)
                at += 1
            elif chunk[at] in b"[{":
                self._depth += run.end() - at
                at = run.end()
            elif run.end() - at >= self._depth:
                return at + self._depth
            else:
                self._depth -= run.end() - at
                at = run.end()
        return -1

    def _pass_string(self, chunk: bytes, at: int) -> int:
        """To after the quote that ends the string, or to the chunk's end."""
        if self._escaped:
            self._escaped = False
            at += 1
        found = IN_STRING.match(chunk, at)
        assert found is not None
        at = found.end()
        if at < len(chunk):
            self._in_string = chunk[at] != ord('"')
            self._escaped = self._in_string
            at += 1
        return at


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


Steps = Generator[None, None, None]  # pauses where the chunk ends
Records = Generator[RawRecord | None, None, None]  # the same; None is the pause


class DocumentFramer:
    """Records out of chunks of one document; those over the limit keep no text.

    The reading is one generator, written as if the whole document were there; it yields None where it needs
    the next chunk. Holds a chunk and, of a record that began before it, at most `max_record_bytes`.
    """

    def __init__(self, max_record_bytes: int) -> None:
        self._max = max_record_bytes
        self._head: bytearray | None = bytearray()  # of the file, until it can be told from a binary one
        self._chunk = b""
        self._at = 0
        self._ended = False
        self._offset = 0  # of the chunk
        self._line = 1  # at `_counted`
        self._counted = 0
        self._column = 0  # characters of the current line before the chunk
        self._index = 0
        self._spans: list[Span] = []  # that the cursor is within
        self._records = self._document()

    def feed(self, chunk: bytes) -> Iterator[RawRecord]:
        """The records that are known to have ended. Raises FileError where the frame is damaged."""
        if self._head is None:
            self._advance(chunk)
            yield from self._ready()
            return
        self._head += chunk
        if len(self._head) >= BINARY_PROBE_BYTES:
            yield from self._begin()

    def finish(self) -> Iterator[RawRecord]:
        """The records that the end of the file ends. Raises FileError where it comes too early."""
        self._ended = True
        if self._head is not None:
            yield from self._begin()
        yield from self._ready()

    def _begin(self) -> Iterator[RawRecord]:
        head, self._head = bytes(self._head or b""), None
        check_text(head)
        self._chunk = head.removeprefix(BOM)
        self._offset = len(head) - len(self._chunk)
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

    def _document(self) -> Records:
        opening = yield from self._peek()
        if opening == b"[":
            yield from self._elements()
            yield from self._expect_end()
        elif opening == b"{":
            yield from self._object()
        elif opening:
            raise self._malformed("expected an array of records, or an object")

    def _elements(self) -> Records:
        """From the opening bracket of an array to after its closing one."""
        self._at += 1
        if (yield from self._peek()) == b"]":
            self._at += 1
            return
        while not (yield from self._plain_elements()):
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

    def _plain_elements(self) -> Generator[RawRecord, None, bool]:
        """Those of little nesting that lie in this chunk whole, with what follows each: the fast path.

        Returns whether that was the end of the array.
        """
        chunk, at, index = self._chunk, self._at, self._index
        line, counted = self._line, self._counted
        last = False
        while not last and (element := PLAIN_ELEMENT.match(chunk, at)):
            start, end = element.span(1)
            line += chunk.count(b"\n", counted, start)
            counted = start
            text = chunk[start:end].decode("utf-8", "surrogateescape") if end - start <= self._max else None
            yield RawRecord(Place(index, line, self._offset + start), text)
            index += 1
            at = element.end()
            last = element[2] == b"]"
        self._at, self._index = at, index
        self._line, self._counted = line, counted
        return last

    def _object(self) -> Records:
        """A whole document that is an object: the array under `samples`, or one record."""
        whole = self._open(self._max)
        self._at += 1
        if (yield from self._enter_samples()):
            self._spans.clear()
            yield from self._elements()
            yield from self._leave_object()
        else:
            yield from self._pass(ValueEnd(depth=1), whole)
            yield self._record(whole)
        yield from self._expect_end()

    def _enter_samples(self) -> Generator[None, None, bool]:
        """Move to the array under the key `samples` of an object; False where there is none."""
        while (yield from self._peek()) == b'"':
            key = yield from self._key()
            if (yield from self._peek()) == b"[" and key == "samples":
                return True
            yield from self._skip_value()
            if (yield from self._peek()) != b",":
                break
            self._at += 1
        return False

    def _leave_object(self) -> Steps:
        """From after the array to after the object's closing bracket."""
        while (yield from self._peek()) == b",":
            self._at += 1
            if (yield from self._peek()) != b'"':
                raise self._malformed("expected a key")
            if (yield from self._key()) == "samples":
                raise self._malformed("the key samples comes twice")
            yield from self._peek()
            yield from self._skip_value()
        if (yield from self._peek()) != b"}":
            raise self._malformed("expected a comma or the end of the object")
        self._at += 1

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
            word = WORD.match(self._chunk, self._at)
            assert word is not None
            self._at = word.end()
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
            space = SPACES.match(self._chunk, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._chunk) or self._ended:
                return self._chunk[self._at : self._at + 1]
            yield None

    def _expect_end(self) -> Steps:
        if (yield from self._peek()):
            raise self._malformed("expected nothing after the end")

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

    def _truncated(self, span: Span) -> FileError:
        column = self._column_at(span.start) if span.column is None else span.column
        return malformed(span.line, column, "the file ends in the middle: it may be truncated")

    def _malformed(self, why: str) -> FileError:
        return malformed(self._line_at(self._at), self._column_at(self._at), why)


def as_text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def n_characters(raw: bytes) -> int:
    return len(raw) if raw.isascii() else len(raw.translate(None, CONTINUATION))


def malformed(line: int, column: int, why: str) -> FileError:
    return FileError(
        "malformed_json", f"not valid JSON at line {line}, column {column}: {why}: export it again"
    )

"""Finds the records inside one JSON document: an array, an object with `samples`, or one object.

Finds where each record begins and ends, and leaves its meaning to `daemon.intake.parsing`, so that a bad
record costs itself and not its file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from daemon.errors import FileError
from daemon.intake.parsing import BRACKETS, TOKEN, Place, RawRecord

BOM = b"\xef\xbb\xbf"
BINARY_PROBE_BYTES = 8192
WHITESPACE = re.compile(r"[ \t\r\n]*")
WORD = re.compile(r"[^,\[\]{}\s]+")
DECODER = json.JSONDecoder(strict=False)


def check_text(head: bytes) -> None:
    """Raises FileError where the first bytes of a file are no text."""
    if b"\0" in head[:BINARY_PROBE_BYTES]:
        raise FileError("binary", "the file is binary, not JSON text: save it as UTF-8 JSON")


def document_records(content: bytes) -> Iterator[RawRecord]:
    """The records of a whole document. Raises FileError where its frame is damaged, at the place."""
    check_text(content)
    bom = len(BOM) if content.startswith(BOM) else 0
    document = Document(content[bom:].decode("utf-8", "surrogateescape"), bom)
    return document.records()


class Document:
    """A cursor over one JSON text that counts lines and bytes as it moves forward."""

    def __init__(self, text: str, byte_offset: int) -> None:
        self._text = text
        self._at = 0
        self._marked = 0  # up to where lines and bytes are counted
        self._line = 1
        self._byte = byte_offset
        self._index = 0

    def records(self) -> Iterator[RawRecord]:
        opening = self._peek()
        if opening == "[":
            yield from self._elements()
            self._expect_end()
        elif opening == "{" and self._enter_samples():
            yield from self._elements()
            self._leave_object()
        elif opening == "{":
            self._at = 0
            self._peek()
            yield self._record(self._end_of_value())
            self._expect_end()
        elif opening:
            raise self._malformed("expected an array of records, or an object")

    def _elements(self) -> Iterator[RawRecord]:
        """From the opening bracket of an array to after its closing one."""
        self._at += 1
        if self._peek() == "]":
            self._at += 1
            return
        while True:
            self._peek()
            yield self._record(self._end_of_value())
            mark = self._peek()
            if mark not in (",", "]"):
                raise self._malformed("expected a comma or the end of the array")
            self._at += 1
            if mark == "]":
                return

    def _enter_samples(self) -> bool:
        """Move to the array under the key `samples` of an object; False where there is none."""
        self._at += 1
        while self._peek() == '"':
            key = self._key()
            if self._peek() != ":":
                raise self._malformed("expected a colon")
            self._at += 1
            if self._peek() == "[" and key == "samples":
                return True
            self._at = self._end_of_value()
            if self._peek() != ",":
                break
            self._at += 1
        return False

    def _key(self) -> str:
        """Move past the string at the cursor; its text, or nothing where that is no valid JSON."""
        end = self._end_by_brackets()
        raw, self._at = self._text[self._at : end], end
        try:
            return str(DECODER.decode(raw))
        except ValueError:
            return ""  # names no key that matters here; the record it belongs to says so

    def _leave_object(self) -> None:
        """From after a member's value to the end of the document."""
        while self._peek() == ",":
            self._at += 1
            if self._peek() != '"':
                raise self._malformed("expected a key")
            self._key()
            if self._peek() != ":":
                raise self._malformed("expected a colon")
            self._at += 1
            self._peek()
            self._at = self._end_of_value()
        if self._peek() != "}":
            raise self._malformed("expected a comma or the end of the object")
        self._at += 1
        self._expect_end()

    def _record(self, end: int) -> RawRecord:
        """The value from here to `end`, and the cursor after it."""
        start = self._at
        self._mark(start)
        text = self._text[start:end]
        record = RawRecord(Place(self._index, self._line, self._byte), text)
        self._index += 1
        self._at = end
        return record

    def _end_of_value(self) -> int:
        """Where the value at the cursor ends, if need be by its brackets alone."""
        if self._at == len(self._text):
            raise self._malformed("the file ends in the middle: it may be truncated")
        try:
            return DECODER.raw_decode(self._text, self._at)[1]
        except (ValueError, RecursionError):
            return self._end_by_brackets()

    def _end_by_brackets(self) -> int:
        """Where a value ends that is not valid JSON, or nests too deep for the decoder."""
        if self._text[self._at] not in '"[{':
            return self._end_of_word()
        depth = 0
        for match in TOKEN.finditer(self._text, self._at):
            depth += BRACKETS.get(match[0], 0)
            if match["close"] == "":
                break
            if depth <= 0:
                return match.end()
        raise self._malformed("the file ends in the middle: it may be truncated")

    def _end_of_word(self) -> int:
        match = WORD.match(self._text, self._at)
        if match is None:
            raise self._malformed("expected a value")
        return match.end()

    def _peek(self) -> str:
        """Skip white space; the character after it, or nothing at the end."""
        match = WHITESPACE.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        return self._text[self._at : self._at + 1]

    def _expect_end(self) -> None:
        if self._peek():
            raise self._malformed("expected nothing after the end")

    def _mark(self, position: int) -> None:
        passed = self._text[self._marked : position]
        self._byte += len(passed.encode("utf-8", "surrogateescape"))
        self._line += passed.count("\n")
        self._marked = position

    def _malformed(self, why: str) -> FileError:
        before = self._text[: self._at]
        line = before.count("\n") + 1
        column = self._at - (before.rfind("\n") + 1) + 1
        return FileError(
            "malformed_json", f"not valid JSON at line {line}, column {column}: {why}: export it again"
        )

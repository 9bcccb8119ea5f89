"""Finds the rows of CSV in chunks of bytes and in flat memory. Knows nothing about columns.

A field is quoted where it begins with a quote; then it ends with one that is not doubled, and newlines before
that belong to it. A quote elsewhere stands for itself. Rows end with \\n, \\r\\n or \\r; empty ones are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from daemon.errors import FileError
from daemon.source.kinds import end_of

QUOTE = b'"'
IN_QUOTES = re.compile(rb'[^"]*+(?:""[^"]*+|)*+')  # possessive, so that no text makes it slow


class Row(NamedTuple):
    line: int  # 1-based, where it begins
    byte_offset: int
    raw: bytes | None  # without its end; None where it is too large to keep
    broken: bool = False  # text follows the closing quote of a field


class RowSplitter:
    """Rows out of chunks; those over the limit keep no bytes."""

    def __init__(self, delimiter: bytes, max_row_bytes: int) -> None:
        self._max = max_row_bytes
        self._quotes = Quotes(delimiter)
        self._return = b""  # a \r that ended the last chunk: \n may follow
        self._held: list[bytes] = []  # of the current row, while it is within the limit
        self._size = 0  # of the current row, its end included
        self._lines = 0  # that ended within the current row
        self._line = 1  # where the current row begins
        self._offset = 0

    def feed(self, chunk: bytes) -> Iterator[Row]:
        """The rows that end in this chunk."""
        chunk = self._return + chunk
        self._return = b"\r" if chunk.endswith(b"\r") else b""
        yield from self._rows(chunk.removesuffix(b"\r"))

    def finish(self) -> Iterator[Row]:
        """The row that the end of the file ends. Raises FileError where a quote is still open."""
        yield from self._rows(self._return)
        if not self._size:
            return
        if self._quotes.open:
            raise FileError(
                "malformed_csv",
                f"a quoted field of the row at line {self._line} never ends: close its quote, or double it"
                " where it stands for itself",
            )
        yield from self._end(b"", 0)

    def _rows(self, content: bytes) -> Iterator[Row]:
        if self._quotes.open and QUOTE not in content:  # all of it lies within one field
            self._size += len(content)
            self._lines += len((content + b".").splitlines()) - 1
            self._hold(content)
            return
        for line in content.splitlines(keepends=True):
            body = line.rstrip(b"\r\n")
            ended = len(body) < len(line)
            self._quotes.follow(body)
            self._size += len(line)
            self._lines += ended
            if ended and not self._quotes.open:
                yield from self._end(body, len(line) - len(body))
            else:
                self._hold(line)

    def _hold(self, piece: bytes) -> None:
        if self._size <= self._max:
            self._held.append(piece)
        else:
            self._held.clear()

    def _end(self, body: bytes, n_end: int) -> Iterator[Row]:
        """The current row, of which `body` is the last piece, and `n_end` the length of its end."""
        raw = b"".join([*self._held, body]) if self._size - n_end <= self._max else None
        if raw != b"":
            yield Row(self._line, self._offset, raw, self._quotes.broken)
        self._offset += self._size
        self._line += self._lines
        self._size = self._lines = 0
        self._held.clear()
        self._quotes.restart()


class Quotes:
    """Whether a row that comes in pieces is inside a quoted field."""

    def __init__(self, delimiter: bytes) -> None:
        self._delimiter = delimiter
        self.restart()

    def restart(self) -> None:
        """A row begins."""
        self._at: Literal["start", "unquoted", "quoted", "quote"] = "start"
        self.broken = False

    @property
    def open(self) -> bool:
        return self._at == "quoted"

    def follow(self, piece: bytes) -> None:
        at = 0
        while at < len(piece):
            byte = piece[at : at + 1]
            if self._at == "quoted":
                at = end_of(IN_QUOTES, piece, at) + 1
                if at <= len(piece):  # a quote stands there, and no second one in this piece
                    self._at = "quote"
            elif self._at == "unquoted":
                end = piece.find(self._delimiter, at)
                if end < 0:
                    return
                self._at, at = "start", end + 1
            elif byte == QUOTE:  # that opens a field, or doubles the one before
                self._at, at = "quoted", at + 1
            elif byte == self._delimiter:
                self._at, at = "start", at + 1
            else:
                self.broken |= self._at == "quote"
                self._at = "unquoted"

"""Follows JSON values over lines, by their grammar, and says where they end or at which line they break.

The grammar alone counts: a word may be any, and a comma may stand before a closing bracket, so that a bad
record costs itself. Each byte is looked at once, and once more where records are found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from daemon.source.formats.values import STRING, WORD, WORD_BYTE, ValueEnd, space_after
from daemon.source.kinds import end_of

Span = tuple[int, int]
Expected = Literal["value", "key", "colon", "comma", "document"]

BETWEEN = re.compile(rb"(?:[ \t\r\n\x1e]|\xef\xbb\xbf)*+")
TOKEN = re.compile(rb"[ \t\r\n]*+(" + STRING + rb"|[\[\]{},:]|" + WORD_BYTE + rb"++|\Z)", re.DOTALL)
MAX_DEPTH = 10_000  # deeper than any that is read
MAX_LINES = 100_000  # of which the starts are held
CLOSING = {b"]": b"[", b"}": b"{"}


class PrintedValues:
    """Objects and arrays in a row, taken line by line."""

    def __init__(self) -> None:
        self.held = bytearray()  # the lines so far, with a newline after each
        self.line_starts: list[int] = []
        self.ends: dict[int, int] = {}  # of values that begin a line and ended, by where they begin
        self._brackets: list[tuple[bytes, int, bool]] = []  # open: which, where, whether it begins its line
        self._expected: Expected = "document"
        self._documents: list[Span] = []  # those that ended

    def take(self, line: bytes) -> bool:
        """Go on over a line; whether it fits what came before. If not, there is no going on."""
        start = len(self.held)
        self.line_starts.append(start)
        self.held += line
        self.held += b"\n"
        first = True
        at, end = 0, len(line)
        while True:
            if self._expected == "document":
                at = end_of(BETWEEN, line, at)
            token = TOKEN.match(line, at)
            if token is None:
                return False
            at = token.end()
            what = token[1]
            if not what:
                return at == end
            if not self._step(what, start + token.start(1), start + at, first):
                return False
            first = False

    @property
    def open(self) -> bool:
        return bool(self._brackets)

    def open_line_values(self) -> list[int]:
        """Where the open values begin that begin a line."""
        return [start for _, start, begins_line in self._brackets if begins_line]

    def is_large(self, max_bytes: int) -> bool:
        """Whether more is held than is worth it."""
        return len(self.held) > max_bytes or len(self.line_starts) > MAX_LINES

    def records(self) -> Iterator[Span]:
        """Where the records are: the objects, and the elements of an array whose first one is an object."""
        held = bytes(self.held)
        for start, end in self._documents:
            if held[start : start + 1] == b"[" and held[space_after(held, start + 1)] == ord("{"):
                yield from elements_of(held, start + 1)
            else:
                yield start, end

    def _step(self, what: bytes, start: int, end: int, first: bool) -> bool:
        """Take a token; whether it may stand there."""
        expected = self._expected
        if what in b"[{":
            if expected not in ("value", "document") or len(self._brackets) == MAX_DEPTH:
                return False
            self._brackets.append((what, start, first))
            self._expected = "value" if what == b"[" else "key"
            return True
        if what in b"]}":
            return self._close(what, end)
        if what == b",":
            if expected == "comma":
                self._expected = "value" if self._brackets[-1][0] == b"[" else "key"
            return expected == "comma" or (expected == "document" and bool(self._documents))
        if what == b":":
            self._expected = "value"
            return expected == "colon"
        if expected == "key" and what[:1] == b'"':
            self._expected = "colon"
            return True
        if expected != "value":
            return False
        self._end_value(start, end)
        return True

    def _close(self, what: bytes, end: int) -> bool:
        if not self._brackets or self._brackets[-1][0] != CLOSING[what]:
            return False
        if self._expected == "colon" or (self._expected == "value" and what == b"}"):
            return False
        _, start, begins_line = self._brackets.pop()
        if begins_line:
            self.ends[start] = end
        self._end_value(start, end)
        return True

    def _end_value(self, start: int, end: int) -> None:
        """A value ended, within the brackets that are open now."""
        self._expected = "comma" if self._brackets else "document"
        if not self._brackets:
            self._documents.append((start, end))


def elements_of(held: bytes, at: int) -> Iterator[Span]:
    """Where the elements are of an array that is there whole, from after its opening bracket."""
    while True:
        at = space_after(held, at)
        if held[at : at + 1] == b",":
            at = space_after(held, at + 1)
        first = held[at : at + 1]
        if first == b"]":
            return
        end = ValueEnd().find(held, at) if first in b'"[{' else end_of(WORD, held, at)
        yield at, end
        at = end

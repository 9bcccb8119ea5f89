"""Where a JSON value ends, told by brackets and quotes alone, in chunks and in flat memory."""

from __future__ import annotations

import re

from daemon.source.kinds import end_of


def nested(levels: int) -> bytes:
    """The pattern of what stands between two brackets, where brackets nest no deeper than that."""
    items = [ATOM, rb"[\[{]" + nested(levels - 1) + rb"[\]}]"] if levels else [ATOM]
    return rb"(?:" + rb"|".join(items) + rb"|)*+"


# All possessive, so that no bytes make them slow. A repeated group ends in an empty alternative: in Debian's
# Python 3.11.2 a possessive repetition that fails halfway through its group leaves the match where it failed.
STRING_BODY = rb'[^"\\]*+(?:\\.[^"\\]*+|)*+'
STRING = rb'"' + STRING_BODY + rb'"'
ATOM = rb'[^"\[\]{}]*+' + STRING + rb'|[^"\[\]{}]++'
WORD_BYTE = rb'[^,\[\]{}" \t\r\n]'
SPACES = re.compile(rb"[ \t\r\n]*+")
WORD = re.compile(WORD_BYTE + rb"*+")
IN_STRING = re.compile(STRING_BODY, re.DOTALL)
BALANCED = re.compile(nested(3), re.DOTALL)
BRACKET_RUN = re.compile(rb"[\[{]++|[\]}]++")


def space_after(data: bytes, at: int) -> int:
    return end_of(SPACES, data, at)


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
                at = end_of(BALANCED, chunk, at)
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
        at = end_of(IN_STRING, chunk, at)
        if at < len(chunk):
            self._in_string = chunk[at] != ord('"')
            self._escaped = self._in_string
            at += 1
        return at

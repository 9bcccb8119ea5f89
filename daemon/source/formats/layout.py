"""Tells by the first bytes of a content how its records are laid out, whatever the file's name says.

JSON Lines, a sequence of RFC 7464, or documents: an array, an object that holds a list of records, or values
one after the other, printed in whatever way. The name decides only where the content could be either: where
its first record is damaged or larger than any record may be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from daemon.source.formats.document import DECODER, KEY_BYTES, SAMPLES, several_lists
from daemon.source.formats.values import WORD, ValueEnd, space_after
from daemon.source.kinds import LEADING, end_of
from daemon.source.parsing import Fields, is_record, parsed_object

Framing = Literal["lines", "sequence", "document"]

SPACE = b" \t\r\n\f\v\x1e\xef\xbb\xbf"  # bytes that may stand before a record
BETWEEN = SPACE + b","  # and between two
OPEN_ENDS = b"{[,:"  # with one of these ends a line of JSON that goes on in the next
PROBED_LINES = 64
UNKNOWN = object()  # a value that is damaged, or not there to its end


@dataclass(frozen=True, slots=True)
class Layout:
    """How the records of a content are found."""

    framing: Framing
    list_key: str | None = None  # under which the first object holds the records; None: it is one itself
    search: bool = False  # the first object goes on beyond the bytes seen, and so may its lists of records


LINES = Layout("lines")
SEQUENCE = Layout("sequence")
DOCUMENT = Layout("document")


class FirstBytes:
    """The beginning of a content, which tells its layout."""

    def __init__(
        self, head: bytes, *, named_lines: bool, ended: bool, last: bool, recipes: Sequence[Fields]
    ) -> None:
        """`ended` says that there is no more than `head`, `last` that no more will be shown.

        `recipes` are the fields of which a record has all of one.
        """
        self._head = head
        self._named = LINES if named_lines else DOCUMENT
        self._ended = ended
        self._last = last or ended
        self._recipes = recipes
        self._start = self._skip(0)

    def layout(self) -> Layout | None:
        """None where more must be seen. Raises FileError where an object holds several lists of records."""
        match self._head[self._start : self._start + 1]:
            case b"":
                return self._named if self._last else None
            case b"\x1e":
                return SEQUENCE
            case b"{":
                return self._of_object()
            case b"[":
                return self._of_array()
        return LINES if self._mostly_lines() else self._named

    def _of_object(self) -> Layout | None:
        end = ValueEnd().find(self._head, self._start)
        if end < 0:
            return self._of_unfinished() if self._last else None
        value = self._head[self._start : end]
        if b"\n" in value:
            return LINES if parsed_object(value) is None and self._mostly_lines() else self._of_value(value)
        newline = self._head.find(b"\n", end)
        rest = self._head[end : newline if newline >= 0 else None].lstrip(BETWEEN)
        if rest:
            return self._beside(rest, newline)
        if newline < 0 and not self._last:
            return None
        if self._skip(end) == len(self._head):  # nothing but this value, so far
            if self._ended:
                return self._of_value(value) if b"[" in value else LINES
            return LINES if self._last else None
        return self._by_second_line(self._skip(newline))

    def _beside(self, rest: bytes, newline: int) -> Layout | None:
        """After the first object comes something else on its line: another one, or damage."""
        if newline >= 0:
            return LINES
        if rest.startswith(b"{"):
            return DOCUMENT
        return self._named if self._last else None

    def _by_second_line(self, start: int) -> Layout | None:
        """After the first object, which has its line to itself, comes something else."""
        newline = self._head.find(b"\n", start)
        line = self._head[start : newline if newline >= 0 else None].rstrip(BETWEEN)
        if not line.startswith(b"{") or line.endswith(b"}"):
            return LINES
        end = ValueEnd().find(self._head, start)
        if end < 0:
            return LINES if self._last else None
        value = self._head[start:end]
        return DOCUMENT if b"\n" in value and parsed_object(value) is not None else LINES

    def _of_value(self, value: bytes) -> Layout:
        """The layout of documents of which the first is this object, whole."""
        return Layout("document", list_key(outline(value, 0), self._recipes)) if b"[" in value else DOCUMENT

    def _of_unfinished(self) -> Layout:
        """The layout where the first object does not end in the bytes seen."""
        if self._mostly_lines():
            return LINES
        newline = self._head.find(b"\n", self._start)
        first_line = self._head[self._start : newline if newline >= 0 else None].rstrip()
        printed = newline >= 0 and first_line[-1:] in OPEN_ENDS
        seen = outline(self._head, self._start)
        fits = any(self._fits(value[0]) for value in lists_of_objects(seen).values())
        if self._named is LINES and not printed and not fits:
            return LINES
        if is_record(seen, self._recipes):
            return DOCUMENT
        return Layout("document", list_key(seen, self._recipes), search=True)

    def _of_array(self) -> Layout | None:
        inside = self._skip(self._start + 1)
        if inside == len(self._head):
            return self._named if self._last else None
        if self._head[inside : inside + 1] == b"{":
            return self._of_array_of_objects(inside)
        end = ValueEnd().find(self._head, self._start)
        if end < 0:
            if not self._last:
                return None
            return LINES if self._mostly_lines() else self._named
        if b"\n" in self._head[self._start : end]:
            return DOCUMENT
        after = self._skip(end)
        if after == len(self._head):
            return self._named if self._last else None
        empty = self._head[inside : inside + 1] == b"]"
        return LINES if b"\n" in self._head[end:after] and not empty else self._named

    def _of_array_of_objects(self, inside: int) -> Layout | None:
        end = ValueEnd().find(self._head, inside)
        if end < 0 and not self._last:
            return None
        sound = end >= 0 and parsed_object(self._head[inside:end]) is not None
        # In an array a comma follows each, but for the last one.
        return LINES if self._mostly_lines(at_least=2 if sound else 1) else DOCUMENT

    def _mostly_lines(self, at_least: int = 1) -> bool:
        """Whether most of the lines after the first one are objects, each by itself, and so many of them."""
        _, newline, rest = self._head[self._start :].partition(b"\n")
        lines = rest.split(b"\n", PROBED_LINES)
        if lines and not (self._ended and len(lines) <= PROBED_LINES):
            lines.pop()  # of which the end was not seen, or more than one
        lines = [line.strip(SPACE) for line in lines]
        lines = [line for line in lines if line]
        whole = sum(line[:1] == b"{" and parsed_object(line) is not None for line in lines)
        return bool(newline) and whole >= at_least and 2 * whole > len(lines)

    def _fits(self, record: Any) -> bool:
        return isinstance(record, Mapping) and is_record(record, self._recipes)

    def _skip(self, at: int) -> int:
        return end_of(LEADING, self._head, at)


def lists_of_objects(value: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The lists of an object that hold objects, by key."""
    return {
        key: [item for item in inside if isinstance(item, dict)]
        for key, inside in value.items()
        if isinstance(inside, list) and any(isinstance(item, dict) for item in inside)
    }


def list_key(value: Mapping[str, Any], recipes: Sequence[Fields]) -> str | None:
    """The key whose list holds the records of this object; None where it is a record itself.

    Raises FileError where several may be meant.
    """
    if is_record(value, recipes):
        return None
    if isinstance(value.get(SAMPLES), list):
        return SAMPLES
    lists = lists_of_objects(value)
    fitting = [key for key, items in lists.items() if is_record(items[0], recipes)]
    keys = fitting or list(lists)
    if len(keys) > 1:
        raise several_lists(keys[0], keys[1])
    return keys[0] if keys and 6 * len(keys[0]) < KEY_BYTES else None


def outline(head: bytes, at: int) -> dict[str, Any]:
    """The object that begins there, as far as it was seen; what is damaged or not there whole is UNKNOWN.

    Of a list that is not there whole only the first item is known.
    """
    value, _ = value_at(head, at, 3)
    return value if isinstance(value, dict) else {}


def value_at(head: bytes, at: int, levels: int) -> tuple[Any, int]:
    """A value, and the position after it, -1 where it goes on beyond what was seen."""
    first = head[at : at + 1]
    if first and first in b'"[{':
        end = ValueEnd().find(head, at)
    else:
        word = WORD.match(head, at)
        end = word.end() if word and word.end() < len(head) else -1
    if end >= 0:
        try:
            return DECODER.decode(head[at:end].decode("utf-8", "surrogateescape")), end
        except (ValueError, RecursionError):
            pass
    if levels and first == b"{":
        return dict(members(head, at + 1, levels - 1)), end
    if levels and first == b"[":
        return [value_at(head, space_after(head, at + 1), levels - 1)[0]], end
    return UNKNOWN, end


def members(head: bytes, at: int, levels: int) -> list[tuple[str, Any]]:
    """The members of an object from a position on, up to damage or the end of what was seen."""
    found: list[tuple[str, Any]] = []
    while True:
        at = space_after(head, at)
        if head[at : at + 1] != b'"':
            return found
        key, at = value_at(head, at, 0)
        at = space_after(head, at) if at >= 0 else len(head)
        if head[at : at + 1] != b":" or not isinstance(key, str):
            return found
        value, at = value_at(head, space_after(head, at + 1), levels)
        found.append((key, value))
        at = space_after(head, at) if at >= 0 else len(head)
        if head[at : at + 1] != b",":
            return found
        at += 1

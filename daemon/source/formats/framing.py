"""Finds the records of a content of any layout, in chunks. Knows nothing about what a record means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from daemon.source.formats.document import DocumentFramer
from daemon.source.formats.layout import FirstBytes, Layout
from daemon.source.formats.lines import RECORD_SEPARATOR, LineSplitter
from daemon.source.kinds import PROBE_BYTES, check_text
from daemon.source.parsing import Fields, RawRecord


class RecordFramer:
    """Records out of chunks of a content whose layout its first bytes tell.

    The layout depends on the content alone, and not on where chunks end. Until it is known, at most the
    largest record and 8 KiB are held.
    """

    def __init__(self, max_record_bytes: int, *, named_lines: bool, recipes: Sequence[Fields]) -> None:
        """`named_lines`: its name says JSON Lines. `recipes`: the fields of which a record has all of one."""
        self._max = max_record_bytes
        self._named_lines = named_lines
        self._recipes = recipes
        self._head = bytearray()
        self._probe = PROBE_BYTES  # how much of the content is looked at next
        self._framer: LineSplitter | DocumentFramer | None = None

    def feed(self, chunk: bytes) -> Iterator[RawRecord]:
        """The records that are known to have ended. Raises FileError for what is no text, or damaged."""
        if self._framer is not None:
            yield from self._framer.feed(chunk)
            return
        self._head += chunk
        while self._framer is None and len(self._head) >= self._probe:
            self._look(bytes(self._head[: self._probe]), ended=False)
            self._probe = min(4 * self._probe, self._window)
        if self._framer is not None:
            yield from self._framer.feed(self._take_head())

    def finish(self) -> Iterator[RawRecord]:
        """The records that the end of the content ends. Raises FileError where it comes too early."""
        if self._framer is None:
            self._look(bytes(self._head), ended=True)
            assert self._framer is not None
            yield from self._framer.feed(self._take_head())
        yield from self._framer.finish()

    @property
    def _window(self) -> int:
        """In which a record that is not too large ends, and its newline is seen."""
        return PROBE_BYTES + self._max

    def _look(self, head: bytes, *, ended: bool) -> None:
        if self._probe == PROBE_BYTES:
            check_text(head)
        last = len(head) == self._window
        first = FirstBytes(head, named_lines=self._named_lines, ended=ended, last=last, recipes=self._recipes)
        if (layout := first.layout()) is not None:
            self._framer = self._framer_of(layout)

    def _framer_of(self, layout: Layout) -> LineSplitter | DocumentFramer:
        match layout.framing:
            case "lines":
                return LineSplitter(self._max)
            case "sequence":
                return LineSplitter(self._max, RECORD_SEPARATOR)
        return DocumentFramer(
            self._max, list_key=layout.list_key, search=layout.search, recipes=self._recipes
        )

    def _take_head(self) -> bytes:
        head, self._head = bytes(self._head), bytearray()
        return head

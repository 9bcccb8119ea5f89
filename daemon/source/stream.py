"""An open input file as its format reads it. Knows bytes and compression, no records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO

from daemon.source.content import HEAD_BYTES, chunks, compression_by, read_chunk
from daemon.source.kinds import Compression
from daemon.source.limits import ReadLimits

BEGINNING_BYTES = 64 << 10


class InputStream:
    """A content in chunks, decompressed, once; or its file, where it is not compressed. Blocks."""

    def __init__(
        self,
        file: BinaryIO,
        suffix: Compression | None,
        limits: ReadLimits,
        *,
        is_plain: Callable[[bytes], bool],
    ) -> None:
        """`suffix`: what the name says; `is_plain`: whether bytes begin an input that is not compressed.

        Raises FileError where the beginning can't be read or decompressed.
        """
        head = read_chunk(file, HEAD_BYTES)
        compression = compression_by(head, suffix, is_plain)
        self._rest = chunks(file, head, compression, limits)
        self._first: list[bytes] = []
        size = 0
        while size < BEGINNING_BYTES and (chunk := next(self._rest, b"")):
            self._first.append(chunk)
            size += len(chunk)
        self.beginning = b"".join(self._first)[:BEGINNING_BYTES]
        self.file = file if compression is None else None  # to be read at any place

    def chunks(self) -> Iterator[bytes]:
        """Read the content from its start to its end, once."""
        while self._first:
            yield self._first.pop(0)
        yield from self._rest

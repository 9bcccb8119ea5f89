"""Bytes of an input file: hashed, read in chunks, decompressed. Knows nothing about records."""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Protocol

import aiofiles
import zstandard

from daemon.errors import FileError

CHUNK_BYTES = 1 << 20
SLICE_BYTES = 1 << 10  # of compressed input at a time: a slice of a bomb is at most some 32 MiB


async def content_sha256(path: Path) -> tuple[str, int]:
    """SHA-256 (hex) and size in bytes of a file as it lies there, compressed or not.

    Raises FileError where this user may not read it.
    """

    def digest() -> tuple[str, int]:
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
        except PermissionError:
            raise FileError("unreadable", "lensd may not read the file: give its user read access") from None

    return await asyncio.to_thread(digest)


class Decompressor(Protocol):
    """A zlib or zstandard decompression object: one member of a stream."""

    @property
    def unused_data(self) -> bytes: ...
    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def new_decompressor(suffix: str) -> Decompressor:
    if suffix == ".gz":
        return zlib.decompressobj(wbits=31)
    return zstandard.ZstdDecompressor().decompressobj()


async def chunks(path: Path, compression: str | None) -> AsyncIterator[bytes]:
    """The file's content, uncompressed, in chunks; `compression` is `.gz`, `.zst` or None.

    Raises FileError where the compressed stream is damaged or ends early.
    """
    async with aiofiles.open(path, "rb") as file:
        if compression is None:
            while chunk := await file.read(CHUNK_BYTES):
                yield chunk
            return
        stream = Decompression(compression)
        while chunk := await file.read(CHUNK_BYTES // 4):
            pieces = stream.feed(chunk)
            while piece := await asyncio.to_thread(next_chunk, pieces):
                yield piece
        stream.finish()


def next_chunk(pieces: Iterator[bytes]) -> bytes:
    """Pieces joined to a chunk of a useful size; nothing at the end."""
    chunk = bytearray()
    for piece in pieces:
        chunk += piece
        if len(chunk) >= CHUNK_BYTES:
            break
    return bytes(chunk)


class Decompression:
    """A gzip or zstandard stream of one or more members, fed in pieces."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._member: Decompressor | None = None
        self._ended = False  # a member did

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What these bytes add to the content, in pieces of bounded size."""
        for start in range(0, len(data), SLICE_BYTES):
            rest = data[start : start + SLICE_BYTES]
            while rest := self._between_members(rest):
                if self._member is None:
                    self._member = new_decompressor(self._suffix)
                try:
                    yield self._member.decompress(rest)
                except (zlib.error, zstandard.ZstdError) as error:
                    raise self._damaged(str(error)) from None
                rest = b""
                if self._member.eof:
                    rest = self._member.unused_data
                    self._member = None
                    self._ended = True

    def _between_members(self, data: bytes) -> bytes:
        """The data without the zeros that may pad a gzip file after a member."""
        started = self._member is not None or not self._ended
        return data if started or self._suffix != ".gz" else data.lstrip(b"\0")

    def finish(self) -> None:
        if self._member is not None:
            raise self._damaged("it ends in the middle")

    def _damaged(self, why: str) -> FileError:
        return FileError(
            "corrupt_compression", f"the {self._suffix} stream is damaged ({why}): compress it again"
        )

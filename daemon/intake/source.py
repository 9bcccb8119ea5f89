"""Bytes of an input file: hashed, read in chunks, decompressed. Knows nothing about records."""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

import aiofiles
import zstandard

from daemon.errors import FileError

CHUNK_BYTES = 1 << 20


async def content_sha256(path: Path) -> tuple[str, int]:
    """SHA-256 (hex) and size in bytes of a file as it lies there, compressed or not."""

    def digest() -> tuple[str, int]:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()

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
        while chunk := await file.read(CHUNK_BYTES // 16):
            yield await asyncio.to_thread(stream.feed, chunk)
        stream.finish()


class Decompression:
    """A gzip or zstandard stream of one or more members, fed in pieces."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._member: Decompressor | None = None

    def feed(self, data: bytes) -> bytes:
        """What these bytes add to the content."""
        out = bytearray()
        while data:
            if self._member is None:
                self._member = new_decompressor(self._suffix)
            try:
                out += self._member.decompress(data)
            except (zlib.error, zstandard.ZstdError) as error:
                raise self._damaged(str(error)) from None
            data = b""
            if self._member.eof:
                data = self._member.unused_data
                self._member = None
        return bytes(out)

    def finish(self) -> None:
        if self._member is not None:
            raise self._damaged("it ends in the middle")

    def _damaged(self, why: str) -> FileError:
        return FileError(
            "corrupt_compression", f"the {self._suffix} stream is damaged ({why}): compress it again"
        )

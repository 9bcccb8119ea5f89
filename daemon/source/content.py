"""Bytes of an input file: hashed, read in chunks, decompressed. Knows nothing about records.

The first bytes tell how a content is compressed, whatever its name says.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import zstandard

from daemon.errors import FileError, MachineError
from daemon.source.kinds import Compression, check_kind, compression_of, opens_json
from daemon.source.limits import ReadLimits

CHUNK_BYTES = 1 << 20
HEAD_BYTES = CHUNK_BYTES // 4  # of a file, read first; of a compressed one, read at a time
SLICE_BYTES = 1 << 10  # of compressed input at a time: a slice of a bomb is at most some 32 MiB
BOMB_BYTES = 16 << 20  # of content, below which no ratio is suspicious
ZSTD_HEADER_BYTES = 18  # of a frame, at most
NO_MEMORY = re.compile(r"Error -4 |Allocation error")  # zlib's and zstandard's words for it


@dataclass(frozen=True, slots=True)
class Content:
    """An open file at its start, and what it holds."""

    sha256: str  # of the file as it lies there, compressed or not
    size: int  # bytes
    file: BinaryIO


def open_content(path: Path) -> Content:
    """Open and hash a file. Blocks.

    Raises FileError where the file is gone, is no regular file or can't be read.
    """
    with contextlib.ExitStack() as on_error:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            file = on_error.enter_context(os.fdopen(descriptor, "rb"))
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FileError("not_a_file", "it is no regular file any more: drop it again")
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            file.seek(0)
        except OSError as error:
            raise unreadable(error) from None
        on_error.pop_all()
    return Content(sha256, size, file)


def unreadable(error: OSError) -> Exception:
    """The error as what it says of the file; itself where it says something of the machine."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return error
    if isinstance(error, FileNotFoundError):
        return FileError("vanished", "the file was removed while lensd worked on it: drop it again")
    if isinstance(error, PermissionError):
        return FileError("unreadable", "lensd may not read the file: give its user read access")
    return FileError(
        "unreadable", f"the file can't be read ({error.strerror}): check the disk, drop it again"
    )


class Decompressor(Protocol):
    """A zlib or zstandard decompression object: one member of a stream."""

    @property
    def unused_data(self) -> bytes: ...
    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def chunks(
    file: BinaryIO, head: bytes, compression: Compression | None, limits: ReadLimits
) -> Iterator[bytes]:
    """Read a file's content in chunks, decompressed; `head` is what was read of it already. Blocks.

    Raises FileError where the compressed stream is damaged, ends early or is over a limit, or where the file
    can't be read; MachineError where the memory does not hold what unpacking takes.
    """
    chunk = head
    if compression is None:
        while chunk:
            yield chunk
            chunk = read_chunk(file, CHUNK_BYTES)
        return
    stream = Decompression(compression, limits)
    while chunk:
        pieces = stream.feed(chunk)
        while piece := next_chunk(pieces):
            yield piece
        chunk = read_chunk(file, HEAD_BYTES)
    stream.finish()


def compression_by(
    head: bytes, suffix: Compression | None, is_plain: Callable[[bytes], bool]
) -> Compression | None:
    """Tell how a file that begins so is compressed: its content counts, else its name.

    Raises FileError where the name says that it is compressed and it is something else that has a name,
    unless `is_plain` says that it is an input as it lies there.
    """
    found = compression_of(head)
    if found is not None or suffix is None or opens_json(head) or is_plain(head):
        return found
    check_kind(head)
    return suffix


def read_chunk(file: BinaryIO, size: int) -> bytes:
    try:
        return file.read(size)
    except OSError as error:
        raise unreadable(error) from None


def next_chunk(pieces: Iterator[bytes]) -> bytes:
    """Join pieces to a chunk of a useful size; nothing at the end."""
    chunk = bytearray()
    for piece in pieces:
        chunk += piece
        if len(chunk) >= CHUNK_BYTES:
            break
    return bytes(chunk)


class Decompression:
    """A gzip or zstandard stream of one or more members, fed in pieces.

    Raises FileError where it unpacks to more than `max_decompressed_bytes`, or to more than
    `max_compression_ratio` times the input so far and over 16 MiB, or where a zstandard frame needs a window
    of more than `max_zstd_window_bytes`; MachineError where the memory does not hold what unpacking takes.
    """

    def __init__(self, suffix: Compression, limits: ReadLimits) -> None:
        self._suffix = suffix
        self._limits = limits
        self._member: Decompressor | None = None
        self._header = b""  # of the member, what has come of it
        self._ended = False  # a member did
        self._taken = 0  # bytes of input
        self._made = 0  # bytes of content

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decompress these bytes, in pieces of bounded size."""
        for start in range(0, len(data), SLICE_BYTES):
            rest = data[start : start + SLICE_BYTES]
            self._taken += len(rest)
            while rest := self._between_members(rest):
                piece = self._unpacked(rest)
                self._made += len(piece)
                self._check_size()
                yield piece
                rest = self._end_member()

    def _unpacked(self, data: bytes) -> bytes:
        try:
            if self._member is None:
                self._member = self._new_member()
            self._header += data[: ZSTD_HEADER_BYTES - len(self._header)]
            return self._member.decompress(data)
        except (MemoryError, zlib.error, zstandard.ZstdError) as error:
            if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
                raise MachineError(
                    f"not enough memory to unpack a {self._suffix} stream: free some, or drop the file"
                    " uncompressed"
                ) from error
            raise self._refused() or self._damaged(str(error)) from None

    def _end_member(self) -> bytes:
        """The bytes after the member, where it ended."""
        if self._member is None or not self._member.eof:
            return b""
        rest = self._member.unused_data
        self._member = None
        self._ended = True
        return rest

    def _new_member(self) -> Decompressor:
        self._header = b""
        if self._suffix == ".gz":
            return zlib.decompressobj(wbits=31)
        return zstandard.ZstdDecompressor(max_window_size=self._limits.max_zstd_window_bytes).decompressobj()

    def _refused(self) -> FileError | None:
        """Say what a sound zstandard frame needs and lacks, by its header; None where it is damaged."""
        if self._suffix != ".zst":
            return None
        try:
            frame = zstandard.get_frame_parameters(self._header)
        except zstandard.ZstdError:
            return None
        if frame.window_size > self._limits.max_zstd_window_bytes:
            return FileError(
                "zstd_window_too_large",
                f"the .zst stream needs a window of {frame.window_size} bytes, more than"
                f" inbox.max_zstd_window_bytes = {self._limits.max_zstd_window_bytes}: raise the limit, or"
                " compress it with a smaller --long",
            )
        if frame.dict_id:
            return FileError(
                "zstd_dictionary",
                f"the .zst stream needs the dictionary {frame.dict_id}, which lensd does not have:"
                " compress it without one",
            )
        return None

    def _check_size(self) -> None:
        if self._made > self._limits.max_decompressed_bytes:
            raise FileError(
                "decompressed_too_large",
                f"the {self._suffix} stream unpacks to more than inbox.max_decompressed_bytes ="
                f" {self._limits.max_decompressed_bytes}: split the file, or raise the limit",
            )
        if self._made > max(BOMB_BYTES, self._limits.max_compression_ratio * self._taken):
            raise FileError(
                "compression_bomb",
                f"the {self._suffix} stream unpacks to more than inbox.max_compression_ratio ="
                f" {self._limits.max_compression_ratio} times its size: drop it uncompressed,"
                " or raise the limit",
            )

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

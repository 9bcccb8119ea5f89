"""Tells by a file's first bytes what it is: compressed, JSON text, or something else that has a name.

Knows nothing about names, records and decompression.
"""

from __future__ import annotations

import codecs
import re
import sys
from typing import Literal

from daemon.errors import FileError

Compression = Literal[".gz", ".zst"]

PROBE_BYTES = 8192  # of the content, in which a byte 0 says that it is no text
BOM = codecs.BOM_UTF8
LEADING = re.compile(rb"(?:[ \t\r\n\f\v]|\xef\xbb\xbf)*+")  # what may stand before the first value
OPENINGS = (b"{", b"[", b"\x1e")
OPENS_JSON = re.compile(LEADING.pattern + rb"[{\[\x1e]")

GZIP = b"\x1f\x8b"
ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame, or one to be skipped

AS_JSON_LINES = "write its rows as JSON Lines"
DECOMPRESS = "decompress it, or compress it with gzip or zstandard"
UNPACK = "drop the files that are in it"
RTF = b"{\\rtf"
KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"BZh", "bzip2", DECOMPRESS),
    (b"\xfd7zXZ\0", "xz", DECOMPRESS),
    (b"\x5d\0\0", "lzma", DECOMPRESS),
    (b"\x04\x22\x4d\x18", "LZ4", DECOMPRESS),
    (b"\xff\x06\0\0sNaPpY", "snappy", DECOMPRESS),
    (b"\x1f\x9d", "compressed by compress", DECOMPRESS),
    (b"PK\x03\x04", "a zip archive (a spreadsheet of Excel, for example)", f"{UNPACK}, a spreadsheet as CSV"),
    (b"PK\x05\x06", "an empty zip archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", UNPACK),
    (b"ARROW1", "an Arrow (Feather) file", AS_JSON_LINES),
    (b"\xff\xff\xff\xff", "an Arrow stream", AS_JSON_LINES),
    (b"FEA1", "a Feather file", AS_JSON_LINES),
    (b"ORC", "an ORC file", AS_JSON_LINES),
    (b"Obj\x01", "an Avro file", AS_JSON_LINES),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", AS_JSON_LINES),
    (b"SQLite format 3\0", "an SQLite database", AS_JSON_LINES),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old file of Excel or Word", AS_JSON_LINES),
    (b"\x93NUMPY", "a NumPy array", AS_JSON_LINES),
    (b"%PDF-", "a PDF", "write its text as JSON Lines"),
    (RTF, "a rich text document", "save it as plain text"),
    (b"\x89PNG", "a PNG picture", "drop JSON text"),
    (b"\xff\xd8\xff", "a JPEG picture", "drop JSON text"),
    (b"GIF8", "a GIF picture", "drop JSON text"),
    (b"\x7fELF", "a program", "drop JSON text"),
    (b"GGUF", "a model's weights (GGUF)", "drop JSON text"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch it with git lfs pull"),
)
PICKLE = re.compile(rb"\x80[\x02-\x05]")
MARKUP = re.compile(rb"<(?:!doctype|html|head|body|\?xml|!--|[a-z]+[ >])", re.IGNORECASE)
INNER_KINDS = (  # the same of bytes further on: where they begin
    (257, b"ustar", "a tar archive", UNPACK),
    (8, b"DUCK", "a DuckDB database", AS_JSON_LINES),
)
ENCODINGS = (  # the longer first: a mark of UTF-32 begins as one of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# What JSON begins with, a character or space and the next one, where there is no mark.
UTF32 = re.compile(rb"(?:[\x09\x0a\x0d\x20\"-\x7d]\0\0\0){2}|(?:\0\0\0[\x09\x0a\x0d\x20\"-\x7d]){2}")
UTF16 = re.compile(
    rb"(?:[\x09\x0a\x0d\x20\[{]\0)(?:[^\0]\0|.[^\0])|(?:\0[\x09\x0a\x0d\x20\[{])(?:\0[^\0]|[^\0].)", re.DOTALL
)


def compression_of(head: bytes) -> Compression | None:
    """By which the content that begins so is compressed, if lensd reads it."""
    if head.startswith(GZIP):
        return ".gz"
    return ".zst" if ZSTD.match(head) else None


def opens_json(head: bytes) -> bool:
    """Whether the bytes may be the beginning of an array, an object or a sequence of records."""
    return OPENS_JSON.match(head) is not None


def end_of(pattern: re.Pattern[bytes], head: bytes, at: int = 0, stop: int = sys.maxsize) -> int:
    """Where the match ends of a pattern that matches anything, if only nothing."""
    found = pattern.match(head, at, stop)
    assert found is not None
    return found.end()


def check_text(head: bytes, wanted: str = "JSON") -> None:
    """Raises FileError where a content that begins so is no UTF-8 text, or another format that has a name."""
    if head[:1] in OPENINGS and b"\0" not in head[:PROBE_BYTES] and not head.startswith(RTF):
        return  # as nearly all do
    if compression_of(head) is not None:
        raise FileError("corrupt_compression", "the file is compressed twice: decompress it once")
    check_kind(head, f"{wanted} text")
    if b"\0" in head[:PROBE_BYTES]:
        raise FileError("binary", f"the file is binary, not {wanted} text: save it as UTF-8 {wanted}")


def check_kind(head: bytes, wanted: str = "JSON text") -> None:
    """Raises FileError where a content that begins so is of a kind or an encoding that has a name here."""
    if (name := encoding_of(head)) is not None:
        raise FileError("unsupported_encoding", f"the file is {name} text: save it as UTF-8")
    if (known := known_kind(head)) is not None:
        what, remedy = known
        raise FileError("binary", f"the file is {what}, not {wanted}: {remedy}")
    if MARKUP.match(head, len(head) - len(head.lstrip())):
        raise FileError("binary", f"the file is HTML or XML, not {wanted}: look at what was saved")


def encoding_of(head: bytes) -> str | None:
    """The encoding of what may be JSON text in another one than UTF-8."""
    for mark, name in ENCODINGS:
        if head.startswith(mark):
            return name
    if UTF32.match(head):
        return "UTF-32"
    return "UTF-16" if UTF16.match(head) else None


def known_kind(head: bytes) -> tuple[str, str] | None:
    """Name the kind of content and the remedy; None where it has no name here."""
    for magic, what, remedy in KINDS:
        if head.startswith(magic):
            return what, remedy
    if PICKLE.match(head):
        return "a pickle of Python", AS_JSON_LINES
    for offset, magic, what, remedy in INNER_KINDS:
        if head.startswith(magic, offset):
            return what, remedy
    return None

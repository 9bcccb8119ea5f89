"""Standard input, output and error, such that a closed one or a reader that left ends no work.

Knows nothing about what is written.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STANDARD_INPUT, STANDARD_OUTPUT, STANDARD_ERROR = 0, 1, 2


class Tolerant(io.FileIO):
    """A descriptor to write to that never refuses: it drops what the system does not take.

    `refusal` is the first error, but for that of a reader who left.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.refusal: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EPIPE and self.refusal is None:
                self.refusal = error
            return memoryview(data).nbytes


def open_standard_streams() -> Tolerant | None:
    """Open the standard streams that are closed on the null device, and have the others never refuse.

    Without this the next files to be opened would get the numbers 0 to 2, and whatever a library prints would
    go into them. Characters that a stream's encoding lacks become escapes. Returns standard output's
    descriptor, None where a caller put another stream in its place.
    """
    for descriptor in (STANDARD_INPUT, STANDARD_OUTPUT, STANDARD_ERROR):
        if not is_open(descriptor):
            open_on_null(descriptor)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.FileIO(STANDARD_INPUT, closefd=False), encoding="utf-8")
    output = None
    if is_missing_or_of(sys.stdout, STANDARD_OUTPUT):
        output = Tolerant(STANDARD_OUTPUT)
        sys.stdout = writer(output, sys.stdout, at_once=output.isatty())
    if is_missing_or_of(sys.stderr, STANDARD_ERROR):
        sys.stderr = writer(Tolerant(STANDARD_ERROR), sys.stderr, at_once=True)
    return output


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def open_on_null(descriptor: int) -> None:
    """Open the null device as this descriptor, for child processes too."""
    null = os.open(os.devnull, os.O_RDWR)
    if null == descriptor:
        os.set_inheritable(descriptor, True)
    else:
        os.dup2(null, descriptor)
        os.close(null)


def is_missing_or_of(stream: IO[str] | None, descriptor: int) -> bool:
    """Whether there is no stream, or it writes to the descriptor and no caller put it there."""
    if stream is None:
        return True
    with contextlib.suppress(OSError, ValueError):
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == descriptor
    return False


def writer(raw: Tolerant, before: IO[str] | None, *, at_once: bool) -> io.TextIOWrapper:
    """A text stream with the encoding and the buffering of the one before; `at_once`: line by line."""
    encoding, through = "utf-8", False
    if isinstance(before, io.TextIOWrapper):
        before.flush()
        encoding, through, at_once = before.encoding, before.write_through, before.line_buffering
    buffer: Any = raw if through else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=at_once,
        write_through=through,
    )

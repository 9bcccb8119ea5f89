"""Looks at many files at one go: what each is, and what small ones hold. Changes nothing.

The compiled ones give the interpreter's lock up once for all files: a thread that takes it back after each of
them waits for it each time. Functions block.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

Status = tuple[int, int, int, int, int, int]  # mode, device, inode, size, mtime_ns, ctime_ns


def lstat_each(paths: Sequence[str]) -> list[Status | None]:
    """Of each path, no link followed; None where nothing lies there. Raises OSError."""
    return [lstat(path) for path in paths] if LSTAT_EACH is None else LSTAT_EACH(paths)


def lstat(path: str) -> Status | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return (
        status.st_mode,
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def read_small(paths: Sequence[str], max_bytes: int) -> list[bytes | None]:
    """All of each regular file of at most `max_bytes` that can be read at one go; None for any other."""
    return [None] * len(paths) if READ_SMALL is None else READ_SMALL(paths, max_bytes)


LSTAT_EACH: Callable[[Sequence[str]], list[Status | None]] | None
READ_SMALL: Callable[[Sequence[str], int], list[bytes | None]] | None
try:
    from daemon._looks import lstat_each as LSTAT_EACH
    from daemon._looks import read_small as READ_SMALL
except ImportError:  # installed without a compiler
    LSTAT_EACH = READ_SMALL = None

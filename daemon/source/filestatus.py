"""Tells what a path is by its metadata: opens nothing and follows no link, so that no FIFO can block."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from daemon.records import Claim, FileIdentity, Presence

Stamp = tuple[int, int, int, int]  # inode, size, mtime_ns, ctime_ns: what must stay the same

KINDS = (
    (stat.S_ISLNK, "symlink"),
    (stat.S_ISFIFO, "fifo"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISBLK, "device"),
    (stat.S_ISCHR, "device"),
)


def identity_of(path: Path) -> FileIdentity | None:
    """Identify a regular file by its metadata; None for anything else, or nothing. Raises OSError."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return FileIdentity(status.st_dev, *stamp(status)) if stat.S_ISREG(status.st_mode) else None


def presence(claim: Claim) -> Presence:
    """Whether a claimed file is still what it was when it was claimed."""
    now = identity_of(claim.path)
    if now is None:
        return "gone"
    return "same" if now == claim.identity else "changed"


def stamp_of(identity: FileIdentity) -> Stamp:
    return identity.inode, identity.size, identity.mtime_ns, identity.ctime_ns


def stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def kind_of(mode: int) -> str:
    return next((kind for test, kind in KINDS if test(mode)), "not a regular file")

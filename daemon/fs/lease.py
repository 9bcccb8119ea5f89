"""A lease: the folder in which one process keeps what it works on, held by an flock.

The lock ends with the process, however it ends, so a lease whose lock can be taken is a dead one and what
lies in it may be taken over. Functions block. Knows nothing about what a lease holds.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

from daemon.fs import durable

LOCK = ".lock"


class Lease:
    """This process's own lease, a folder under `parent`."""

    def __init__(self, parent: Path) -> None:
        lock = None
        while lock is None:  # another process may take the new folder for a dead lease before it is locked
            name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
            self.folder = parent / name
            durable.make_new_folder(self.folder)
            lock = open_lock(self.folder)
        self._lock = lock

    def close(self) -> bool:
        """Give the lease up; False where it still holds something, which the next process takes over."""
        try:
            return not self.folder.is_dir() or remove_lease(self.folder)
        finally:
            os.close(self._lock)


def open_lock(folder: Path) -> int | None:
    """The descriptor that holds a lease's lock; None where another process holds it, or it is gone."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (folder / LOCK).stat().st_ino == os.fstat(lock).st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def dead_leases(parent: Path, own: Path) -> Iterator[Path]:
    """Leases of processes that are gone; each is locked while the consumer deals with it, then removed.

    One in which something is left stays.
    """
    for folder in sorted(parent.iterdir()):
        if folder == own or folder.name.startswith("."):
            continue
        lock = open_lock(folder)
        if lock is None:
            continue
        try:
            yield folder
            remove_lease(folder)
        finally:
            os.close(lock)


def remove_lease(folder: Path) -> bool:
    """Remove a lease whose lock is held; False, and it stays, while something lies in it."""
    inner = [path for path in sorted(folder.iterdir()) if path.name != LOCK]
    emptied = [
        not path.is_symlink() and path.is_dir() and durable.remove_empty_folder(path) for path in inner
    ]
    if not all(emptied):
        return False
    durable.unlink(folder / LOCK)
    return durable.remove_empty_folder(folder)

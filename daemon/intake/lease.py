"""A lease: the folder in which one process keeps the files it has claimed, held by an flock.

The lock ends with the process, however it ends, so a lease whose lock can be taken is a dead one. Claimed
files lie at `<lease>/<attempt>/<name>`. Functions block. Knows nothing about the inbox around it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from daemon import durable

LOCK = ".lock"


class Lease:
    """This process's own lease under `claimed`."""

    def __init__(self, claimed: Path) -> None:
        name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        forming = claimed / f".{name}"  # a lease appears already locked: no one can take it for a dead one
        durable.make_folder(forming)
        lock = open_lock(forming)
        assert lock is not None, "nobody else knows this folder"
        self._lock = lock
        self.folder = claimed / name
        durable.rename(forming, self.folder)

    def place(self, name: str, attempt: int) -> Path:
        """Where a file of this name lies while it is claimed for the given attempt."""
        folder = self.folder / str(attempt)
        durable.make_folder(folder)
        return folder / name

    def draft(self) -> Path:
        """A new name for a file that is written here and then moved to where it belongs."""
        return self.folder / f"draft-{secrets.token_hex(4)}"

    def close(self) -> None:
        """Give the lease up. What still lies in it is taken back by the next process that starts."""
        remove_lease(self.folder)
        os.close(self._lock)


@dataclass(frozen=True, slots=True)
class HeldFile:
    """A claimed file in somebody's lease."""

    path: Path
    attempt: int


def open_lock(folder: Path) -> int | None:
    """The descriptor that holds a lease's lock; None where another process holds it, or it is gone."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (folder / LOCK).stat().st_ino == os.fstat(lock).st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def held_files(lease: Path) -> Iterator[HeldFile]:
    """What lies claimed in a lease, by attempt and name."""
    for folder in attempt_folders(lease):
        for path in sorted(folder.iterdir()):
            yield HeldFile(path, int(folder.name))


def attempt_folders(lease: Path) -> list[Path]:
    return sorted(
        (folder for folder in lease.iterdir() if folder.name.isdecimal() and folder.is_dir()),
        key=lambda folder: int(folder.name),
    )


def dead_leases(claimed: Path, own: Path) -> Iterator[Path]:
    """Leases of processes that are gone; each is locked while the consumer deals with it."""
    for folder in sorted(claimed.iterdir()):
        if folder == own or folder.name.startswith(".") or not folder.is_dir():
            continue
        lock = open_lock(folder)
        if lock is None:
            continue
        try:
            yield folder
        finally:
            os.close(lock)


def remove_lease(folder: Path) -> bool:
    """Remove a lease whose lock is held; False, and it stays, while a file lies claimed in it."""
    emptied = [durable.remove_empty_folder(attempt) for attempt in attempt_folders(folder)]
    if not all(emptied):
        return False
    for path in folder.iterdir():
        durable.unlink(path)
    return durable.remove_empty_folder(folder)

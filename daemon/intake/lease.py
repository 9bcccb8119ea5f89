"""A lease: the folder in which one process keeps the files it has claimed, held by an flock.

The lock ends with the process, however it ends, so a lease whose lock can be taken is a dead one. Claimed
files lie at `<lease>/<attempt>/<name>`. Functions block.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from daemon.durable import make_folder, remove_folder

LOCK = ".lock"


class Lease:
    """This process's own lease under `claimed`."""

    def __init__(self, claimed: Path) -> None:
        self.folder = claimed / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        make_folder(self.folder)
        self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def place(self, name: str, attempt: int) -> Path:
        """Where a file of this name lies while it is claimed for the given attempt."""
        folder = self.folder / str(attempt)
        make_folder(folder)
        return folder / name

    def close(self) -> None:
        """Give the lease up. What still lies in it is taken back by the next process that starts."""
        if not any(held_files(self.folder)):
            remove_folder(self.folder)
        os.close(self._lock)


@dataclass(frozen=True, slots=True)
class HeldFile:
    """A claimed file in somebody's lease."""

    path: Path
    attempt: int


def held_files(lease: Path) -> Iterator[HeldFile]:
    """What lies claimed in a lease, oldest attempt first."""
    for folder in sorted(lease.iterdir()):
        if folder.name.isdigit() and folder.is_dir():
            for path in sorted(folder.iterdir()):
                yield HeldFile(path, int(folder.name))


def dead_leases(claimed: Path, own: Path) -> Iterator[Path]:
    """Leases of processes that are gone; each is locked while the consumer deals with it."""
    for folder in sorted(claimed.iterdir()):
        if folder == own or not folder.is_dir():
            continue
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # its owner, or another process, removed it meanwhile
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # alive
        else:
            yield folder
        finally:
            os.close(lock)

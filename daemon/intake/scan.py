"""Looks at an inbox folder for files that are admissible and settled. Moves nothing, opens nothing."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import structlog

from daemon.frozen import frozen
from daemon.intake.filestatus import Stamp, kind_of, stamp
from daemon.intake.names import printable

IGNORED_SUFFIXES = ("~", ".tmp", ".part")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class InboxLoad:
    """What waited at one look. Times are Unix times."""

    files: int
    bytes: int
    oldest_at: float | None  # when the oldest was last written, None where none waits
    counted_at: float

    def oldest_seconds(self, now: float) -> float:
        """How old the oldest is by now, which goes on growing where nobody can look again."""
        return 0.0 if self.oldest_at is None else max(0.0, now - self.oldest_at)


@frozen
class Candidate:
    """A regular file seen in the inbox."""

    name: str
    stamp: Stamp

    @property
    def size(self) -> int:
        return self.stamp[1]

    @property
    def mtime_ns(self) -> int:
        return self.stamp[2]


class Scanner:
    """One folder, looked at again and again. A file is settled once it stayed the same for long enough."""

    def __init__(self, path: Path, *, settle_seconds: float, clock: Callable[[], float]) -> None:
        self.load: InboxLoad | None = None  # of the last look
        self.new = 0  # files of the last look that the one before it did not see
        self._path = path
        self._settle_seconds = settle_seconds
        self._clock = clock
        self._seen: dict[str, tuple[Stamp, float]] = {}  # name -> stamp, since when
        self._ignored: set[str] = set()  # odd things reported and still there

    def scan(self) -> list[tuple[Candidate, float]]:
        """Look: admissible files, oldest first, and in how many seconds each is settled."""
        now = self._clock()
        stamps = self._stamps()
        self.load = load_of(stamps.values())
        found = sorted(stamps.items(), key=lambda item: (item[1][2], item[0]))
        seen = self._seen
        self._seen = {
            name: seen[name] if name in seen and seen[name][0] == stamp else (stamp, now)
            for name, stamp in found
        }
        self.new = len(self._seen.keys() - seen.keys())
        candidates = [Candidate(name, stamp) for name, stamp in found]
        return [(found, self._seen[found.name][1] + self._settle_seconds - now) for found in candidates]

    def forget(self, name: str) -> None:
        """The file was taken: another of its name has to settle anew."""
        self._seen.pop(name, None)

    def _stamps(self) -> dict[str, Stamp]:
        """The regular files that may be taken, by name."""
        stamps, odd = entries_of(self._path)
        for name in odd.keys() - self._ignored:
            log.warning("inbox.ignored", file=printable(name), kind=odd[name])
        self._ignored = set(odd)
        return stamps


def entries_of(path: Path) -> tuple[dict[str, Stamp], dict[str, str]]:
    """The regular files that may be taken, by name, and the kinds of what else lies there but folders."""
    stamps: dict[str, Stamp] = {}
    odd: dict[str, str] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.endswith(IGNORED_SUFFIXES):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                stamps[entry.name] = stamp(status)
            elif not stat.S_ISDIR(status.st_mode):
                odd[entry.name] = kind_of(status.st_mode)
    return stamps, odd


def load_of(stamps: Collection[Stamp]) -> InboxLoad:
    return InboxLoad(
        files=len(stamps),
        bytes=sum(size for _, size, *_ in stamps),
        oldest_at=min(mtime_ns for _, _, mtime_ns, *_ in stamps) / 1e9 if stamps else None,
        counted_at=time.time(),
    )


def count_waiting(path: Path) -> InboxLoad:
    """What waits there, for whoever only wants to know. Raises OSError where the folder can't be read."""
    return load_of(entries_of(path)[0].values())

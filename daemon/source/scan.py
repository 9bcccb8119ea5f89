"""Looks at an inbox folder for files that are admissible and settled. Moves nothing, opens nothing."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from daemon.escaping import printable_name
from daemon.records import InboxLoad
from daemon.source.filestatus import Stamp, kind_of, stamp
from daemon.source.formats import EXPECTED
from daemon.source.inputs import InputNames, Owner, is_unfinished

NEVER: tuple[Stamp, float] = ((-1, -1, -1, -1), float("inf"))  # the stamp of what was not seen before
TOLD_AT_ONCE = 20  # names in one look, after which the rest is told by number

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A regular file seen in the inbox."""

    name: str
    stamp: Stamp

    @property
    def size(self) -> int:
        return self.stamp[1]


@dataclass(slots=True)
class Entries:
    """The entries that one look found, by name; nothing hidden, and nothing that settings ignore."""

    inputs: dict[str, Stamp] = field(default_factory=dict)  # regular files that may be taken
    unfinished: dict[str, Stamp] = field(default_factory=dict)  # of their names, and still being fetched
    odd: dict[str, str] = field(default_factory=dict)  # of their names and no regular files: their kinds
    left: dict[str, Owner] = field(default_factory=dict)  # of other names
    folders: list[str] = field(default_factory=list)  # sub-folders that lensd did not make


class Scanner:
    """One folder, looked at again and again. A file is settled once it stayed the same for long enough."""

    def __init__(
        self,
        path: Path,
        *,
        settle_seconds: float,
        clock: Callable[[], float],
        names: InputNames | None = None,
    ) -> None:
        self.load: InboxLoad | None = None  # of the last look
        self.new = 0  # files of the last look that the one before it did not see
        self.unfinished = 0  # files of the last look that have inputs' names and are still being fetched
        self.tells_at_once = False  # of what is left alone, and not only once that stays there
        self._path = path
        self._names = InputNames() if names is None else names
        self._settle_seconds = settle_seconds
        self._clock = clock
        self._seen: dict[str, tuple[Stamp, float]] = {}  # name -> stamp, since when
        self._left: dict[str, tuple[Stamp, float] | None] = {}  # of what is left alone; None: reported
        self._reported: set[str] = set()  # odd things and sub-folders reported and still there

    def scan(self) -> list[tuple[Candidate, float]]:
        """Look: admissible files, oldest first, and in how many seconds each is settled."""
        now = self._clock()
        entries = entries_of(self._path, self._names)
        self._report(entries, now)
        self.load = load_of(entries)
        self.unfinished = len(entries.unfinished)
        found = sorted(entries.inputs.items(), key=lambda item: (item[1][2], item[0]))
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

    def _report(self, entries: Entries, now: float) -> None:
        """Say once of each thing that lies there why it is not taken."""
        for name in entries.odd.keys() - self._reported:
            log.warning("inbox.ignored", file=printable_name(name), kind=entries.odd[name])
        if folders := [name for name in entries.folders if name not in self._reported]:
            log.warning(
                "inbox.subfolders_ignored",
                folders=[printable_name(name) for name in folders[:TOLD_AT_ONCE]],
                count=len(folders),
                reason="files in sub-folders are not read: move them up",
            )
        self._reported = {*entries.odd, *entries.folders}
        self._report_left(entries, now)

    def _report_left(self, entries: Entries, now: float) -> None:
        """Say once of each file that is left alone why; not while somebody still writes it."""
        before, self._left = self._left, {}
        due: list[str] = []
        for name in (*entries.left, *entries.unfinished):
            known = before.get(name, NEVER)
            if known is not None:
                found = self._stamp(name)
                known = known if known[0] == found else (found, now)
                if self.tells_at_once or known[1] + self._settle_seconds <= now:
                    due.append(name)
                    known = None
            self._left[name] = known
        for name in due[:TOLD_AT_ONCE]:
            reason = reason_of(entries.left.get(name))
            log.warning("inbox.left", file=printable_name(name), reason=reason)
        if len(due) > TOLD_AT_ONCE:
            log.warning("inbox.left", more_files=len(due) - TOLD_AT_ONCE, reason="as those named before")

    def _stamp(self, name: str) -> Stamp:
        try:
            return stamp(os.lstat(f"{self._path}/{name}"))
        except OSError:
            return NEVER[0]


def reason_of(owner: Owner | None) -> str:
    """Why a file is left alone whose name has this owner; None: it is an input, and not whole."""
    if owner is None:
        return "it is still being fetched, by what lies beside it: it is taken once that is gone"
    if owner == "temporary":
        return "a temporary name: the file is taken once it has its final one"
    return f"not the name of an input: inputs end in {EXPECTED}"


def entries_of(path: Path, names: InputNames) -> Entries:
    """List the entries of an inbox. Raises OSError where the folder can't be read."""
    found = Entries()
    with os.scandir(path) as entries:
        for entry in entries:
            owner = names.owner(entry.name)
            if owner == "hidden":
                continue
            if owner == "input":
                add_input(found, entry)
            elif not entry.is_dir(follow_symlinks=False):
                found.left[entry.name] = owner
            elif names.is_foreign_folder(entry.name):
                found.folders.append(entry.name)
    if found.left:
        unfinished = [
            name for name, status in found.inputs.items() if is_unfinished(name, status[1], found.left)
        ]
        found.unfinished = {name: found.inputs.pop(name) for name in unfinished}
    return found


def add_input(found: Entries, entry: os.DirEntry[str]) -> None:
    """A thing that has the name of an input."""
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return
    if stat.S_ISREG(status.st_mode):
        found.inputs[entry.name] = stamp(status)
    elif stat.S_ISDIR(status.st_mode):
        found.folders.append(entry.name)
    else:
        found.odd[entry.name] = kind_of(status.st_mode)


def load_of(entries: Entries) -> InboxLoad:
    stamps: Collection[Stamp] = entries.inputs.values()
    return InboxLoad(
        files=len(stamps),
        bytes=sum(size for _, size, *_ in stamps),
        oldest_at=min(mtime_ns for _, _, mtime_ns, *_ in stamps) / 1e9 if stamps else None,
        counted_at=time.time(),
        left=len(entries.left),
    )


def count_waiting(path: Path, names: InputNames | None = None) -> InboxLoad:
    """Count the files that wait in an inbox. Raises OSError where the folder can't be read."""
    return load_of(entries_of(path, InputNames() if names is None else names))

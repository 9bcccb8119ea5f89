"""The outbox: where results are made, and how they appear, whole under their final name or not at all.

The order is what makes it safe: sync of every file, of the manifest and of the folder, rename, sync of the
outbox.
Several processes may share an outbox: each makes its results in a lease of its own and publishes under a
lock, and the first to publish a unit wins. Knows nothing about what the files hold. Functions block.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.errors import MachineError
from daemon.fs import durable
from daemon.fs.lease import Lease, dead_leases
from daemon.pause import FoldersLost
from daemon.records import InputFile
from daemon.sink.jsontext import to_json_lines
from daemon.sink.parts import PARTS_SUFFIX, parts_of

STAGING = ".staging"
UNITS = ".units"  # by unit, the name of the folder that holds its results
PUBLISHING = ".publishing"  # locked while results get their final names
MANIFEST = "manifest.json"
NAME_BYTES = 255  # of a folder name, on every Linux file system
ORPHANED_SECONDS = 7 * 86400.0  # after which parts that nobody came back for are removed

# In a folder's name these break a reader: `*?[]{}` are patterns, DuckDB's glob skips a backslash and takes
# `a=b` for a partition, and one name that is not UTF-8 fails DuckDB's glob over the whole outbox.
UNREADABLE = re.compile(r"[\x00-\x1f\x7f*?\[\]{}\\/=\ud800-\udfff]")


PUBLISHED = re.compile(r"-([0-9a-f]{12})$")


@dataclass(frozen=True, slots=True)
class Publication:
    """Where a unit's results are; `fresh` unless they were there before."""

    folder: Path
    fresh: bool


@dataclass(slots=True)
class Staged:
    """Results on their way out: a folder whole but for its manifest, and what became of it."""

    file: InputFile
    folder: Path
    manifest: dict[str, Any]  # `daemon.sink.manifest.manifest`'s
    publication: Publication | None = None


class Outbox:
    """One process's view of an outbox folder. `open` it, publish, `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lease: Lease | None = None

    def open(self) -> int:
        """Make the folders, take a lease, clear what dead processes left half-made; how much that was.

        Safe to repeat.
        """
        for name in (STAGING, UNITS):
            durable.make_folder(self.path / name)
        durable.fsync_folder(self.path)
        if self._lease is None:
            self._lease = Lease(self.path / STAGING)
        with durable.locked(self.path / STAGING / PUBLISHING):
            self._index()
        return self.sweep()

    def close(self) -> None:
        """Give up the lease. Parts of unfinished units stay for the process that finishes them."""
        if self._lease is not None:
            folder = self._lease.folder
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.is_dir() and path.suffix != PARTS_SUFFIX:
                    durable.remove_folder(path)
            self._lease.close()
            self._lease = None
            if (self.path / STAGING).is_dir():
                self.sweep()

    @property
    def lease(self) -> Lease:
        if self._lease is None:
            raise AssertionError("the outbox is not open")
        return self._lease

    def check_lost(self) -> None:
        """Raises FoldersLost where the outbox is there and the own lease is not."""
        if self.path.is_dir() and not self.lease.folder.is_dir():
            raise FoldersLost(f"{self.lease.folder} disappeared, with the results made there")

    def staging(self, unit: str) -> Path:
        """Where this process makes a unit's results."""
        return self.lease.folder / unit

    def remove_parts(self, units: Sequence[str]) -> None:
        """Remove what `parts` gives of these units, where it is there."""
        with os.scandir(self.lease.folder) as entries:
            there = {entry.name for entry in entries}
        for unit in units:
            if (parts := self.parts(unit)).name in there:
                durable.remove_folder(parts)

    def parts(self, unit: str) -> Path:
        """Where this process keeps a unit's finished parts."""
        return parts_of(self.staging(unit))

    def adopt_parts(self, unit: str) -> Path:
        """`parts`, with what a dead process may have left of them."""
        own = self.parts(unit)
        if not own.exists():
            for lease in dead_leases(self.path / STAGING, self.lease.folder):
                if (lease / own.name).is_dir():
                    durable.rename(lease / own.name, own)
                    break
        return own

    def sweep(self) -> int:
        """Remove what dead processes left and nobody needs; how many folders of half-made results."""
        removed = 0
        own = self._lease.folder if self._lease else self.path
        for lease in dead_leases(self.path / STAGING, own):
            for path in lease.iterdir():
                if not path.is_dir():
                    if not path.name.startswith("."):
                        durable.unlink(path)
                elif path.suffix != PARTS_SUFFIX:
                    durable.remove_folder(path)
                    removed += 1
                elif self._is_orphaned(path):
                    durable.remove_folder(path)
        return removed

    def _is_orphaned(self, parts: Path) -> bool:
        old = time.time() - parts.stat().st_mtime > ORPHANED_SECONDS
        return old or self.published(parts.stem) is not None

    def _index(self) -> None:
        """Make the index true: notes that a crash took, results put there or taken away by hand.

        Earlier versions kept links that led nowhere, at which a copy that follows links fails: they become
        notes.
        """
        held: set[str] = set()
        for note in list((self.path / UNITS).iterdir()):
            if note.is_symlink() or self.published(note.name) is None:
                durable.unlink(note)
            else:
                held.add(note.name)
        for path in self.path.iterdir():
            match = PUBLISHED.search(path.name)
            if match and match[1] not in held and (path / MANIFEST).is_file():
                held.add(match[1])
                self._enter(match[1], path.name)

    def published(self, unit: str) -> Path | None:
        """The folder with the unit's results, under whatever name its content was dropped first."""
        name = noted(self.path / UNITS / unit)
        if name is None or "/" in name or not name.endswith(f"-{unit}"):
            return None
        folder = self.path / name
        return folder if (folder / MANIFEST).is_file() else None

    def flush_names(self) -> None:
        """Make sure that what is visible in the outbox stays. Raises SyncFailed where the disk refuses."""
        durable.fsync_folder(self.path)

    def publish(self, staged: Sequence[Staged]) -> None:
        """Give sealed folders their final names and say so in each; one sync for all. Safe to repeat.

        Where a unit is published already, its folder is removed instead. Raises MachineError where the sync
        fails or something else has the name.
        """
        with durable.locked(self.path / STAGING / PUBLISHING):
            if not (self.path / UNITS).is_dir():  # somebody cleared it away
                durable.make_folder(self.path / UNITS)
                self._index()
            for unit in staged:
                if unit.publication is None:
                    unit.publication = self._publish(unit)
        self.flush_names()

    def _publish(self, unit: Staged) -> Publication:
        if (published := self.published(unit.file.unit)) is not None:
            durable.remove_folder(unit.folder)
            return Publication(published, fresh=False)
        target = self.path / output_folder_name(unit.file.stem or unit.file.claim.name, unit.file.unit)
        self._enter(unit.file.unit, target.name)
        if not rename_to_free(unit.folder, target):
            durable.remove_folder(unit.folder)
            return Publication(target, fresh=False)
        return Publication(target, fresh=True)

    def _enter(self, unit: str, name: str) -> None:
        """Say in the index which folder holds a unit, in place of what it says so far.

        The entry comes before the folder's rename, and is believed only where there is one. It is a small
        file and no link, so that nothing finds the results twice, and whoever copies the outbox copies it.
        """
        note, content = self.path / UNITS / unit, os.fsencode(f"{name}\n")
        try:
            durable.write_whole(note, content)
        except FileExistsError:
            durable.unlink(note)
            durable.write_whole(note, content)


def noted(path: Path) -> str | None:
    """Read an entry of the index; None where there is none, or not all of it.

    One of an earlier version is a link.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return str(path.readlink())
    try:
        content = os.read(descriptor, 2 * NAME_BYTES)
    finally:
        os.close(descriptor)
    return os.fsdecode(content[:-1]) if content.endswith(b"\n") else None


def complete(staged: Staged) -> None:
    """Write the manifest. Raises AssertionError unless records == rows + rejects."""
    content = staged.manifest
    if content["records"] != content["rows"] + content["rejects"]:
        raise AssertionError(f"unit {staged.file.unit}: records != rows + rejects: {content}")
    durable.write_whole(staged.folder / MANIFEST, to_json_lines(content))


def complete_again(staged: Staged) -> None:
    """Write a manifest that changed in place of the one that `complete` wrote."""
    durable.unlink(staged.folder / MANIFEST)
    complete(staged)


def seal(staged: Staged) -> None:
    """Flush all files of a complete folder, and the folder. Raises SyncFailed where the disk refuses."""
    for name in (MANIFEST, *(file["name"] for file in staged.manifest["files"])):
        durable.fsync_file(staged.folder / name)
    durable.fsync_folder(staged.folder)


def output_folder_name(stem: str, unit: str) -> str:
    """`<stem>-<unit>`, the stem made safe for every reader.

    Always valid UTF-8, at most 255 bytes, never hidden.
    """
    readable = UNREADABLE.sub("_", stem).lstrip(".") or "input"
    room = NAME_BYTES - len(f"-{unit}".encode())
    return f"{readable.encode()[:room].decode(errors='ignore')}-{unit}"


def rename_to_free(staging: Path, target: Path) -> bool:
    """Rename unless the target is already published: False, and nothing moved, where it is."""
    try:
        durable.rename(staging, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if (target / MANIFEST).is_file():
            return False
        raise MachineError(
            f"{target} exists and is no output of lensd: move it away, then restart"
        ) from error
    return True

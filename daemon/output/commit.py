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

from daemon import durable
from daemon.durable import Step, StepKind
from daemon.errors import MachineError
from daemon.frozen import frozen
from daemon.intake.formats import without_suffix
from daemon.lease import Lease, dead_leases
from daemon.looks import lstat_each
from daemon.output.jsontext import to_json_lines
from daemon.output.parts import PARTS_SUFFIX, parts_of
from daemon.pause import FoldersLost
from daemon.records import Source

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


@frozen
class Publication:
    """Where a unit's results are; `fresh` unless they were there before."""

    folder: Path
    fresh: bool


@dataclass(slots=True)
class Staged:
    """Results on their way out: a folder whole but for its manifest, and what became of it."""

    source: Source
    folder: str
    manifest: dict[str, Any]  # `daemon.output.manifest.manifest`'s
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

    def staging(self, unit: str) -> str:
        """Where this process makes a unit's results."""
        return f"{self.lease.folder}/{unit}"

    def kept_parts(self) -> set[str]:
        """The units for which there is what `parts` gives."""
        with os.scandir(self.lease.folder) as entries:
            names = [entry.name for entry in entries]
        return {name.removesuffix(PARTS_SUFFIX) for name in names if name.endswith(PARTS_SUFFIX)}

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
        wrong: list[Step] = []
        with os.scandir(self.path / UNITS) as entries:
            for entry in entries:
                if entry.is_symlink() or self.published(entry.name) is None:
                    wrong.append(Step(StepKind.UNLINK, entry.path))
                else:
                    held.add(entry.name)
        take_all(wrong)
        missing: list[Step] = []
        for path in self.path.iterdir():
            match = PUBLISHED.search(path.name)
            if match and match[1] not in held and (path / MANIFEST).is_file():
                held.add(match[1])
                missing.append(self._note(match[1], path.name))
        take_all(missing)

    def published(self, unit: str) -> Path | None:
        """The folder with the unit's results, under whatever name its content was dropped first."""
        name = noted(f"{self.path}/{UNITS}/{unit}")
        if name is None or "/" in name or not name.endswith(f"-{unit}"):
            return None
        folder = self.path / name
        return folder if (folder / MANIFEST).is_file() else None

    def published_each(self, units: Sequence[str]) -> list[Path | None]:
        """`published` of each; fast where hardly any is."""
        notes = lstat_each([f"{self.path}/{UNITS}/{unit}" for unit in units])
        return [
            None if note is None else self.published(unit) for unit, note in zip(units, notes, strict=True)
        ]

    def flush_names(self) -> None:
        """Make sure that what is visible in the outbox stays. Raises SyncFailed where the disk refuses."""
        durable.fsync_folder(self.path)

    def publish(self, staged: Sequence[Staged]) -> None:
        """Give sealed folders their final names and say so in each; one sync for all. Safe to repeat.

        Where a unit is published already, its folder is removed instead. Raises MachineError where the sync
        fails or something else has the name.
        """
        with durable.locked(self.path / STAGING / PUBLISHING):
            if not os.path.isdir(f"{self.path}/{UNITS}"):  # noqa: PTH112 - somebody cleared it away
                durable.make_folder(self.path / UNITS)
                self._index()
            self._publish_free([unit for unit in staged if unit.publication is None])
            for unit in staged:
                if unit.publication is None:
                    unit.publication = self._publish(unit)
        self.flush_names()

    def _publish_free(self, staged: Sequence[Staged]) -> None:
        """Publish, all at one go, units whose note and folder nobody made before; the others are left."""
        targets = [self._target(unit) for unit in staged]
        entered = durable.each(
            [self._note(unit.source.unit, to.name) for unit, to in zip(staged, targets, strict=True)]
        )
        free = [
            (unit, target)
            for unit, target, error in zip(staged, targets, entered, strict=True)
            if error is None
        ]
        renamed = durable.each([Step(StepKind.RENAME, unit.folder, str(to)) for unit, to in free])
        for (unit, target), error in zip(free, renamed, strict=True):
            if error is None:
                unit.publication = Publication(target, fresh=True)

    def _publish(self, unit: Staged) -> Publication:
        if (published := self.published(unit.source.unit)) is not None:
            durable.remove_folder(Path(unit.folder))
            return Publication(published, fresh=False)
        target = self._target(unit)
        self._enter(unit.source.unit, target.name)
        if not rename_to_free(Path(unit.folder), target):
            durable.remove_folder(Path(unit.folder))
            return Publication(target, fresh=False)
        return Publication(target, fresh=True)

    def _target(self, unit: Staged) -> Path:
        return self.path / output_folder_name(unit.source.claim.name, unit.source.unit)

    def _note(self, unit: str, name: str) -> Step:
        """The entry of the index that says which folder holds a unit.

        It comes before the folder's rename, and is believed only where there is one. It is a small file and
        no link, so that nothing finds the results twice, and whoever copies the outbox copies it.
        """
        return Step(StepKind.WRITE_NOTE, f"{self.path}/{UNITS}/{unit}", os.fsencode(f"{name}\n"))

    def _enter(self, unit: str, name: str) -> None:
        """Make the entry, in the place of one that is there."""
        note = self._note(unit, name)
        try:
            durable.take(note)
        except FileExistsError:
            durable.unlink(note.path)
            durable.take(note)


def noted(path: str) -> str | None:
    """What an entry of the index says; None where there is none, or not all of it.

    One of an earlier version is a link.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return os.readlink(path)  # noqa: PTH115 - of every file
    try:
        content = os.read(descriptor, 2 * NAME_BYTES)
    finally:
        os.close(descriptor)
    return os.fsdecode(content[:-1]) if content.endswith(b"\n") else None


def take_all(steps: Sequence[Step]) -> None:
    """Each step; raises the first error, once all were tried."""
    for error in durable.each(steps):
        if error is not None:
            raise error


def complete(staged: Sequence[Staged]) -> None:
    """Write the manifests. Raises AssertionError unless records == rows + rejects."""
    steps: list[Step] = []
    for unit in staged:
        content = unit.manifest
        if content["records"] != content["rows"] + content["rejects"]:
            raise AssertionError(f"unit {unit.source.unit}: records != rows + rejects: {content}")
        steps.append(Step(StepKind.WRITE_WHOLE, f"{unit.folder}/{MANIFEST}", to_json_lines(content)))
    durable.in_turn(steps)


def seal(staged: Sequence[Staged]) -> None:
    """Flush all files of complete folders, and the folders. Raises SyncFailed where the disk refuses."""
    steps: list[Step] = []
    for unit in staged:
        names = (MANIFEST, *(file["name"] for file in unit.manifest["files"]))
        steps += [Step(StepKind.FSYNC_FILE, f"{unit.folder}/{name}") for name in names]
        steps.append(Step(StepKind.FSYNC_FOLDER, unit.folder))
    durable.in_turn(steps)


def output_folder_name(name: str, unit: str) -> str:
    """`<stem>-<unit>`: the input's name without its known suffixes, made safe for every reader.

    Always valid UTF-8, at most 255 bytes, never hidden.
    """
    stem = UNREADABLE.sub("_", without_suffix(name)).lstrip(".") or "input"
    room = NAME_BYTES - len(f"-{unit}".encode())
    return f"{stem.encode()[:room].decode(errors='ignore')}-{unit}"


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

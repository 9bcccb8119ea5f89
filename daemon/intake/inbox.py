"""The inbox: which files are ready, who works on them, and where they go afterwards.

The one owner of the inbox's state. Knows nothing about what is in a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import stat
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import structlog
import watchfiles

from daemon import durable
from daemon.errors import MachineError
from daemon.intake.lease import Lease, dead_leases, held_files
from daemon.records import Claim, FileIdentity

DONE = "done"
FAILED = "failed"
CLAIMED = ".claimed"
IGNORED_SUFFIXES = ("~", ".tmp", ".part")
NAME_BYTES = 255  # of a file name, on every Linux file system

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class InboxLoad:
    """What waited at the last look."""

    files: int
    bytes: int
    oldest_seconds: float  # since the oldest was last written


@dataclass(frozen=True, slots=True)
class Candidate:
    """A regular file seen in the inbox."""

    name: str
    size: int
    mtime_ns: int
    stamp: tuple[int, int, int, int]  # inode, size, mtime_ns, ctime_ns: what must stay the same


class Inbox:
    """One process's view of an inbox folder. `open` it, take `claims`, settle each one, `close`."""

    def __init__(
        self,
        path: Path,
        *,
        settle_seconds: float,
        rescan_seconds: float,
        max_attempts: int,
        on_success: Literal["move", "delete"],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self.recovered = 0  # files taken back from dead processes
        self._settle_seconds = settle_seconds
        self._rescan_seconds = rescan_seconds
        self._max_attempts = max_attempts
        self._on_success = on_success
        self._clock = clock
        self._seen: dict[str, tuple[tuple[int, int, int, int], float]] = {}  # name -> stamp, since when
        self._ignored: set[str] = set()  # odd things already reported
        self._held: dict[str, Claim] = {}
        self._waiting: list[Claim] = []  # recovered, not yet handed out
        self._load = InboxLoad(0, 0, 0.0)
        self._lease: Lease | None = None

    async def open(self) -> None:
        """Make the folders, take the lease, take back what dead processes held."""
        await asyncio.to_thread(self._open)

    def _open(self) -> None:
        for name in (DONE, FAILED, CLAIMED):
            durable.make_folder(self.path / name)
        self._lease = Lease(self.path / CLAIMED)
        for folder in dead_leases(self.path / CLAIMED, self._lease.folder):
            for held in held_files(folder):
                self._take_back(held.path, held.attempt)
            durable.remove_folder(folder)

    def _take_back(self, path: Path, attempt: int) -> None:
        self.recovered += 1
        claim = self._move_in(path, path.name, attempt + 1)
        if claim is None:
            return
        if attempt < self._max_attempts:
            self._waiting.append(claim)
            return
        message = f"{attempt} attempts ended with the process: see the log of each, then drop it again"
        self._fail(claim, "attempts_exhausted", message, None)

    @property
    def lease(self) -> Lease:
        if self._lease is None:
            raise AssertionError("the inbox is not open")
        return self._lease

    async def close(self) -> None:
        """Give up the lease; claims not settled are taken back at the next start."""
        if self._lease is not None:
            await asyncio.to_thread(self._lease.close)
            self._lease = None

    def pending(self) -> InboxLoad:
        """What waited at the last look."""
        return self._load

    async def claims(self, stop: asyncio.Event, once: bool) -> AsyncIterator[Claim]:
        """One claim at a time, made when it is asked for, until `stop`, or with `once` until all is taken."""
        async with self._watching() as wake:
            while not stop.is_set():
                wake.clear()
                claim, settles_in = await asyncio.to_thread(self._next)
                if claim is not None:
                    yield claim
                elif once and settles_in is None:
                    return
                else:
                    await self._wait(stop, wake, settles_in)

    async def _wait(self, stop: asyncio.Event, wake: asyncio.Event, settles_in: float | None) -> None:
        """Until something may have changed: a hint of the watcher, the next rescan, or a file settling."""
        limit = self._rescan_seconds if settles_in is None else min(self._rescan_seconds, settles_in)
        waits = [asyncio.create_task(event.wait()) for event in (stop, wake)]
        try:
            await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    @contextlib.asynccontextmanager
    async def _watching(self) -> AsyncIterator[asyncio.Event]:
        """An event that the watcher sets. Events are hints: the rescan is the truth."""
        wake = asyncio.Event()
        ended = asyncio.Event()

        task = asyncio.create_task(self._watch(wake, ended), name="watch")
        try:
            yield wake
        finally:
            ended.set()
            await task

    async def _watch(self, wake: asyncio.Event, ended: asyncio.Event) -> None:
        """Set `wake` whenever something happens in the folder. A watcher that fails is started anew.

        watchfiles fails on a name that is not UTF-8, and where the system has no watches left.
        """
        reported = False
        while not ended.is_set():
            try:
                async for _ in watchfiles.awatch(
                    self.path, recursive=False, stop_event=ended, watch_filter=None, step=20
                ):
                    wake.set()
            except* (OSError, RuntimeError) as group:
                if not reported:
                    reason = str(group.exceptions[0])
                    log.warning("inbox.watch_failed", reason=reason, rescan_seconds=self._rescan_seconds)
                reported = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), self._rescan_seconds)

    def _next(self) -> tuple[Claim | None, float | None]:
        """The next claim; else in how many seconds the next file settles, None where none is there."""
        if self._waiting:
            return self._hold(self._waiting.pop(0)), None
        settles_in: float | None = None
        for candidate, remaining in self.scan():
            if candidate.name in self._held:
                continue  # an earlier file of this name is still under way
            if remaining > 0:
                settles_in = remaining if settles_in is None else min(settles_in, remaining)
                continue
            claim = self._move_in(self.path / candidate.name, candidate.name, 1)
            if claim is not None:
                self._seen.pop(candidate.name, None)
                return self._hold(claim), None
        waits_for_own = settles_in is None and any((self.path / name).is_file() for name in self._held)
        return None, self._rescan_seconds if waits_for_own else settles_in

    def _hold(self, claim: Claim) -> Claim:
        self._held[claim.name] = claim
        return claim

    def scan(self) -> list[tuple[Candidate, float]]:
        """Look at the folder: admissible files, oldest first, and in how many seconds each is settled."""
        now = self._clock()
        candidates = sorted(self._candidates(), key=lambda found: (found.mtime_ns, found.name))
        self._seen = {
            found.name: (found.stamp, self._seen[found.name][1])
            if found.name in self._seen and self._seen[found.name][0] == found.stamp
            else (found.stamp, now)
            for found in candidates
        }
        oldest = min((found.mtime_ns for found in candidates), default=None)
        self._load = InboxLoad(
            files=len(candidates),
            bytes=sum(found.size for found in candidates),
            oldest_seconds=max(0.0, time.time() - oldest / 1e9) if oldest is not None else 0.0,
        )
        return [(found, self._seen[found.name][1] + self._settle_seconds - now) for found in candidates]

    def _candidates(self) -> list[Candidate]:
        found = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.endswith(IGNORED_SUFFIXES):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    stamp = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                    found.append(Candidate(entry.name, status.st_size, status.st_mtime_ns, stamp))
                elif not stat.S_ISDIR(status.st_mode):
                    self._report_ignored(entry.name, status.st_mode)
        return found

    def _report_ignored(self, name: str, mode: int) -> None:
        if name not in self._ignored:
            self._ignored.add(name)
            kind = "symlink" if stat.S_ISLNK(mode) else "not a regular file"
            log.warning("inbox.ignored", file=name, kind=kind)

    def _move_in(self, path: Path, name: str, attempt: int) -> Claim | None:
        """Claim by a rename into the lease; None where someone else was faster, or it is no file now."""
        target = self.lease.place(name, attempt)
        if target.exists():
            return None
        try:
            durable.rename(path, target)
        except FileNotFoundError:
            return None
        identity = identity_of(target)
        if identity is None:
            durable.rename(target, path)
            return None
        return Claim(name=name, path=target, attempt=attempt, identity=identity)

    async def unchanged(self, claim: Claim) -> bool:
        """Whether the file is still what it was when it was claimed."""
        return await asyncio.to_thread(identity_of, claim.path) == claim.identity

    async def retire(self, claim: Claim) -> None:
        """Its results are published: move it to `done/`, or delete it."""
        await asyncio.to_thread(self._retire, claim)
        self._held.pop(claim.name, None)

    def _retire(self, claim: Claim) -> None:
        if self._on_success == "delete":
            durable.unlink(claim.path)
        else:
            self._move_out(claim, self.path / DONE)
        durable.fsync_folder(claim.path.parent)

    async def fail(self, claim: Claim, reason: str, message: str, sha256: str | None) -> None:
        """It can't be used: move it to `failed/`, with its reason beside it."""
        await asyncio.to_thread(self._fail, claim, reason, message, sha256)
        self._held.pop(claim.name, None)

    def _fail(self, claim: Claim, reason: str, message: str, sha256: str | None) -> None:
        folder = self.path / FAILED
        target = self._move_out(claim, folder, reserve=len(".reason.json"))
        content = {
            "name": printable(claim.name),
            "reason": reason,
            "message": message,
            "attempt": claim.attempt,
            "sha256": sha256,
            "failed_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        note = folder / f"{target.name}.reason.json"
        with contextlib.suppress(FileNotFoundError):
            durable.unlink(note)  # of an earlier file of this name that an operator took away
        durable.write_file(note, json.dumps(content, indent=2).encode() + b"\n")
        durable.fsync_folder(folder)
        durable.fsync_folder(claim.path.parent)

    async def release(self, claim: Claim) -> None:
        """Put it back into the inbox under its name, or the nearest free one; no attempt is charged."""
        await asyncio.to_thread(self._move_out, claim, self.path)
        self._held.pop(claim.name, None)

    async def release_all(self) -> None:
        """Put back everything that is claimed and not settled."""
        for claim in [*self._held.values(), *self._waiting]:
            if claim.path.exists():
                await self.release(claim)
        self._waiting.clear()

    def _move_out(self, claim: Claim, folder: Path, reserve: int = 0) -> Path:
        """Move a claimed file into `folder` without replacing anything; where it went."""
        for number in range(1_000_000):
            target = folder / numbered(claim.name, number, NAME_BYTES - reserve)
            try:
                moved = durable.move_without_replacing(claim.path, target)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    raise MachineError(f"{claim.path} disappeared while it was claimed") from None
                raise
            if moved:
                durable.fsync_folder(folder)
                return target
        raise MachineError(f"{folder}: no free name for {printable(claim.name)}: clear the folder")


def identity_of(path: Path) -> FileIdentity | None:
    """What a regular file is, by its metadata; None for anything else, or nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return None
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def numbered(name: str, number: int, max_bytes: int) -> str:
    """`name`, or `name.1`, `name.2`, ..., cut so that it fits `max_bytes`."""
    suffix = f".{number}" if number else ""
    raw = os.fsencode(name)
    room = max_bytes - len(suffix)
    return os.fsdecode(raw[:room]) + suffix


def printable(name: str) -> str:
    """A file name for JSON: bytes that are not UTF-8 as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

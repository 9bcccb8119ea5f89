"""The inbox: which files are ready, who works on them, and where they go afterwards.

The one owner of the inbox's state, which lives on one thread. Knows nothing about what is in a file.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import structlog

from daemon import durable
from daemon.errors import MachineError
from daemon.intake.filestatus import Stamp, identity_of, kind_of, stamp, stamp_of
from daemon.intake.lease import HeldFile, Lease, dead_leases, held_files, remove_lease
from daemon.intake.names import NAME_BYTES, numbered, numbered_stem, printable
from daemon.intake.watch import watching
from daemon.records import Claim

P = ParamSpec("P")
R = TypeVar("R")

DONE = "done"
FAILED = "failed"
CLAIMED = ".claimed"
REASON_SUFFIX = ".reason.json"
IGNORED_SUFFIXES = ("~", ".tmp", ".part")
MAX_NUMBER = 1_000_000  # of names tried for one file

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
    stamp: Stamp

    @property
    def size(self) -> int:
        return self.stamp[1]

    @property
    def mtime_ns(self) -> int:
        return self.stamp[2]


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
        self.recovered = 0  # files that dead processes held and that `open` dealt with
        self.exhausted = 0  # of these, the files that had their last attempt and failed
        self._settle_seconds = settle_seconds
        self._rescan_seconds = rescan_seconds
        self._max_attempts = max_attempts
        self._on_success = on_success
        self._clock = clock
        self._wake = asyncio.Event()  # something may have changed
        self._seen: dict[str, tuple[Stamp, float]] = {}  # name -> stamp, since when
        self._ignored: set[str] = set()  # odd things reported and still there
        self._ready: deque[Candidate] = deque()  # of the last look, not yet claimed
        self._looked_at = float("-inf")
        self._waiting: deque[Claim] = deque()  # recovered, not yet handed out
        self._held: dict[Path, Claim] = {}
        self._load = InboxLoad(0, 0, 0.0)
        self._lease: Lease | None = None
        # One thread for all of it: releasing everything waits for a claim that a cancelled task left running.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inbox")

    async def _call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: function(*args, **kwargs)
        )

    async def open(self) -> None:
        """Make the folders, take the lease, take back what dead processes held."""
        await self._call(self._open)

    def _open(self) -> None:
        for name in (DONE, FAILED, CLAIMED):
            durable.make_folder(self.path / name)
        self._lease = Lease(self.path / CLAIMED)
        for folder in dead_leases(self.path / CLAIMED, self._lease.folder):
            for held in held_files(folder):
                self._take_back(held)
            if not remove_lease(folder):
                log.warning("inbox.lease_kept", folder=folder.name, why="holds what is not a regular file")

    def _take_back(self, held: HeldFile) -> None:
        """Take what a dead process held for another attempt, or fail it where it had its last."""
        name = held.path.name
        identity = identity_of(held.path)
        if identity is None:
            return
        self.recovered += 1
        claim = Claim(name, held.path, held.attempt, identity)
        if held.attempt >= self._max_attempts:
            message = (
                f"{held.attempt} attempts ended with the process: see the log of each, then drop it again"
            )
            self._fail(claim, "attempts_exhausted", message, None)
            self.exhausted += 1
            return
        target = self.lease.place(name, held.attempt + 1)
        if durable.move_without_replacing(held.path, target):
            self._waiting.append(Claim(name, target, held.attempt + 1, identity))
        else:  # two dead processes held files of one name
            self._move_out(claim, self.path, numbered_stem)

    @property
    def lease(self) -> Lease:
        if self._lease is None:
            raise AssertionError("the inbox is not open")
        return self._lease

    async def close(self) -> None:
        """Give up the lease; claims not settled are taken back at the next start."""
        if self._lease is not None:
            await self._call(self._lease.close)
            self._lease = None
        self._thread.shutdown(wait=False)

    def pending(self) -> InboxLoad:
        """What waited at the last look."""
        return self._load

    async def claims(self, stop: asyncio.Event, once: bool) -> AsyncIterator[Claim]:
        """One claim at a time, made when it is asked for, until `stop`, or with `once` until all is taken."""
        async with watching(self.path, self._wake, retry_seconds=self._rescan_seconds):
            while not stop.is_set():
                self._wake.clear()
                claim, look_in = await self._call(self._next)
                if claim is not None:
                    yield claim
                elif once and look_in is None:
                    return
                else:
                    await self._wait(stop, look_in)

    async def _wait(self, stop: asyncio.Event, look_in: float | None) -> None:
        """Until something may have changed: a hint, the next rescan, or a file settling."""
        limit = self._rescan_seconds if look_in is None else min(self._rescan_seconds, look_in)
        waits = [asyncio.create_task(event.wait()) for event in (stop, self._wake)]
        try:
            await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _next(self) -> tuple[Claim | None, float | None]:
        """The next claim; else in how many seconds to look again, None where nothing waits."""
        if self._waiting:
            return self._hold(self._waiting.popleft()), None
        if self._clock() - self._looked_at < self._rescan_seconds:
            claim = self._take_ready(fresh=False)
            if claim is not None:
                return claim, None
        look_in = self._look()
        claim = self._take_ready(fresh=True)
        return claim, None if claim is not None else look_in

    def _look(self) -> float | None:
        """Look at the folder for what is ready; in how many seconds something else may be, if anything."""
        names = self._held_names()
        look_in: float | None = None
        self._ready.clear()
        for candidate, settles_in in self.scan():
            if candidate.name not in names and settles_in <= 0:
                self._ready.append(candidate)
                continue
            # A name that is under way waits for that one to be settled, which wakes us.
            wait = self._rescan_seconds if candidate.name in names else settles_in
            look_in = wait if look_in is None else min(look_in, wait)
        self._looked_at = self._clock()
        return look_in

    def _take_ready(self, *, fresh: bool) -> Claim | None:
        """Claim the first file that the last look found ready; unless `fresh`, if it is still the same."""
        names = self._held_names()
        while self._ready:
            candidate = self._ready.popleft()
            path = self.path / candidate.name
            if candidate.name in names or not (fresh or stamp_of(path) == candidate.stamp):
                continue
            claim = self._move_in(path, candidate.name)
            if claim is not None:
                self._seen.pop(candidate.name, None)
                return self._hold(claim)
        return None

    def _held_names(self) -> set[str]:
        return {claim.name for claim in self._held.values()}

    def _hold(self, claim: Claim) -> Claim:
        self._held[claim.path] = claim
        return claim

    def scan(self) -> list[tuple[Candidate, float]]:
        """Look at the folder: admissible files, oldest first, and in how many seconds each is settled."""
        now = self._clock()
        found = sorted(self._stamps().items(), key=lambda item: (item[1][2], item[0]))
        seen = self._seen
        self._seen = {
            name: seen[name] if name in seen and seen[name][0] == stamp else (stamp, now)
            for name, stamp in found
        }
        candidates = [Candidate(name, stamp) for name, stamp in found]
        self._load = InboxLoad(
            files=len(candidates),
            bytes=sum(candidate.size for candidate in candidates),
            oldest_seconds=max(0.0, time.time() - candidates[0].mtime_ns / 1e9) if candidates else 0.0,
        )
        return [(found, self._seen[found.name][1] + self._settle_seconds - now) for found in candidates]

    def _stamps(self) -> dict[str, Stamp]:
        """The regular files that may be taken, by name."""
        stamps: dict[str, Stamp] = {}
        odd: dict[str, str] = {}
        with os.scandir(self.path) as entries:
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
        for name in odd.keys() - self._ignored:
            log.warning("inbox.ignored", file=printable(name), kind=odd[name])
        self._ignored = set(odd)
        return stamps

    def _move_in(self, path: Path, name: str) -> Claim | None:
        """Claim by a rename into the lease; None where someone else was faster, or it is no file now."""
        target = self.lease.place(name, 1)
        try:
            durable.rename(path, target)
        except FileNotFoundError:
            return None
        identity = identity_of(target)
        if identity is None:  # swapped since it was seen; a link or a folder goes back to where it was
            durable.move_without_replacing(target, path)
            return None
        return Claim(name=name, path=target, attempt=1, identity=identity)

    async def unchanged(self, claim: Claim) -> bool:
        """Whether the file is still what it was when it was claimed."""
        return await self._call(identity_of, claim.path) == claim.identity

    async def retire(self, claim: Claim) -> None:
        """Its results are published: move it to `done/`, or delete it."""
        await self._call(self._retire, claim)
        self._wake.set()

    def _retire(self, claim: Claim) -> None:
        if self._on_success == "delete":
            durable.unlink(claim.path)
            durable.fsync_folder(claim.path.parent)
        else:
            self._move_out(claim, self.path / DONE, numbered)
        self._held.pop(claim.path, None)

    async def fail(self, claim: Claim, reason: str, message: str, sha256: str | None) -> None:
        """It can't be used: move it to `failed/`, with its reason beside it. Replaces nothing there."""
        await self._call(self._fail, claim, reason, message, sha256)
        self._wake.set()

    def _fail(self, claim: Claim, reason: str, message: str, sha256: str | None) -> None:
        content = {
            "name": printable(claim.name),
            "reason": reason,
            "message": message,
            "attempt": claim.attempt,
            "sha256": sha256,
            "failed_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        draft = self.lease.draft()
        durable.write_file(draft, json.dumps(content, indent=2).encode() + b"\n")
        folder = self.path / FAILED
        for number in range(MAX_NUMBER):
            target = folder / numbered(claim.name, number, NAME_BYTES - len(REASON_SUFFIX))
            note = folder / f"{target.name}{REASON_SUFFIX}"
            if not durable.move_without_replacing(draft, note):
                continue
            if self._move(claim, target):
                return
            durable.rename(note, draft)
        raise no_free_name(claim, folder)

    async def release(self, claim: Claim) -> None:
        """Put it back into the inbox under its name, or the nearest free one; no attempt is charged."""
        await self._call(self._move_out, claim, self.path, numbered_stem)
        self._wake.set()

    async def release_all(self) -> None:
        """Put back everything that is claimed and not settled."""
        await self._call(self._release_all)
        self._wake.set()

    def _release_all(self) -> None:
        for claim in [*self._held.values(), *self._waiting]:
            self._move_out(claim, self.path, numbered_stem)
        self._waiting.clear()

    def _move_out(self, claim: Claim, folder: Path, name: Callable[[str, int], str]) -> None:
        """Move a claimed file into `folder`, under the first of its numbered names that is free."""
        for number in range(MAX_NUMBER):
            if self._move(claim, folder / name(claim.name, number)):
                return
        raise no_free_name(claim, folder)

    def _move(self, claim: Claim, target: Path) -> bool:
        """Move a claimed file to a name that must be free, and flush both folders."""
        try:
            if not durable.move_without_replacing(claim.path, target):
                return False
        except FileNotFoundError:
            raise MachineError(
                f"{claim.path} or {target.parent} disappeared while the file was claimed: restart lensd"
            ) from None
        durable.fsync_folder(target.parent)
        durable.fsync_folder(claim.path.parent)
        self._held.pop(claim.path, None)
        return True


def no_free_name(claim: Claim, folder: Path) -> MachineError:
    return MachineError(f"{folder}: no free name for {printable(claim.name)}: clear the folder")

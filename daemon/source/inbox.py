"""The inbox: which files are ready, who works on them, and where they go afterwards.

The one owner of the inbox's state, which lives on one thread. Knows nothing about what is in a file.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import structlog

from daemon.errors import FileError
from daemon.escaping import printable_name
from daemon.fs import durable
from daemon.fs.guard import SyncGuard
from daemon.fs.lease import dead_leases
from daemon.pause import Pause
from daemon.records import Claim, InboxLoad, Presence
from daemon.source.claims import CLAIMED, DRAFTS, Claims, claimed_files
from daemon.source.filestatus import identity_of, presence, stamp_of
from daemon.source.formats import is_input
from daemon.source.inputs import InputNames
from daemon.source.names import folded
from daemon.source.scan import Candidate, Scanner
from daemon.source.watch import watching

P = ParamSpec("P")
R = TypeVar("R")

BATCH_FILES = 256  # claimed at a time, so that small files share the cost
BATCH_BYTES = 4 << 20

log = structlog.get_logger()


class Inbox:
    """One process's view of an inbox folder. `open` it, take `claims`, settle each one, `close`."""

    def __init__(
        self,
        path: Path,
        *,
        settle_seconds: float,
        rescan_seconds: float,
        on_success: Literal["move", "delete"],
        names: InputNames | None = None,
        pause: Pause | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Only files that have `names` of inputs are claimed, and nothing while `pause` has reasons."""
        self.path = path
        self._rescan_seconds = rescan_seconds
        self._pause = Pause() if pause is None else pause
        self._clock = clock
        self._wake = asyncio.Event()  # something may have changed
        self._scanner = Scanner(path, settle_seconds=settle_seconds, clock=clock, names=names)
        self._ready: deque[Candidate] = deque()  # of the last look, not yet claimed, of no name under way
        self._names: set[str] = set()  # of the last look
        self._looked_at = float("-inf")
        self._waiting: deque[Claim] = deque()  # taken over, not begun again yet
        self._recovered = 0  # files taken over from dead processes, not yet told
        self._asked = True  # for the next look, by an event or by a file that was settled, or it is the first
        self._found = 0  # files first seen by a look that nothing asked for, not yet told
        self.left = 0  # inputs that lay there when claims came to their end
        self._unclaimable: set[str] = set()  # names reported
        self._claims = Claims(path, on_success=on_success)
        self._guard = SyncGuard(self._claims.check_lost)
        # One thread for all of it: releasing everything waits for a claim that a cancelled task left running.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inbox")

    async def _call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._guard.run, call)

    async def open(self) -> None:
        """Make the folders, take the lease, take over what dead processes held. Safe to repeat."""
        await self._call(self._open)

    def _open(self) -> None:
        self._claims.open()
        self._take_over()

    def _take_over(self) -> bool:
        """Take what dead processes had claimed; whether something had to stay where it is for now."""
        left = False
        for lease in dead_leases(self.path / CLAIMED, self._claims.lease):
            for path, attempt in claimed_files(lease):
                if not is_input(path.name):  # of a version that took any name
                    self._claims.put_back(path)
                    continue
                claim = self._take_back(path, attempt)
                if claim is None:  # its name is taken for now
                    left = True
                    continue
                self._waiting.append(claim)
                self._recovered += 1
            durable.remove_folder(lease / DRAFTS)
        return left

    def _take_back(self, path: Path, attempt: int) -> Claim | None:
        """Move a claimed file into the own lease; None where a file of its name is there already."""
        target = self._claims.folder(attempt) / path.name
        if not durable.move_without_replacing(path, target):
            return None
        identity = identity_of(target)
        return None if identity is None else Claim(path.name, str(target), attempt, identity)

    async def close(self) -> None:
        """Give up the lease; claims not settled are taken over by the next process."""
        if self._claims.is_open:
            await self._call(self._claims.close)
        self._thread.shutdown(wait=False)

    @property
    def backlog(self) -> bool:
        """Whether files were seen that are ready to be claimed."""
        return bool(self._ready or self._waiting)

    def take_recovered(self) -> int:
        """How many files were taken over from dead processes since the last call."""
        recovered, self._recovered = self._recovered, 0
        return recovered

    def take_found(self) -> int:
        """How many files were first seen by a look that nothing had asked for, since the last call."""
        found, self._found = self._found, 0
        return found

    def pending(self) -> InboxLoad | None:
        """The files that waited at the last look, None before the first."""
        return self._scanner.load

    async def claims(self, stop: asyncio.Event, once: bool) -> AsyncIterator[list[Claim]]:
        """Claims as they are asked for, a few small files at a time.

        Ends at `stop`, with `once` when all is taken. A file on which work has begun before comes alone.
        """
        self._scanner.tells_at_once = once
        async with watching(self.path, self._wake, retry_seconds=self._rescan_seconds):
            while True:
                await self._pause.over()
                if stop.is_set():
                    if once:
                        await self._take_stock(all_there=True)
                    return
                self._asked |= self._wake.is_set()
                self._wake.clear()
                claims, look_in = await self._pause.outlast(lambda: self._call(self._next), "claim")
                if claims:
                    yield claims
                elif once and look_in is None:
                    await self._take_stock(all_there=False)
                    return
                else:
                    await self._wait(stop, look_in)

    async def _take_stock(self, *, all_there: bool) -> None:
        """Count what a drain leaves behind."""
        count = functools.partial(self._call, self._count_left, all_there=all_there)
        self.left = await self._pause.outlast(count, "claim")

    def _count_left(self, *, all_there: bool) -> int:
        """How many inputs stay in the inbox: `all_there`, or those of the last look that can't be claimed or
        are not whole."""
        if not all_there:
            return len(self._names & self._unclaimable) + self._scanner.unfinished
        return len(self._scanner.scan()) + self._scanner.unfinished

    async def _wait(self, stop: asyncio.Event, look_in: float | None) -> None:
        """Until something may have changed: a hint, the next rescan, or a file settling."""
        limit = self._rescan_seconds if look_in is None else min(self._rescan_seconds, look_in)
        waits = [asyncio.create_task(event.wait()) for event in (stop, self._wake)]
        try:
            await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _next(self) -> tuple[list[Claim], float | None]:
        """The next claims; else in how many seconds to look again, None where nothing waits."""
        if claims := self._begin_again():
            return claims, None
        if self._clock() - self._looked_at < self._rescan_seconds and (
            claims := self._take_ready(fresh=False)
        ):
            return claims, None
        look_in = self._look()
        claims = self._begin_again() or self._take_ready(fresh=True)
        return claims, None if claims else look_in

    def _begin_again(self) -> list[Claim]:
        """Count another attempt for a file taken over, and hand it out alone."""
        for claim in self._waiting:
            target = self._claims.folder(claim.attempt + 1) / claim.name
            if durable.move_without_replacing(claim.path, target):
                self._waiting.remove(claim)
                identity = identity_of(target) or claim.identity
                return [self._claims.hold(Claim(claim.name, str(target), claim.attempt + 1, identity))]
        return []

    def _look(self) -> float | None:
        """Look at the folder for what is ready; in how many seconds something else may be, if anything.

        Raises FoldersLost where the own lease is gone.
        """
        self._claims.check_lost()
        look_in = self._rescan_seconds if self._take_over() or self._waiting else None
        names = {claim.name for claim in (*self._claims.claims, *self._waiting)}
        self._ready.clear()
        found = self._scanner.scan()
        self._names = {candidate.name for candidate, _ in found}
        self._unclaimable &= self._names
        for candidate, settles_in in found:
            if candidate.name not in names and settles_in <= 0:
                self._ready.append(candidate)
                continue
            # A name that is under way waits for that one to be settled, which wakes us.
            wait = self._rescan_seconds if candidate.name in names else settles_in
            look_in = wait if look_in is None else min(look_in, wait)
        self._looked_at = self._clock()
        self._found += 0 if self._asked else self._scanner.new
        self._asked = False
        return look_in

    def _take_ready(self, *, fresh: bool) -> list[Claim]:
        """Claim the first of what the last look found ready; unless `fresh`, if it is still the same."""
        if not self._ready:  # make no folder: in an empty inbox its absence is a loss to be found
            return []
        folder = self._claims.folder(1)
        candidates = self._free(self._next_ready(fresh=fresh), folder)
        moved: list[str] = []
        again: list[Candidate] = []  # of which the machine refused the claim
        trouble: OSError | None = None
        for candidate in candidates:
            try:
                durable.rename(self.path / candidate.name, folder / candidate.name)
                moved.append(candidate.name)
            except OSError as error:
                if not self._passed_over(candidate.name, error, folder):
                    again.append(candidate)
                    trouble = trouble or error
        self._ready.extendleft(reversed(again))
        claims = self._moved_in(moved, folder)
        if trouble is not None and not claims:  # else hand these out; the next call meets the same trouble
            raise trouble
        return claims

    def _next_ready(self, *, fresh: bool) -> list[Candidate]:
        """Of the files that are ready a batch of the first; unless `fresh`, those that are still the same."""
        batch: list[Candidate] = []
        size = 0
        while self._ready and len(batch) < BATCH_FILES and size < BATCH_BYTES:
            batch.append(self._ready.popleft())
            size += batch[-1].size
        if fresh:
            return batch
        now = [identity_of(self.path / candidate.name) for candidate in batch]
        return [one for one, is_ in zip(batch, now, strict=True) if is_ and stamp_of(is_) == one.stamp]

    def _free(self, candidates: Sequence[Candidate], folder: Path) -> list[Candidate]:
        """Those of which no file of their name lies in the lease: a claim replaces nothing."""
        there = {folded(name) for name in os.listdir(folder)}  # noqa: PTH208 - names, of every file under way
        free: list[Candidate] = []
        for candidate in candidates:
            if folded(candidate.name) in there and os.path.lexists(folder / candidate.name):
                # where a claim ended halfway: the next process takes it back
                self._leave(candidate.name, "a file of this name lies in the lease: restart lensd")
            else:
                free.append(candidate)
        return free

    def _passed_over(self, name: str, error: OSError, folder: Path) -> bool:
        """Whether a file that could not be claimed is to be left alone: this user may not, or it is gone."""
        if isinstance(error, PermissionError) and os.access(self.path, os.W_OK | os.X_OK):
            self._leave(name, error.strerror)
            return True
        return isinstance(error, FileNotFoundError) and folder.is_dir() and self.path.is_dir()

    def _moved_in(self, names: Sequence[str], folder: Path) -> list[Claim]:
        """The claims of files that were moved into the lease; what turned out to be no file goes back."""
        try:
            identities = [identity_of(folder / name) for name in names]
        except OSError:
            for name in names:
                durable.move_without_replacing(folder / name, self.path / name)
            raise
        claims: list[Claim] = []
        others: list[str] = []  # swapped since they were seen; a link or a folder goes back to where it was
        for name, identity in zip(names, identities, strict=True):
            if identity is None:
                others.append(name)
                continue
            self._scanner.forget(name)
            claims.append(self._claims.hold(Claim(name, f"{folder}/{name}", 1, identity)))
        try:
            for name in others:
                durable.move_without_replacing(folder / name, self.path / name)
        except OSError as error:
            if not claims:
                raise
            self._leave(name, error.strerror)  # these are handed out all the same
        return claims

    def _leave(self, name: str, reason: str | None) -> None:
        """Say once why a file is not claimed."""
        if name not in self._unclaimable:
            log.warning("inbox.unclaimable", file=printable_name(name), reason=reason)
        self._unclaimable.add(name)

    async def recheck(self, claims: Sequence[Claim]) -> list[Presence]:
        """Whether each file is still what it was when it was claimed."""
        return await self._call(lambda: list(map(presence, claims)))

    async def retire(self, claims: Sequence[Claim]) -> None:
        """Their results are published: move them to `done/`, or delete them. Safe to repeat."""
        await self._call(self._claims.retire, claims)
        self._wake.set()

    async def fail(self, claim: Claim, error: FileError, sha256: str | None) -> None:
        """Move an unusable file to `failed/`, its reason beside it. Replaces no file. Safe to repeat."""
        await self._call(self._claims.fail, claim, error, sha256)
        self._wake.set()

    async def release(self, claims: Sequence[Claim]) -> None:
        """Put files back into the inbox, each under its name or the nearest free one. Charges no attempt."""
        await self._call(self._claims.release, claims)
        self._wake.set()

    async def release_all(self, *, flush: bool = True) -> None:
        """Put back everything that is claimed and not settled."""
        if not flush:
            self._guard.allow_unsynced()
        await self._call(self._release_all, flush)
        self._waiting.clear()
        self._wake.set()

    def _release_all(self, flush: bool) -> None:
        self._claims.release([*self._claims.claims, *self._waiting], flush=flush)

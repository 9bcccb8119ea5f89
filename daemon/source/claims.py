"""The files that one process has claimed, and how each leaves. Functions block, on one thread."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from daemon.errors import FileError, MachineError
from daemon.escaping import printable_name
from daemon.fs import durable
from daemon.fs.lease import Lease
from daemon.pause import FoldersLost
from daemon.records import Claim
from daemon.source.failed import set_aside
from daemon.source.filestatus import identity_of
from daemon.source.names import move_to_free, numbered

DONE = "done"
FAILED = "failed"
CLAIMED = ".claimed"
DRAFTS = "drafts"  # of reasons, in the own lease
FAILING = ".failing"  # locked while a file is moved to FAILED


class Claims:
    """The files of an inbox that lie in this process's lease. `open` it before all else.

    A claimed file lies at `.claimed/<lease>/<n>/<name>`, where n says how often work on it has begun: the
    count is made before the work, so that it survives what the work may do to the process.
    """

    def __init__(self, path: Path, *, on_success: Literal["move", "delete"]) -> None:
        self.path = path
        self._on_success = on_success
        self._held: dict[str, Claim] = {}  # by where they lie
        self._lease: Lease | None = None

    def open(self) -> None:
        """Make the folders and take the lease. Safe to repeat. Raises MachineError."""
        for name in (DONE, FAILED, CLAIMED):
            try:
                durable.make_folder(self.path / name)
            except FileExistsError:
                raise MachineError(
                    f"{self.path / name} is no folder, and lensd needs one of that name: move it away"
                ) from None
        durable.fsync_folder(self.path)
        if self._lease is None:
            self._lease = Lease(self.path / CLAIMED)

    def close(self) -> None:
        """Give up the lease; what is held is taken over by the next process."""
        if self._lease is not None:
            self._lease.close()
            self._lease = None

    @property
    def is_open(self) -> bool:
        return self._lease is not None

    @property
    def lease(self) -> Path:
        if self._lease is None:
            raise AssertionError("the inbox is not open")
        return self._lease.folder

    @property
    def claims(self) -> list[Claim]:
        return list(self._held.values())

    def check_lost(self) -> None:
        """Raises FoldersLost where the inbox is there and the lease is not."""
        if self._lease is not None and self.path.is_dir() and not self._lease.folder.is_dir():
            raise FoldersLost(f"{self._lease.folder} disappeared, with the files claimed there")

    def folder(self, attempt: int) -> Path:
        """Where files lie while they are claimed for the given attempt."""
        folder = self.lease / str(attempt)
        durable.make_folder(folder)
        return folder

    def _make_again(self, folder: Path) -> None:
        """Make a sub-folder that somebody removed to have its room; not where the inbox itself is gone."""
        if not folder.is_dir() and self.lease.is_dir():
            durable.make_folder(folder)
            durable.fsync_folder(self.path)

    def hold(self, claim: Claim) -> Claim:
        """This file lies there now."""
        self._held[claim.at] = claim
        return claim

    def retire(self, claims: Sequence[Claim]) -> None:
        """Their results are published: move them to `done/`, or delete them. Safe to repeat."""
        done = self.path / DONE
        if self._on_success == "move":
            self._make_again(done)
        for claim in claims:
            self._retire_one(claim)
        if self._on_success == "move":
            durable.fsync_folder(done)
        self._let_go(claims)

    def _retire_one(self, claim: Claim) -> None:
        try:
            if self._on_success == "move":
                move_to_free(claim.path, self.path / DONE, claim.name, numbered)
            else:
                durable.unlink(claim.path)
        except FileNotFoundError:
            if os.path.lexists(claim.path):
                raise
            self.check_lost()  # else its user took it away, or an earlier try moved it

    def fail(self, claim: Claim, error: FileError, sha256: str | None) -> None:
        """Move an unusable file to `failed/`, its reason beside it. Replaces no file. Safe to repeat."""
        content = {
            "name": printable_name(claim.name),
            "reason": error.reason,
            "message": str(error),
            "attempt": claim.attempt,
            "sha256": sha256,
            "failed_at": datetime.now(UTC).isoformat(timespec="seconds"),
            **error.details,
        }
        folder = self.path / FAILED
        self._make_again(folder)
        if claim.at in self._held:  # no earlier try came so far
            reason_file = json.dumps(content, indent=2).encode() + b"\n"
            draft = self.lease / DRAFTS / "reason"
            with durable.locked(self.path / CLAIMED / FAILING):
                set_aside(claim, folder, reason_file, draft)
            self._held.pop(claim.at, None)
        durable.fsync_folder(folder)
        self._let_go([claim])

    def release(self, claims: Sequence[Claim], *, flush: bool = True) -> None:
        """Put files back into the inbox, each under its name or the nearest free one. Charges no attempt."""
        for claim in claims:
            if os.path.lexists(claim.path):
                move_to_free(claim.path, self.path, claim.name)
        if flush and self.path.is_dir():
            durable.fsync_folder(self.path)
        self._let_go(claims, flush=flush)

    def put_back(self, path: Path) -> None:
        """Move a file that a dead process had claimed back into the inbox."""
        move_to_free(path, self.path, path.name)
        durable.fsync_folder(self.path)

    def _let_go(self, claims: Sequence[Claim], *, flush: bool = True) -> None:
        """Flush the folders that the files left, and hold them no longer."""
        for folder in {claim.path.parent for claim in claims} if flush else ():
            with contextlib.suppress(FileNotFoundError):
                durable.fsync_folder(folder)
        for claim in claims:
            self._held.pop(claim.at, None)


def claimed_files(lease: Path) -> list[tuple[Path, int]]:
    """The regular files that lie claimed in a lease, and how often work on each has begun."""
    folders = [folder for folder in lease.iterdir() if folder.name.isdecimal() and folder.is_dir()]
    return [
        (path, int(folder.name))
        for folder in sorted(folders)
        for path in sorted(folder.iterdir())
        if identity_of(path) is not None
    ]

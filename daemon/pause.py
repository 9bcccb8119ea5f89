"""Why nothing is taken up at the moment: a full disk, no file descriptors left, a folder that is gone.

Such trouble is the machine's, not a file's: whoever meets it waits here and tries again, and no attempt is
charged. Knows no files and no metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from daemon.errors import MachineError
from daemon.escaping import escape_control
from daemon.platform_calls import error_codes
from daemon.records import PAUSE_REASONS

T = TypeVar("T")

DISK, DESCRIPTORS, FOLDERS, WORKERS = PAUSE_REASONS
REASON_OF = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMLINK), DISK),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.ENOMEM), DESCRIPTORS),
    **dict.fromkeys(
        (
            *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV),
            # What a network file system says, or a disk that was pulled out.
            *(errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH),
            *(errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ESHUTDOWN),
            *(errno.ENOLCK, errno.ENODEV, errno.ENXIO, *error_codes("ENOMEDIUM")),
        ),
        FOLDERS,
    ),
}
BROKEN = error_codes("EIO", "EREMOTEIO", "EUCLEAN")  # the disk's fault, and no waiting mends it
RETRY_SECONDS = 1.0  # between two tries of what the machine refused


class FoldersLost(MachineError):
    """The inbox or the outbox was removed under the daemon, and with it what the daemon had there."""


class Pause:
    """The reasons to pause that hold now, each with a message; empty while all is well.

    Unless `patient`, or once `give_up` was called, what the machine refuses is a MachineError at once.
    """

    def __init__(
        self,
        *,
        patient: bool = True,
        retry_seconds: float = RETRY_SECONDS,
        on_retry: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_retry` is told, before each repetition, which of RETRIED is repeated."""
        self._patient = patient
        self._retry_seconds = retry_seconds
        self._on_retry = on_retry
        self._clock = clock
        self._held: dict[str, str] = {}  # by a condition that is checked from time to time
        self._met: dict[str, tuple[str, float]] = {}  # by an operation that failed, until when
        self._given_up = asyncio.Event()

    @property
    def reasons(self) -> dict[str, str]:
        """Reason to message."""
        now = self._clock()
        met = {reason: message for reason, (message, until) in self._met.items() if now < until}
        return met | self._held

    def hold(self, reason: str, message: str | None) -> None:
        """Note the result of a check: a message while the reason holds, None where it does not."""
        if message is None:
            self._held.pop(reason, None)
        else:
            self._held[reason] = message

    def give_up(self) -> None:
        """Wait for nothing from now on: the daemon is told to stop."""
        self._given_up.set()

    @property
    def given_up(self) -> bool:
        """Whether the daemon is told to stop."""
        return self._given_up.is_set()

    async def rest(self, seconds: float) -> None:
        """Wait so long, or until the daemon is told to stop."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._given_up.wait(), seconds)

    async def over(self) -> None:
        """Wait until no reason holds, or the daemon is told to stop. Raises MachineError unless patient."""
        while (reasons := self.reasons) and not self._given_up.is_set():
            if not self._patient:
                raise MachineError("; ".join(reasons.values()))
            await self._sleep()

    async def outlast(self, attempt: Callable[[], Awaitable[T]], stage: str) -> T:
        """Call `attempt` until the machine no longer refuses it; return its result.

        `attempt` must be safe to repeat; `stage` is one of RETRIED. Raises the OSErrors that no waiting
        helps, and MachineError.
        """
        while True:
            try:
                return await attempt()
            except OSError as error:
                if error.errno in BROKEN:
                    raise MachineError(f"{describe(error)}: check the disk, then restart") from error
                reason = REASON_OF.get(error.errno or 0)
                if reason is None:
                    raise
                self._met[reason] = (describe(error), self._clock() + 2 * self._retry_seconds)
                if not self._patient or self._given_up.is_set():
                    raise MachineError(describe(error)) from error
                self._on_retry(stage)
            await self._sleep()

    async def _sleep(self) -> None:
        await self.rest(self._retry_seconds)


def describe(error: OSError) -> str:
    """One line: where and what, for an operator."""
    names = [escape_control(str(name)) for name in (error.filename, error.filename2) if name]
    where = f"{' -> '.join(names)}: " if names else ""
    return f"{where}{error.strerror or error}{remedy(error.errno)}"


def remedy(code: int | None) -> str:
    """Say what to do about an error whose words do not tell."""
    if code == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit == resource.RLIM_INFINITY:
            return ": the file system takes no larger file: use another, or smaller inputs"
        return f": this process may write no file of more than {limit} bytes: raise its limit (ulimit -f)"
    if code == errno.EDQUOT:
        return ": free some space, or raise the quota of this user"
    if code == errno.EXDEV:
        return ": they are on different file systems or mounts, and a rename must move files between them"
    return ""

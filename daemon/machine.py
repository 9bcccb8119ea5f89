"""Looks at the machine that the daemon works on: whether its folders and its disk allow work. Blocks.

Finds reasons not to start and reasons to pause; does not know who acts on them.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from daemon.errors import ConfigError, MachineError
from daemon.folders import folder_trouble, leftover_trouble, parent_trouble, place_trouble
from daemon.fs.durable import make_folder
from daemon.observe.formatting import size
from daemon.pause import DISK, FOLDERS, Pause, describe

OF_PATHS = frozenset(  # what is wrong with a path or with the rights to it, and not with the machine
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST),
        *(errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
    }
)
UNANSWERED_SECONDS = 10.0  # after which a look that does not come back is trouble by itself


def check_folders(
    inbox: Path, outbox: Path, *, taken: Mapping[str, Path] | None = None, make: bool = True
) -> None:
    """See that both folders, and those within that lensd works in, are fit for it. Raises ConfigError.

    `taken` are folders of other use, by what they are. Unless `make`, the two are not made where missing.
    """
    try:
        trouble = (
            place_trouble(inbox, outbox, taken or {})
            or unfit(inbox, outbox, make=make)
            or place_trouble(inbox, outbox, taken or {})  # two names, once made, may be one folder's
        )
    except OSError as error:
        message = describe(error)
        raise (ConfigError(message) if error.errno in OF_PATHS else MachineError(message)) from None
    if trouble is not None:
        raise ConfigError(trouble)


def unfit(inbox: Path, outbox: Path, *, make: bool) -> str | None:
    for key, folder in (("inbox.path", inbox), ("outbox.path", outbox)):
        if (trouble := parent_trouble(key, folder)) is not None:
            return trouble
        if make and not os.path.lexists(folder):
            make_folder(folder)
    return folder_trouble(inbox, outbox, may_be_missing=not make) or leftover_trouble(inbox, outbox)


class Machine:
    """The folders and the disk, and the reasons to pause that they give."""

    def __init__(
        self,
        inbox: Path,
        outbox: Path,
        *,
        min_free_bytes: int,
        pause: Pause,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.min_free_bytes = min_free_bytes  # of the outbox's disk
        self.folders = {"inbox": inbox, "outbox": outbox}
        self._inbox = inbox
        self._outbox = outbox
        self._pause = pause
        self._clock = clock
        self._looking_since: float | None = None

    @property
    def reasons(self) -> dict[str, str]:
        """The reasons to pause that hold now, whoever met them, each with a message."""
        return self._pause.reasons

    def look(self) -> None:
        """Whether folders and disk allow work; sets the reasons to pause."""
        self._looking_since = self._clock()
        try:
            self._pause.hold(FOLDERS, self.folder_trouble())
            free = shutil.disk_usage(self._outbox).free
            low = (
                f"{self._outbox}: {size(free)} free, less than outbox.min_free_bytes,"
                f" {size(self.min_free_bytes)}: free some space"
            )
            self._pause.hold(DISK, low if free < self.min_free_bytes else None)
        except OSError as error:  # one of them went while it was looked at
            self._pause.hold(FOLDERS, describe(error))
        finally:
            self._looking_since = None

    def see_unanswered(self) -> None:
        """Say so where a look hangs, as on a network disk that is gone. Does not block."""
        since = self._looking_since
        if since is not None and self._clock() - since > UNANSWERED_SECONDS:
            self._pause.hold(
                FOLDERS,
                f"{self._inbox} and {self._outbox}: no answer for {self._clock() - since:.0f} s:"
                " see to their disk or network",
            )

    def folder_trouble(self) -> str | None:
        """Why inbox and outbox can't be worked with, if so."""
        return folder_trouble(self._inbox, self._outbox)

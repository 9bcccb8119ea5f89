"""Looks at the machine that the daemon works on: whether its folders and its disk allow work. Blocks.

Finds reasons not to start and reasons to pause; does not know who acts on them.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from daemon.durable import make_folder
from daemon.errors import ConfigError
from daemon.observe.wording import size
from daemon.pause import DISK, FOLDERS, Pause, describe

UNANSWERED_SECONDS = 10.0  # after which a look that does not come back is trouble by itself


def check_folders(inbox: Path, outbox: Path) -> None:
    """Make both folders and see that results can be published by a rename. Raises ConfigError."""
    for key, folder in (("inbox.path", inbox), ("outbox.path", outbox)):
        try:
            make_folder(folder)
        except OSError as error:
            raise ConfigError(f"{key} = {folder}: can't be made: {error.strerror}") from None
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigError(f"{key} = {folder}: not readable and writable for this user")
    if inbox.stat().st_dev != outbox.stat().st_dev:
        raise ConfigError(
            f"inbox.path = {inbox} and outbox.path = {outbox} are on different file systems:"
            " put them on one, so that a rename publishes"
        )
    if inbox.resolve() == outbox.resolve():
        raise ConfigError(f"inbox.path and outbox.path are the same folder, {inbox}: use two")


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
        self._inbox = inbox
        self._outbox = outbox
        self._pause = pause
        self._clock = clock
        self._looking_since: float | None = None

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
        for folder in (self._inbox, self._outbox):
            if not folder.is_dir():
                return f"{folder}: no such folder"
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                return f"{folder}: not readable and writable for this user"
        if self._inbox.stat().st_dev != self._outbox.stat().st_dev:
            return f"{self._inbox} and {self._outbox} are on different file systems"
        return None

"""Stands between the disk and whoever works on it: nothing is done after a sync that the disk refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from daemon.errors import SyncFailed

R = TypeVar("R")


class SyncGuard:
    """Runs operations on folders. `check_lost` raises FoldersLost where what is kept there is gone."""

    def __init__(self, check_lost: Callable[[], None]) -> None:
        self._check_lost = check_lost
        self._failed: SyncFailed | None = None

    def run(self, operation: Callable[[], R]) -> R:
        """Run an operation, on any thread. Raises the SyncFailed of an earlier one instead."""
        if self._failed is not None:
            raise self._failed
        try:
            return operation()
        except FileNotFoundError:
            self._check_lost()
            raise
        except SyncFailed as error:
            self._failed = error
            raise

    def allow_unsynced(self) -> None:
        """Run operations again that sync nothing."""
        self._failed = None

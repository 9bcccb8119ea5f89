"""Hints that a folder changed. Events may be late, merged or missing: whoever waits looks again anyway."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import structlog
import watchfiles

STEP_MILLISECONDS = 20  # of quiet, after which a burst of events is one hint
HINT_SECONDS = 0.1  # at least, between two hints

log = structlog.get_logger()


@contextlib.asynccontextmanager
async def watching(folder: Path, wake: asyncio.Event, *, retry_seconds: float) -> AsyncIterator[None]:
    """Set `wake` on every change inside the folder itself. A failing watcher is logged, never raised."""
    ended = asyncio.Event()
    task = asyncio.create_task(watch(folder, wake, ended, retry_seconds), name="watch")
    try:
        yield
    finally:
        ended.set()
        # `await task` would hand a cancellation of ours on to it, and anyio, inside watchfiles, may keep it.
        await asyncio.wait([task])


async def watch(folder: Path, wake: asyncio.Event, ended: asyncio.Event, retry_seconds: float) -> None:
    """Until `ended`. A watcher that fails is started anew.

    watchfiles fails on a name that is not UTF-8, and where the system has no watches left.
    """
    reported = False
    while not ended.is_set():
        try:
            async for _ in watchfiles.awatch(
                folder, recursive=False, stop_event=ended, watch_filter=None, step=STEP_MILLISECONDS
            ):
                wake.set()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), HINT_SECONDS)
        except* (OSError, RuntimeError) as group:
            if not reported:
                log.warning(
                    "inbox.watch_failed", reason=str(group.exceptions[0]), rescan_seconds=retry_seconds
                )
            reported = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), retry_seconds)

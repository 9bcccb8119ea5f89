from __future__ import annotations

import asyncio

import pytest

from daemon.source import watch as module
from daemon.source.watch import watching


async def test_a_cancellation_is_not_lost_while_the_watcher_ends(tmp_path, monkeypatch):
    ending = asyncio.Event()

    async def keeps_cancellations(folder, wake, ended, retry_seconds):
        await ended.wait()
        ending.set()
        for _ in range(3):
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:  # as a cancel scope of anyio does
                continue

    monkeypatch.setattr(module, "watch", keeps_cancellations)

    async def look_and_go_on() -> None:
        async with watching(tmp_path, asyncio.Event(), retry_seconds=1):
            await asyncio.sleep(0)
        await asyncio.Event().wait()  # for ever, unless cancelled

    task = asyncio.create_task(look_and_go_on())
    await ending.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)

from __future__ import annotations

import asyncio
import threading

from daemon.executor.device_thread import DeviceThread


async def test_a_call_counts_as_work_from_its_first_second_on():
    now = [100.0]
    device = DeviceThread(clock=lambda: now[0])
    begun, end = threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        end.wait(60)
        return "done"

    assert (device.busy_since, device.busy_seconds) == (None, 0)
    call = asyncio.create_task(device.call(work))
    await asyncio.to_thread(begun.wait, 60)
    now[0] = 107.0
    assert (device.busy_since, device.busy_seconds) == (100, 7)
    now[0] = 110.0
    end.set()
    assert await call == "done"
    now[0] = 150.0
    assert (device.busy_since, device.busy_seconds, device.last_progress) == (None, 10, 110)
    device.close()

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from daemon.executor.device_thread import THREAD_CLOCKS, DeviceThread


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


async def test_processor_time_is_that_of_the_thread_alone():
    device = DeviceThread()
    assert device.cpu_seconds == 0

    def burn(seconds: float) -> None:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    await device.call(lambda: burn(0.2))
    used = device.cpu_seconds
    assert 0.2 <= used < 0.6 or not THREAD_CLOCKS
    burn(0.2)
    assert device.cpu_seconds == pytest.approx(used, abs=0.05)
    device.close()
    assert device.cpu_seconds == pytest.approx(used, abs=0.05)

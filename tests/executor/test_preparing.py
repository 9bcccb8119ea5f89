from __future__ import annotations

import asyncio
import threading

from daemon.executor import preparing
from daemon.executor.device_thread import DeviceThread


async def test_a_batch_waits_for_the_pieces_under_way_only():
    device, gate, done = DeviceThread(), threading.Event(), []

    def piece(number: int):
        return lambda: (gate.wait(10), done.append(number))

    pieces = [piece(number) for number in range(9)]
    async with preparing.preparing(device, pieces):
        await asyncio.sleep(0)  # the first ones are asked for
        batch = asyncio.create_task(device.call(lambda: sorted(done)))
        await asyncio.sleep(0)
        gate.set()
        before = await batch
        while len(done) < len(pieces):
            await device.call(lambda: None)
    device.close()
    assert before == [0, 1]
    assert sorted(done) == list(range(9))


async def test_the_end_waits_for_no_piece_that_has_not_begun():
    device, done = DeviceThread(), []
    begun, gate = threading.Event(), threading.Event()

    def piece() -> None:
        begun.set()
        gate.wait(10)
        done.append(1)

    async with preparing.preparing(device, [piece] * 50):
        await asyncio.to_thread(begun.wait, 10)
    gate.set()
    device.close()
    assert len(done) <= preparing.PIECES


def test_pieces_stop_once_they_took_their_time(monkeypatch):
    done: list[int] = []
    pieces = [lambda number=number: done.append(number) for number in range(10)]
    preparing.prepare_all(pieces)
    assert sorted(done) == list(range(10))
    done.clear()
    monkeypatch.setattr(preparing, "MAX_SECONDS", 0.0)
    preparing.prepare_all(pieces)
    assert sorted(done) == [0, 1]

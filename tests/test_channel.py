from __future__ import annotations

import asyncio

import pytest

from daemon.channel import Channel, EndOfStream


async def settled(task: asyncio.Task[None]) -> bool:
    """Whether a task finished after everything that can run has run."""
    for _ in range(10):
        await asyncio.sleep(0)
    return task.done()


async def test_put_waits_until_the_weight_fits():
    channel: Channel[str] = Channel(10)
    await channel.put("a", 6)
    waiting = asyncio.create_task(channel.put("b", 6))
    assert not await settled(waiting)
    assert await channel.get() == "a"
    assert await settled(waiting)
    assert channel.weight == 6


async def test_a_channel_can_be_filled_exactly_to_its_capacity():
    channel: Channel[str] = Channel(10)
    await channel.put("a", 6)
    exactly = asyncio.create_task(channel.put("b", 4))
    assert await settled(exactly)
    assert channel.weight == 10
    over = asyncio.create_task(channel.put("c", 1))
    assert not await settled(over)
    assert await channel.get() == "a"
    assert await settled(over)


async def test_an_item_weighs_one_unless_told():
    channel: Channel[str] = Channel(2)
    await channel.put("a")
    assert await settled(asyncio.create_task(channel.put("b")))
    assert channel.weight == 2
    over = asyncio.create_task(channel.put("c"))
    assert not await settled(over)
    over.cancel()


async def test_an_item_over_the_capacity_passes_alone():
    channel: Channel[str] = Channel(10)
    await channel.put("huge", 100)
    waiting = asyncio.create_task(channel.put("next", 1))
    assert not await settled(waiting)
    assert await channel.get() == "huge"
    await waiting


async def test_closing_ends_the_stream_after_what_is_in_it():
    channel: Channel[int] = Channel(10)
    for item in range(3):
        await channel.put(item)
    await channel.close()
    assert [item async for item in channel] == [0, 1, 2]
    with pytest.raises(EndOfStream):
        await channel.get()


async def test_a_waiting_receiver_wakes_on_close():
    channel: Channel[int] = Channel(10)
    receiver = asyncio.create_task(channel.get())
    await asyncio.sleep(0)
    await channel.close()
    with pytest.raises(EndOfStream):
        await receiver


async def test_get_nowait_never_waits():
    channel: Channel[int] = Channel(10)
    assert channel.get_nowait() is None
    await channel.put(7)
    await channel.close()
    assert not channel.ended
    assert channel.get_nowait() == 7
    assert channel.ended
    with pytest.raises(EndOfStream):
        channel.get_nowait()


async def test_one_item_is_a_batch_unless_told():
    channel: Channel[int] = Channel(10)
    await channel.put(1)
    async with asyncio.timeout(5):
        assert await anext(channel.batches(wait_seconds=60)) == [1]


async def test_a_batch_leaves_all_its_room():
    channel: Channel[int] = Channel(10)
    await channel.put_all([(1, 3), (2, 4)])
    assert await anext(channel.batches()) == [1, 2]
    assert channel.weight == 0


async def test_a_batch_waits_for_company_until_it_is_enough():
    channel: Channel[int] = Channel(10)
    batches = channel.batches(lambda: 2, wait_seconds=60)
    await channel.put(1)
    waiting = asyncio.ensure_future(anext(batches))
    assert not await settled(waiting)
    await channel.put(2)
    assert await waiting == [1, 2]


async def test_a_batch_waits_for_company_no_longer_than_told():
    channel: Channel[int] = Channel(10)
    await channel.put(1)
    assert await anext(channel.batches(lambda: 2, wait_seconds=0.01)) == [1]


@pytest.mark.parametrize("capacity", [1, 10])
async def test_a_batch_waits_for_no_company_that_cannot_come(capacity):
    channel: Channel[int] = Channel(capacity)
    await channel.put(1)
    if capacity > 1:
        await channel.close()
    async with asyncio.timeout(5):
        assert await anext(channel.batches(lambda: 2, wait_seconds=60)) == [1]


async def test_senders_that_wait_do_not_wake_each_other():
    channel: Channel[int] = Channel(1)
    await channel.put(0)
    wakes = 0
    wake = channel._wake

    def counted() -> None:
        nonlocal wakes
        wakes += 1
        wake()

    channel._wake = counted  # type: ignore[method-assign]
    senders = [asyncio.create_task(channel.put_all([(number, 1)])) for number in range(8)]
    for _ in range(100):
        await asyncio.sleep(0)
    assert wakes == 8
    taken = [await channel.get() for _ in range(9)]
    await asyncio.gather(*senders)
    assert sorted(taken) == [0, 0, 1, 2, 3, 4, 5, 6, 7]

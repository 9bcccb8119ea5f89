"""The executor of one process, with a runner that is a fake."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from daemon.errors import OutOfMemory
from daemon.executor.device_thread import DeviceThread
from daemon.executor.local import OVERLAPPED_SLOTS, LocalExecutor
from tests.support.fakes import INFO


class FakeRunner:
    """Notes what is called; a batch is its number, and its result ten times that."""

    def __init__(self, *, can_overlap: bool, errors: dict[str, Exception] | None = None) -> None:
        self.info = INFO
        self.can_overlap = can_overlap
        self.calls: list[str] = []
        self.threads: set[str] = set()
        self.go = threading.Event()
        self._errors = errors or {}

    def _call(self, name: str, batch: int) -> None:
        self.threads.add(threading.current_thread().name)
        self.calls.append(f"{name} {batch}")
        if error := self._errors.pop(self.calls[-1], None):
            raise error

    def run(self, batch: int) -> int:
        self._call("run", batch)
        return 10 * batch

    def begin(self, batch: int) -> int:
        self.go.wait(60)
        self._call("begin", batch)
        return batch

    def finish(self, batch: int) -> int:
        self._call("finish", batch)
        return 10 * batch


@pytest.fixture
def device():
    device = DeviceThread()
    yield device
    device.close()


async def run_all(executor: LocalExecutor, runner: FakeRunner, n: int) -> list[int | BaseException]:
    """Hand in n batches at once, before the first of them begins."""
    tasks = [asyncio.create_task(executor.compute(number)) for number in range(1, n + 1)]
    await asyncio.sleep(0)
    runner.go.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_on_a_cpu_one_batch_runs_at_a_time_on_the_device_thread(device):
    runner = FakeRunner(can_overlap=False)
    executor = LocalExecutor(device, runner)
    assert (executor.slots, executor.info) == (1, INFO)
    assert await run_all(executor, runner, 3) == [10, 20, 30]
    assert runner.calls == ["run 1", "run 2", "run 3"]
    assert runner.threads == {"device"}


async def test_on_a_gpu_a_batch_begins_before_the_one_ahead_is_read_out(device):
    runner = FakeRunner(can_overlap=True)
    executor = LocalExecutor(device, runner)
    assert executor.slots == OVERLAPPED_SLOTS
    assert await run_all(executor, runner, 3) == [10, 20, 30]
    assert runner.calls == ["begin 1", "begin 2", "finish 1", "begin 3", "finish 2", "finish 3"]
    assert runner.threads == {"device"}


async def test_a_batch_that_none_follows_is_read_out_at_once(device):
    runner = FakeRunner(can_overlap=True)
    executor = LocalExecutor(device, runner)
    assert await run_all(executor, runner, 1) == [10]
    assert await executor.compute(7) == 70
    assert runner.calls == ["begin 1", "finish 1", "begin 7", "finish 7"]


@pytest.mark.parametrize("where", ["begin 2", "finish 1"])
async def test_two_batches_that_memory_does_not_hold_fail_together_and_then_run_one_by_one(device, where):
    runner = FakeRunner(can_overlap=True, errors={where: MemoryError("not enough memory")})
    executor = LocalExecutor(device, runner)
    first, second = await run_all(executor, runner, 2)
    for error in (first, second):
        assert isinstance(error, OutOfMemory)
        assert error.shared
    assert executor.slots == 1
    assert [await executor.compute(1), await executor.compute(2)] == [10, 20]
    assert runner.calls[-2:] == ["run 1", "run 2"]


async def test_a_batch_that_was_alone_and_too_large_keeps_the_slots(device):
    runner = FakeRunner(can_overlap=True, errors={"begin 1": MemoryError("not enough memory")})
    executor = LocalExecutor(device, runner)
    (error,) = await run_all(executor, runner, 1)
    assert isinstance(error, OutOfMemory)
    assert not error.shared
    assert executor.slots == OVERLAPPED_SLOTS
    assert await executor.compute(2) == 20


async def test_a_bug_comes_to_everyone_whose_batch_was_on_the_device(device):
    runner = FakeRunner(can_overlap=True, errors={"finish 1": ValueError("a bug")})
    executor = LocalExecutor(device, runner)
    first, second, third = await run_all(executor, runner, 3)
    assert isinstance(first, ValueError)
    assert second is first
    assert third == 30


async def test_a_batch_under_way_when_overlap_ends_is_answered():
    """Four batches at a time, of which one does not fit beside another: none is forgotten."""

    class Runner:
        can_overlap = True

        def __init__(self) -> None:
            self.under_way = 0
            self.failed = False

        def begin(self, batch: int) -> int:
            if self.under_way and not self.failed:
                self.failed = True
                raise MemoryError("not enough memory")
            self.under_way += 1
            return batch

        def finish(self, batch: int) -> str:
            self.under_way -= 1
            return f"result {batch}"

        def run(self, batch: int) -> str:
            return f"result {batch}"

    device = DeviceThread()
    executor = LocalExecutor(device, Runner())  # type: ignore[arg-type]
    numbers, answered = iter(range(20)), set()

    async def slot() -> None:
        for number in numbers:
            while number not in answered:
                with contextlib.suppress(OutOfMemory):
                    assert await executor.compute(number) == f"result {number}"  # type: ignore[arg-type]
                    answered.add(number)

    async with asyncio.timeout(60):
        await asyncio.gather(*(slot() for _ in range(4)))
    assert answered == set(range(20))
    device.close()

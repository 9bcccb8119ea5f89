"""The main loop between a source, an executor and a sink that are fakes."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable

import pytest

from daemon.batching.batcher import Batcher
from daemon.errors import MachineError, OutOfMemory, SyncFailed
from daemon.pipeline import Limits, Pipeline
from daemon.records import PartExtent
from tests.support.fakes import (
    Event,
    FakeExecutor,
    FakeFile,
    FakeObserver,
    FakeSink,
    FakeSource,
    FakeTokenizer,
)

LIMITS = Limits(queued_text_bytes=1 << 20, queued_tokens=1000, queued_result_bytes=1 << 20, max_attempts=3)


class Loop:
    """A pipeline of fakes. `tokens` is the batcher's limit."""

    def __init__(
        self,
        *groups: list[FakeFile],
        executor: FakeExecutor | None = None,
        published: tuple[str, ...] = (),
        extents: dict[str, dict[int, PartExtent]] | None = None,
        tokens: int = 4,
        limits: Limits = LIMITS,
    ) -> None:
        self.events: list[Event] = []
        self.executor = executor or FakeExecutor()
        self.source = FakeSource(*groups, events=self.events)
        self.sink = FakeSink(events=self.events, published=published, extents=extents)
        self.observer = FakeObserver()
        self.stop = asyncio.Event()
        self.pipeline = Pipeline(
            self.source,
            self.executor,
            self.sink,
            tokenizer=FakeTokenizer(),
            batcher=Batcher(tokens, shares_prefixes=False),
            observer=self.observer,
            limits=limits,
        )

    async def drain(self) -> Loop:
        async with asyncio.timeout(60):
            await self.pipeline.run(self.stop, once=True)
        return self

    @property
    def ends(self) -> list[tuple[str, str]]:
        return [(outcome.name, outcome.kind) for outcome in self.observer.outcomes]

    def index(self, *event: str) -> int:
        return self.events.index(event)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


def letters(n: int) -> list[str]:
    return [chr(97 + i % 26) for i in range(n)]


@pytest.mark.parametrize("slots", [1, 2, 5])
async def test_each_record_comes_to_the_sink_once_however_many_slots_there_are(slots):
    files = [FakeFile(f"f{n}", letters(n), per_part=3) for n in range(1, 20)]
    loop = await Loop(files[:7], files[7:], executor=FakeExecutor(slots)).drain()
    assert sorted(loop.ends) == sorted((file.name, "committed") for file in files)
    for file in files:
        assert loop.sink.results[file.name].records == dict.fromkeys(range(len(file.texts)), 1)
    assert 1 <= loop.executor.most_at_a_time <= slots


async def test_batches_may_end_in_any_order():
    files = [FakeFile(f"f{n}", letters(9), per_part=4) for n in range(8)]
    executor = FakeExecutor(4, hold=True)
    loop = Loop(files, executor=executor)
    task = asyncio.create_task(loop.drain())
    rng = random.Random(7)
    while not task.done():
        await asyncio.sleep(0.001)
        if executor.running:
            executor.release(rng.choice([*executor._running]))
    await task
    for file in files:
        assert loop.sink.results[file.name].records == dict.fromkeys(range(9), 1)


async def test_a_free_slot_takes_a_batch_and_a_full_executor_none():
    executor = FakeExecutor(2, hold=True)
    loop = Loop([FakeFile("f", letters(40), per_part=40)], executor=executor)
    task = asyncio.create_task(loop.drain())
    await until(lambda: executor.running == 2)
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(executor.batches) == 2
    executor.release(1)
    await until(lambda: len(executor.batches) == 3)
    assert executor.running == 2
    for number in (0, *range(2, 10)):
        await until(lambda number=number: len(executor.batches) > number)
        executor.release(number)
    await task
    assert executor.most_at_a_time == 2


async def test_a_partial_batch_does_not_wait_where_nothing_more_fits():
    """With a window of one token, and a source that has more to give."""
    limits = dataclasses.replace(LIMITS, queued_tokens=1)
    files = [[FakeFile(f"f{n}", letters(3), per_part=1)] for n in range(4)]
    loop = await Loop(*files, tokens=100, limits=limits).drain()
    assert [len(batch.entries) for batch in loop.executor.batches] == [1] * 12


async def test_a_partial_batch_waits_for_samples_that_are_on_their_way():
    loop = await Loop([FakeFile("f", letters(12), per_part=1)], tokens=100).drain()
    assert [len(batch.entries) for batch in loop.executor.batches] == [12]


async def test_results_are_on_disk_before_they_are_visible_and_visible_before_the_source_hears():
    loop = await Loop([FakeFile("f", letters(3))]).drain()
    order = [loop.index(step, "f") for step in ("flush", "recheck", "publish", "done", "forget")]
    assert order == sorted(order)


async def test_the_same_content_under_two_names_is_computed_once():
    loop = await Loop([FakeFile("a", ["x"], "same"), FakeFile("b", ["x"], "same")]).drain()
    assert loop.ends == [("a", "committed"), ("b", "duplicate")]
    assert loop.observer.batches == 1
    assert loop.index("confirm") < loop.index("done", "b")


async def test_what_is_published_is_not_read_again():
    loop = await Loop([FakeFile("a", ["x"])], published=("a",)).drain()
    assert loop.ends == [("a", "duplicate")]
    assert loop.observer.parts == 0


async def test_parts_of_an_earlier_attempt_are_not_computed_again():
    kept = {"f": {0: PartExtent(0, 0, 2, 0), 1: PartExtent(1, 99, 2, 0)}}
    loop = await Loop([FakeFile("f", letters(5))], extents=kept).drain()
    assert loop.ends == [("f", "committed")]
    assert loop.sink.results["f"].records == {2: 1, 3: 1, 4: 1}


@pytest.mark.parametrize("breaks_after", [0, 1, 2])
async def test_a_file_that_breaks_fails_once_its_parts_have_come(breaks_after):
    broken = FakeFile("bad", letters(4), breaks_after=breaks_after)
    loop = await Loop([broken, FakeFile("good", letters(4))]).drain()
    assert sorted(loop.ends) == [("bad", "failed"), ("good", "committed")]
    assert loop.index("forget", "bad") < loop.index("failed", "bad", "structure")
    assert "bad" not in loop.sink.results


async def test_a_file_that_can_not_be_opened_fails_alone():
    loop = await Loop([FakeFile("bad", [], unreadable=True), FakeFile("good", ["x"])]).drain()
    assert loop.ends == [("bad", "failed"), ("good", "committed")]


async def test_a_file_that_changed_is_put_back_and_read_again():
    loop = await Loop([FakeFile("f", letters(3), presence="changed"), FakeFile("g", letters(3))]).drain()
    assert sorted(loop.ends) == [("f", "committed"), ("f", "requeued"), ("g", "committed")]
    assert loop.index("forget", "f") < loop.index("given back", "f") < loop.index("publish", "f")


async def test_a_file_that_vanished_fails_and_publishes_nothing():
    loop = await Loop([FakeFile("f", letters(3), presence="gone")]).drain()
    assert loop.ends == [("f", "failed")]
    assert loop.observer.outcomes[0].reason == "vanished"
    assert loop.sink.results == {}


async def test_a_file_begun_too_often_is_not_read():
    loop = await Loop([FakeFile("f", letters(3), attempt=4)]).drain()
    assert loop.ends == [("f", "failed")]
    assert loop.observer.outcomes[0].reason == "attempts_exhausted"
    assert loop.observer.parts == 0


async def test_a_file_begun_before_runs_while_nothing_else_does():
    executor = FakeExecutor(4, hold=True)
    suspect = FakeFile("s", ["s", "s", "s"], attempt=2, per_part=1)
    loop = Loop(
        [FakeFile("a", letters(3))], [suspect], [FakeFile("b", letters(3))], executor=executor, tokens=1
    )
    task = asyncio.create_task(loop.drain())
    while not task.done():
        await asyncio.sleep(0.001)
        units = {
            entry.part.part.file.unit
            for number in executor._running
            for entry in executor.batches[number].entries
        }
        assert units in (set(), {"a"}, {"s"}, {"b"})
        for number in [*executor._running]:
            executor.release(number)
    assert [name for name, _ in (await task).ends] == ["a", "s", "b"]


async def test_a_batch_too_large_comes_back_as_smaller_ones():
    loop = await Loop(
        [FakeFile("f", letters(8), per_part=8)], executor=FakeExecutor(errors=[OutOfMemory("x")]), tokens=8
    ).drain()
    assert loop.sink.results["f"].records == dict.fromkeys(range(8), 1)
    assert [len(batch.entries) for batch in loop.executor.batches] == [8, 4, 4]
    assert loop.observer.limits == [4]


async def test_a_sample_too_large_by_itself_is_a_reject():
    executor = FakeExecutor(errors=[OutOfMemory("x")])
    loop = await Loop([FakeFile("f", ["a", "b"], per_part=1)], executor=executor, tokens=1).drain()
    unit = loop.sink.results["f"]
    assert (unit.records, unit.rejects) == ({1: 1}, [0])
    assert loop.observer.limits == [None]


async def test_a_batch_that_shared_the_device_is_tried_again_as_it_is():
    executor = FakeExecutor(2, errors=[OutOfMemory("x", shared=True)])
    loop = await Loop([FakeFile("f", letters(4), per_part=4)], executor=executor).drain()
    assert loop.sink.results["f"].records == dict.fromkeys(range(4), 1)
    assert [len(batch.entries) for batch in executor.batches] == [4, 4]
    assert loop.observer.limits == [4]


@pytest.mark.parametrize(
    ("error", "given_back"),
    [
        (ValueError("a bug"), [("closed",)]),
        (MachineError("no disk"), [("closed",), ("given back all", "flushed")]),
        (SyncFailed("no disk"), [("closed",), ("given back all", "not flushed")]),
    ],
    ids=["a bug", "the machine", "a failed sync"],
)
@pytest.mark.parametrize("slots", [1, 3])
async def test_an_error_ends_the_run_and_gives_back_unless_it_is_a_bug(error, given_back, slots):
    loop = Loop([FakeFile("f", letters(9))], executor=FakeExecutor(slots, errors=[error]))
    with pytest.raises(ExceptionGroup) as caught:
        await loop.drain()
    assert caught.group_contains(type(error), match=str(error))
    assert loop.events == given_back


async def test_a_cancelled_run_gives_back():
    loop = Loop([FakeFile("f", letters(9))], executor=FakeExecutor(hold=True))
    task = asyncio.create_task(loop.pipeline.run(loop.stop, once=True))
    await until(lambda: loop.executor.running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert loop.events == [("closed",), ("given back all", "flushed")]


async def test_what_was_taken_is_finished_after_stop():
    executor = FakeExecutor(hold=True)
    loop = Loop([FakeFile("f", letters(8), per_part=4)], executor=executor)
    task = asyncio.create_task(loop.pipeline.run(loop.stop, once=False))
    await until(lambda: executor.running == 1)
    loop.stop.set()
    executor.release(0)
    await until(lambda: len(executor.batches) == 2)
    executor.release(1)
    await asyncio.wait_for(task, 60)
    assert loop.ends == [("f", "committed")]

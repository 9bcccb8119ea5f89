"""Workers of a cluster in this process: who is given which batch, and what becomes of those of lost ones."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable

import pytest

pytest.importorskip("ray")

from daemon.analysis.column_inputs import StudySettings
from daemon.batching.batcher import Batcher
from daemon.errors import ConfigError, MachineError, OutOfMemory, WorkersDied
from daemon.executor import crew as crew_module
from daemon.executor.crew import Crew
from daemon.executor.ray import RayExecutor
from daemon.executor.worker import Build
from daemon.pause import WORKERS, Pause
from daemon.pipeline import Limits, Pipeline
from daemon.recipes import PLAIN_RECIPE
from daemon.records import Batch, Entry, Part, PartExtent, Sample, TokenizedPart, TokenizedSample
from tests.support.fakes import FakeFile, FakeObserver, FakeSink, FakeSource, FakeTokenizer
from tests.support.ray_cluster import FakeActor, FakeCluster, Reference
from tests.support.sources import unclaimed

LIMITS = Limits(queued_text_bytes=1 << 20, queued_tokens=1000, queued_result_bytes=1 << 20, max_attempts=3)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    for name in ("LOOK_SECONDS", "RETRY_SECONDS", "MAX_RETRY_SECONDS"):
        monkeypatch.setattr(crew_module, name, 0.001)


class Events:
    def __init__(self) -> None:
        self.restarts: list[int] = []
        self.computed: list[tuple[int, int]] = []

    def worker_restarted(self, number: int) -> None:
        self.restarts.append(number)

    def worker_computed(self, number: int, samples: int, busy_seconds: float) -> None:
        self.computed.append((number, samples))


class Workers:
    """An executor and the cluster that it works with."""

    def __init__(self, cluster: FakeCluster, *, patient: bool = True, stall_seconds: float = 60.0) -> None:
        self.cluster = cluster
        self.events = Events()
        self.pause = Pause(patient=patient)
        self.crew = Crew(
            cluster,  # type: ignore[arg-type]
            lambda measures: pytest.fail("nothing is loaded in this process"),
            pause=self.pause,
            patient=patient,
            stall_seconds=lambda: stall_seconds,
            events=self.events,
        )
        self.executor = RayExecutor(self.crew, self.events)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[RayExecutor]:
        async with asyncio.timeout(60), self.crew.running():
            yield self.executor


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def batch_of(n: int, suspect: bool = False) -> Batch:
    samples = tuple(Sample(i, f"s{i}", None, None, "{}", ("text",), 1, 0) for i in range(n))
    part = Part(unclaimed("f"), PartExtent(0, 0, n, 0), True, PLAIN_RECIPE, samples, ())
    tokenized = TokenizedPart(part, tuple(TokenizedSample(sample, ((1, 2),)) for sample in samples))
    return Batch(PLAIN_RECIPE, tuple(Entry(tokenized, row) for row in range(n)), suspect)


def starts(executor: RayExecutor, *batches: Batch) -> list[asyncio.Task]:
    return [asyncio.create_task(executor.run(batch)) for batch in batches]


async def test_batches_go_to_the_worker_with_the_fewest_and_carry_no_text():
    cluster = FakeCluster(2)
    async with Workers(cluster).running() as executor:
        await until(lambda: executor.slots == 4)
        tasks = starts(executor, *(batch_of(n) for n in (1, 2, 3, 4)))
        await until(lambda: all(len(actor.batches) == 2 for actor in cluster.actors))
        for actor in cluster.actors:
            for batch, _ in actor.batches:
                assert {sample.sample.texts for sample in batch.samples} == {()}
                assert {sample.sample.extra for sample in batch.samples} == {None}
        for actor in cluster.actors * 2:
            actor.finish()
        assert [result.n_samples for result in await asyncio.gather(*tasks)] == [1, 2, 3, 4]


async def test_it_is_ready_with_the_first_worker_and_others_join():
    cluster = FakeCluster(3)
    workers = Workers(cluster)
    async with workers.running() as executor:
        assert executor.slots >= 2
        await executor.more_slots(5)
        assert executor.slots == 6
        assert [load.state for load in executor.workers()] == ["ready"] * 3


async def test_batches_of_a_lost_worker_run_on_another_alone():
    cluster = FakeCluster(2)
    workers = Workers(cluster)
    async with workers.running() as executor:
        await until(lambda: executor.slots == 4)
        tasks = starts(executor, *(batch_of(n) for n in (1, 2, 3)))
        await until(lambda: sum(len(actor.batches) for actor in cluster.actors) == 3)
        (lost,) = (actor for actor in cluster.actors if len(actor.batches) == 2)
        other = next(actor for actor in cluster.actors if actor is not lost)
        lost.die()
        await until(lambda: len(cluster.living) == 2)
        other.finish()
        await until(lambda: sum(len(actor.batches) for actor in cluster.living) == 2)
        assert [len(actor.batches) for actor in cluster.living] == [1, 1]  # each alone
        for actor in cluster.living:
            actor.finish()
        assert [result.n_samples for result in await asyncio.gather(*tasks)] == [1, 2, 3]
    assert len(workers.events.restarts) == 1
    assert sorted(samples for _, samples in workers.events.computed) == [1, 2, 3]


async def test_nothing_else_is_given_to_the_worker_of_a_suspect_batch():
    cluster = FakeCluster(1)
    async with Workers(cluster).running() as executor:
        suspect, other = starts(executor, batch_of(1, suspect=True), batch_of(2))
        await until(lambda: cluster.actors[0].batches)
        await asyncio.sleep(0.01)
        assert len(cluster.actors[0].batches) == 1
        cluster.actors[0].finish()
        assert (await suspect).n_samples == 1
        await until(lambda: cluster.actors[0].batches)
        cluster.actors[0].finish()
        assert (await other).n_samples == 2


@pytest.mark.parametrize(
    ("batch", "deaths"), [(batch_of(4), 2), (batch_of(4, suspect=True), 1), (batch_of(1, suspect=True), 3)]
)
async def test_a_batch_of_which_workers_die_is_told(batch, deaths):
    cluster = FakeCluster(1)
    cluster.kills = lambda batch: True
    async with Workers(cluster).running() as executor:
        with pytest.raises(WorkersDied, match="died"):
            await executor.run(batch)
        assert sum("run" in actor.calls for actor in cluster.actors) == deaths


async def test_a_worker_lost_with_two_batches_charges_neither():
    cluster = FakeCluster(1)
    async with Workers(cluster).running() as executor:
        tasks = starts(executor, batch_of(1), batch_of(2))
        for number in range(2):
            await until(lambda number=number: len(cluster.actors) > number and cluster.actors[number].batches)
            await until(lambda number=number: len(cluster.actors[number].batches) == 2 - number)
            cluster.actors[number].die()
        for _ in tasks:
            await until(lambda: cluster.living and cluster.living[0].batches)
            cluster.living[0].finish()
        assert [result.n_samples for result in await asyncio.gather(*tasks)] == [1, 2]


async def test_a_sample_that_kills_workers_is_set_aside_alone():
    cluster = FakeCluster(2)
    cluster.kills = lambda batch: any(sample.sample.record_index == 5 for sample in batch.samples)
    cluster.answers = lambda batch: not cluster.kills(batch)
    source = FakeSource([FakeFile("a", list("abcdefgh"), per_part=8)], events=[])
    sink, observer = FakeSink(events=[]), FakeObserver()
    async with Workers(cluster).running() as executor:
        pipeline = Pipeline(
            source,
            executor,
            sink,
            tokenizer=FakeTokenizer(),
            batcher=Batcher(8, shares_prefixes=False),
            observer=observer,
            limits=LIMITS,
        )
        await pipeline.run(asyncio.Event(), once=True)
    assert [(outcome.name, outcome.kind) for outcome in observer.outcomes] == [("a", "committed")]
    assert sink.results["a"].records == {number: 1 for number in range(8) if number != 5}
    assert sink.results["a"].rejects == [5]
    assert observer.deaths == [8, 4, 2, 1]


async def test_a_worker_that_ends_no_batch_is_replaced():
    cluster = FakeCluster(1)
    workers = Workers(cluster, stall_seconds=0.05)
    async with workers.running() as executor:
        (task,) = starts(executor, batch_of(3))
        await until(lambda: len(cluster.actors) == 2 and cluster.actors[1].batches)
        assert not cluster.actors[0].alive
        cluster.actors[1].finish()
        assert (await task).n_samples == 3
    assert workers.events.restarts == [0]


async def test_an_idle_worker_that_is_lost_is_replaced():
    cluster = FakeCluster(1)
    workers = Workers(cluster)
    async with workers.running() as executor:
        cluster.actors[0].die()
        await until(lambda: len(cluster.living) == 1 and executor.slots == 2)
    assert workers.events.restarts == [0]


async def test_memory_that_a_worker_lacks_is_told_as_it_is_here():
    cluster = FakeCluster(1)
    async with Workers(cluster).running() as executor:
        (task,) = starts(executor, batch_of(3))
        await until(lambda: cluster.actors[0].batches)
        cluster.actors[0].finish(OutOfMemory("not enough"))
        with pytest.raises(OutOfMemory, match="not enough"):
            await task
        assert len(cluster.actors) == 1


async def test_a_lost_cluster_is_connected_to_again_and_its_batches_run_there():
    cluster = FakeCluster(2)
    workers = Workers(cluster)
    async with workers.running() as executor:
        await until(lambda: executor.slots == 4)
        tasks = starts(executor, batch_of(1), batch_of(2), batch_of(3))
        await until(lambda: sum(len(actor.batches) for actor in cluster.actors) == 3)
        cluster.die()
        cluster.answers = lambda batch: True
        assert [result.n_samples for result in await asyncio.gather(*tasks)] == [1, 2, 3]
        assert cluster.connections == 2


async def test_workers_join_and_leave_while_batches_run():
    cluster = FakeCluster(1)
    cluster.answers = lambda batch: True
    workers = Workers(cluster)
    async with workers.running() as executor:
        assert (await executor.run(batch_of(1))).n_samples == 1
        cluster.workers = 3
        await executor.more_slots(5)
        cluster.answers = lambda batch: False
        tasks = starts(executor, *(batch_of(n) for n in (1, 2, 3)))
        await until(lambda: all(actor.batches for actor in cluster.actors))
        cluster.workers = 1
        await until(lambda: [load.state for load in executor.workers()] == ["ready", "draining", "draining"])
        assert executor.slots == 4  # two, and the batches of those that are wanted no more
        assert len(cluster.living) == 3  # they end their batches first
        for actor in cluster.actors:
            actor.finish()
        assert [result.n_samples for result in await asyncio.gather(*tasks)] == [1, 2, 3]
        await until(lambda: len(cluster.living) == 1)
        await until(lambda: [load.number for load in executor.workers()] == [0])
    assert workers.events.restarts == []


async def test_workers_of_a_lost_cluster_are_wanted_and_not_ready():
    cluster = FakeCluster(2)
    workers = Workers(cluster)
    assert workers.executor.workers_wanted == 0
    async with workers.running() as executor:
        await until(lambda: executor.slots == 4)
        refused = asyncio.Event()

        def connect() -> None:
            refused.set()
            raise MachineError("no answer")

        cluster.connect = connect  # type: ignore[method-assign]
        cluster.die()
        await refused.wait()
        assert executor.workers_wanted == 2
        assert [load.state for load in executor.workers()] == ["starting"] * 2


async def test_a_daemon_waits_for_a_cluster_that_is_not_there():
    cluster = FakeCluster(1, unreachable=5)
    workers = Workers(cluster)
    told = []
    hold = workers.pause.hold
    workers.pause.hold = lambda reason, message: (told.append((reason, message)), hold(reason, message))  # type: ignore[method-assign]
    async with workers.running() as executor:
        assert executor.slots == 2
        assert workers.pause.reasons == {}
    assert (WORKERS, "the fake cluster: no answer") in told


async def test_a_drain_does_not_wait_for_a_cluster_that_is_not_there():
    with pytest.raises(MachineError, match="the fake cluster: no answer"):
        async with Workers(FakeCluster(1, unreachable=1), patient=False).running():
            pytest.fail("there is no cluster")


@pytest.mark.parametrize("patient", [True, False])
async def test_a_model_that_cannot_be_had_ends_the_start(patient):
    cluster = FakeCluster(2)
    cluster.errors["load"] = ConfigError("no such model")
    with pytest.raises(ConfigError, match="no such model"):
        async with Workers(cluster, patient=patient).running():
            pytest.fail("there is no model")
    assert cluster.living == []


async def test_workers_of_another_build_are_refused():
    cluster = FakeCluster(1)
    cluster.build = dataclasses.replace(Build.here(), lensd="0.0.1")
    with pytest.raises(MachineError, match=r"node\d runs lensd 0\.0\.1 .*: install the same"):
        async with Workers(cluster, patient=False).running():
            pytest.fail("it is another one")


async def test_a_daemon_waits_for_workers_of_its_own_build():
    cluster = FakeCluster(1)
    cluster.build = dataclasses.replace(Build.here(), torch="0.1")
    workers = Workers(cluster)

    async def mend() -> None:
        await until(lambda: workers.pause.reasons)
        assert "install the same" in workers.pause.reasons[WORKERS]
        cluster.build = Build.here()

    mending = asyncio.create_task(mend())
    async with workers.running() as executor:
        assert executor.slots == 2
        assert workers.pause.reasons == {}
    await mending


async def test_a_worker_with_another_model_is_not_used():
    cluster = FakeCluster(1)
    workers = Workers(cluster)
    async with workers.running() as executor:
        info = dataclasses.replace(cluster.ready.info, weights_sha256="another")
        cluster.ready = dataclasses.replace(cluster.ready, info=info)
        cluster.workers = 2
        await until(lambda: len(cluster.actors) > 3)
        assert executor.slots == 2
        assert {load.state for load in executor.workers()} == {"ready", "starting"}


async def test_a_cluster_without_room_ends_a_drain(monkeypatch):
    monkeypatch.setattr(crew_module, "START_SECONDS", 0.001)
    monkeypatch.setattr(FakeActor, "_call", lambda *_: Reference())  # nothing starts
    cluster = FakeCluster(1)
    cluster.rooms = 0
    with pytest.raises(MachineError, match="has no node for a worker, which takes 1 CPU: add one"):
        async with Workers(cluster, patient=False).running():
            pytest.fail("there is no place")


async def test_settings_reach_the_workers_of_now_and_those_to_come():
    cluster = FakeCluster(1)
    settings = StudySettings(
        positions="last", seed=1, noise_sigma=0.1, noise_draws=8, stability_top_k=10, entropy_top_k=50
    )
    async with Workers(cluster).running() as executor:
        await executor.restudy(settings)
        cluster.workers = 2
        await executor.more_slots(2)
        assert [actor.calls.count("restudy") for actor in cluster.actors] == [1, 1]


async def test_nothing_is_left_running_at_the_end():
    cluster = FakeCluster(3)
    async with Workers(cluster).running() as executor:
        await until(lambda: executor.slots == 6)
    assert cluster.living == []
    assert not cluster.is_alive


async def test_a_model_that_the_first_worker_cannot_have_ends_the_start_though_another_has_one():
    cluster = FakeCluster(2)
    cluster.ready = dataclasses.replace(cluster.ready, max_batch_tokens=0)  # the one that measures is not yet
    workers = Workers(cluster)
    starting = asyncio.create_task(_start(workers))
    await until(lambda: workers.executor.slots == 4)
    cluster.errors["load"] = ConfigError("its file is gone")
    cluster.actors[0].die()
    workers.crew.workers[0].lose("it died")
    with pytest.raises(ConfigError, match="its file is gone"):
        await starting


async def _start(workers: Workers) -> None:
    async with workers.running():
        pytest.fail("nobody measured how many tokens a batch should have")


async def test_a_worker_with_another_model_is_not_used_before_the_batch_size_is_known_either():
    cluster = FakeCluster(2)
    measuring = cluster.ready
    cluster.ready = dataclasses.replace(measuring, max_batch_tokens=0)
    workers = Workers(cluster)
    starting = asyncio.create_task(_start(workers))
    await until(lambda: workers.executor.slots == 4)
    info = dataclasses.replace(measuring.info, weights_sha256="another")
    cluster.ready = dataclasses.replace(measuring, info=info)
    cluster.actors[0].die()
    await until(lambda: len(cluster.actors) > 4)
    assert workers.executor.slots == 2
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)


async def test_the_workers_that_are_ready_are_kept_where_fewer_are_wanted():
    cluster = FakeCluster(2)
    async with Workers(cluster).running() as executor:
        await until(lambda: executor.slots == 4)
        cluster.errors["place"] = MachineError("no place any more")
        cluster.workers = 1
        cluster.actors[0].die()
        await until(lambda: [load.number for load in executor.workers()] == [1])
        assert cluster.actors[1].alive


async def test_a_worker_that_is_wanted_again_takes_batches_again():
    cluster = FakeCluster(2)
    async with Workers(cluster).running() as executor:
        await until(lambda: executor.slots == 4)
        tasks = starts(executor, batch_of(1), batch_of(2))
        await until(lambda: all(actor.batches for actor in cluster.actors))
        cluster.workers = 1
        await until(lambda: executor.workers()[1].state == "draining")
        cluster.workers = 2
        await until(lambda: executor.workers()[1].state == "ready")
        assert executor.slots == 4
        for actor in cluster.actors:
            actor.finish()
        await asyncio.gather(*tasks)


async def test_a_stop_ends_the_wait_for_a_cluster():
    workers = Workers(FakeCluster(1, unreachable=10**9))
    starting = asyncio.create_task(_start(workers))
    await until(lambda: workers.pause.reasons)
    workers.pause.give_up()
    with pytest.raises(MachineError, match="no answer"):
        await starting


async def test_a_stop_ends_the_wait_for_workers_of_a_file_under_way():
    cluster = FakeCluster(1)
    workers = Workers(cluster)
    async with workers.running() as executor:
        (task,) = starts(executor, batch_of(1))
        await until(lambda: cluster.actors[0].batches)
        cluster.errors["load"] = MachineError("the disk is gone")
        cluster.actors[0].die()
        await until(lambda: len(cluster.actors) > 2)
        workers.pause.give_up()
        with pytest.raises(MachineError, match="the disk is gone"):
            await task


async def test_a_failed_start_beside_a_reserved_worker_pauses_nothing():
    cluster = FakeCluster(1)
    workers = Workers(cluster)
    async with workers.running() as executor:
        (task,) = starts(executor, batch_of(1, suspect=True))
        await until(lambda: cluster.actors[0].batches)
        cluster.errors["load"] = MachineError("no memory")
        cluster.workers = 2
        await until(lambda: len(cluster.actors) > 4)
        assert workers.pause.reasons == {}
        cluster.actors[0].finish()
        await task


async def test_an_error_of_the_device_costs_the_worker_and_not_the_batch():
    cluster = FakeCluster(1)
    async with Workers(cluster).running() as executor:
        (task,) = starts(executor, batch_of(3))
        await until(lambda: cluster.actors[0].batches)
        cluster.actors[0].finish(RuntimeError("CUDA error: an illegal memory access was encountered"))
        await until(lambda: cluster.living and cluster.living[0].batches)
        cluster.living[0].finish()
        assert (await task).n_samples == 3


async def test_whatever_loading_raises_is_tried_again():
    cluster = FakeCluster(2)
    async with Workers(cluster).running() as executor:
        await until(lambda: executor.slots == 4)
        cluster.errors["load"] = ValueError("a bug")
        cluster.actors[1].die()
        await until(lambda: len(cluster.actors) > 4)
        del cluster.errors["load"]
        await until(lambda: executor.slots == 4)


async def test_a_cancelled_wait_for_a_worker_alone_leaves_it_to_others():
    cluster = FakeCluster(1)
    async with Workers(cluster).running() as executor:
        (first,) = starts(executor, batch_of(1))
        await until(lambda: cluster.actors[0].batches)
        (suspect,) = starts(executor, batch_of(1, suspect=True))
        await until(lambda: executor.slots == 1)
        suspect.cancel()
        await asyncio.gather(suspect, return_exceptions=True)
        assert executor.slots == 2
        cluster.actors[0].finish()
        await first

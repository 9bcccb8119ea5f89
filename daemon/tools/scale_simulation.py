"""A discrete-event simulation of daemons, their workers and the store that they share.

`deploy/ray/SCALE.md` says what it assumes. Knows no measurement: all costs are its `Setup`.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from daemon.tools.scale_setup import Prediction, Setup

PART_SAMPLES = 1024  # a larger file is computed and stored in parts of so many
GROUP_FILES = 256  # claimed or published together, at most
FILE_OPERATIONS = 11  # at the store: two renames, folder, three files, index, and four syncs
PART_OPERATIONS = 4  # create, sync, rename, unlink
FILE_SYNCS, SYNC_THREADS = 4, 16  # one after the other for a file; so many files at a time
GROUP_SYNCS = 3  # of folders, one after the other: the outbox, done/ and the lease
LOCKED_OPERATIONS = 2  # of a file while no other daemon publishes
SLICE_SECONDS = 0.02  # that a daemon's writer computes before it looks whether its loop does, too
READ_SHARE = 0.25  # of a sample's cost at its daemon that falls before it is computed
TAIL_FROM, TAIL_TO, TAIL_POWER = 2.0, 20.0, 1.5  # a Pareto law of how much longer a straggler takes
TAIL_MEAN: float = (TAIL_POWER * TAIL_FROM - TAIL_TO * (TAIL_FROM / TAIL_TO) ** TAIL_POWER) / (TAIL_POWER - 1)
MAX_BATCHES = 60_000  # simulated for a steady rate
SATURATED = 0.9  # share of the time

Process = Iterator[float]  # yields when it goes on


class Clock:
    """Runs processes in the order of time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._next: list[tuple[float, int, Process]] = []
        self._number = itertools.count()

    def start(self, process: Process) -> None:
        heapq.heappush(self._next, (self.now, next(self._number), process))

    def run(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            self.now, _, process = heapq.heappop(self._next)
            if (time := next(process, None)) is not None:
                heapq.heappush(self._next, (time, next(self._number), process))


class Line:
    """Serves what it is asked for in order, one thing at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.free_at = 0.0
        self.asked = 0.0  # seconds

    def serve(self, seconds: float) -> float:
        """When work of so many seconds, asked for now, is done."""
        self.free_at = max(self.free_at, self._clock.now) + seconds
        self.asked += seconds
        return self.free_at

    def share(self, seconds: float) -> float:
        """The same for a thread, which takes turns with what waits here."""
        turns = 2 if self.free_at > self._clock.now else 1
        self.serve(seconds)
        return self._clock.now + turns * seconds

    def drop(self) -> None:
        """Serve nothing of what is not done."""
        self.free_at = self._clock.now


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    parts: NDArray[np.int64]  # of each sample
    slowness: float


class Worker:
    """A place for a process; `lives` counts those that were lost."""

    def __init__(self, clock: Clock) -> None:
        self.device = Line(clock)
        self.lives = 0
        self.batches: dict[Batch, None] = {}  # a set in order
        self.begun = False


class Daemon:
    """Claims and reads files, keeps its workers busy, and publishes what comes back."""

    def __init__(self, run: Simulation, workers: int) -> None:
        self.run, self.setup, self.clock = run, run.setup, run.clock
        self.cpu, self.sent, self.received = (Line(run.clock) for _ in range(3))
        self.claiming = self.writing = self.publishing = 0.0  # seconds that one thread needs for it
        self.held = self.most_held = 0  # samples that came back and are not written
        self._slots = workers * self.setup.slots
        self._running = 0  # batches shipped whose parts no queue took yet
        self._blocked: deque[NDArray[np.int64]] = deque()  # whole parts for which the queue has no room
        self._looking = workers * self.setup.worker_us / 1e6
        self._window = 2 * self._slots * self.setup.batch_samples
        self._free: list[tuple[int, int, Worker, int]] = []  # a heap of slots, least loaded worker first
        self._slot = itertools.count()
        self._unplanned: list[NDArray[np.int64]] = []  # parts of samples that were read
        self._planned: deque[Batch] = deque()
        self._waiting = 0  # samples, read and not shipped
        self._reading = self._has_read_all = self._is_writing = self._is_publishing = False
        self._unpublished = 0  # samples of whole parts
        self._unwritten: deque[NDArray[np.int64]] = deque()  # whole parts
        self._whole: list[int] = []  # parts, written

    def fill(self) -> None:
        """Ship batches as long as there are some and free slots, and read on where few are left."""
        while self._free and self._running < self._slots and self._has_batch():
            *_, worker, life = heapq.heappop(self._free)
            if worker.lives == life:
                batch = self._planned.popleft()
                worker.batches[batch] = None
                self._waiting -= len(batch.parts)
                self._running += 1
                self.run.last_shipped = self.clock.now
                self.clock.start(self._compute(worker, life, batch))
        if self._waiting < self._window and not (self._reading or self._has_read_all):
            self._reading = True
            self.clock.start(self._read())

    def _has_batch(self) -> bool:
        """Whether there is one; cuts what was read into batches of about one size, samples in no order."""
        size = self.setup.batch_samples
        if not self._planned and (self._waiting >= size or (self._waiting and self._has_read_all)):
            samples = self.run.chance.permutation(np.concatenate(self._unplanned))
            self._unplanned = []
            for some in np.array_split(samples, -(-len(samples) // size)):
                self._planned.append(Batch(some, self.run.slowness()))
        return bool(self._planned)

    def _free_slot(self, worker: Worker) -> None:
        heapq.heappush(self._free, (len(worker.batches), next(self._slot), worker, worker.lives))
        self.fill()

    def _read(self) -> Process:
        """The next parts, about a batch."""
        run, setup = self.run, self.setup
        parts = run.parts[run.n_claimed :][
            : min(GROUP_FILES, max(1, setup.batch_samples // run.part_samples))
        ]
        run.n_claimed += len(parts)
        claiming = len(parts) / run.parts_of_file * setup.op_ms / 1000
        self.claiming += claiming
        yield run.operations.serve(len(parts) / run.parts_of_file / setup.store_ops) + claiming
        run.claimed[parts] = self.clock.now
        samples = np.repeat(parts, run.part_samples)
        yield self.cpu.share(READ_SHARE * len(samples) * setup.sample_ms / 1000 / setup.cores)
        self._unplanned.append(samples)
        self._waiting += len(samples)
        self._reading, self._has_read_all = False, run.n_claimed == len(run.parts)
        self.fill()

    def _compute(self, worker: Worker, life: int, batch: Batch) -> Process:
        """A batch on its way to a worker and back, and the parts that it completes to the store."""
        setup, run, n = self.setup, self.run, len(batch.parts)
        latency = setup.latency_ms / 1000
        yield self.cpu.serve((setup.batch_ms / 1000 + self._looking) / setup.cores)
        yield self.sent.serve(n * setup.out_kb / 1e6 / setup.link_gbps) + latency
        if worker.lives == life:
            seconds = batch.slowness * (setup.worker_batch_ms + n * setup.worker_sample_ms) / 1000
            if run.is_steady and not worker.begun:  # so that workers do not run in step
                seconds *= run.chance.random()
            worker.begun = True
            yield worker.device.serve(seconds)
        if worker.lives == life:
            yield self.received.serve(n * setup.back_kb / 1e6 / setup.link_gbps) + latency
        if worker.lives != life:
            return
        del worker.batches[batch]
        self._free_slot(worker)
        yield self.cpu.serve((1 - READ_SHARE) * n * setup.sample_ms / 1000 / setup.cores)
        self.held += n
        self.most_held = max(self.most_held, self.held)
        parts = run.arrive(batch)
        if len(parts):
            self._blocked.append(parts)
        else:
            self._running -= 1
        self._unblock()

    def _unblock(self) -> None:
        """Hand whole parts to the writer while there is room for them."""
        while self._blocked and self._unpublished * self.setup.back_kb <= 1000 * self.setup.queue_mb:
            parts = self._blocked.popleft()
            self._running -= 1
            self._unpublished += len(parts) * self.run.part_samples
            self._unwritten.append(parts)
            if not self._is_writing:
                self._is_writing = True
                self.clock.start(self._write())
        self.fill()

    def _write(self) -> Process:
        """All parts that are handed over, on a thread."""
        run, setup = self.run, self.setup
        while self._unwritten:
            parts = self._unwritten.popleft()
            n, files = len(parts), len(parts) / run.parts_of_file
            mb = n * run.part_samples * setup.parquet_kb / 1000
            operations = files * FILE_OPERATIONS + (n * PART_OPERATIONS if run.parts_of_file > 1 else 0)
            seconds = (mb * setup.mb_ms + files * setup.file_ms) / 1000 / setup.cores
            storing, naming = mb / 1000 / setup.store_gbps, operations / setup.store_ops
            self.writing += seconds + storing + naming
            slices = math.ceil(seconds / SLICE_SECONDS)
            for _ in range(slices):
                yield self.cpu.share(seconds / slices)
            yield run.bandwidth.serve(storing)
            yield run.operations.serve(naming)
            self.held -= n * run.part_samples
            self._whole.extend(parts.tolist())
            if not self._is_publishing:
                self._is_publishing = True
                self.clock.start(self._publish())
        self._is_writing = False

    def _publish(self) -> Process:
        """All written parts in groups of files, until none is left."""
        run, op, sync = self.run, self.setup.op_ms / 1000, self.setup.sync_ms / 1000
        while self._whole:
            most = round(GROUP_FILES * run.parts_of_file)
            parts, self._whole = self._whole[:most], self._whole[most:]
            n = len(parts) / run.parts_of_file
            locked, syncs = n * LOCKED_OPERATIONS * op, n / SYNC_THREADS * FILE_SYNCS * sync
            self.publishing += syncs + locked + n * op + n / GROUP_FILES * GROUP_SYNCS * sync
            yield self.clock.now + max(syncs, FILE_SYNCS * sync)
            yield run.lock.serve(locked)
            yield self.clock.now + n * op + GROUP_SYNCS * sync
            run.published[parts] = self.clock.now
            run.n_published += len(parts)
            self._unpublished -= len(parts) * run.part_samples
            self._unblock()
        self._is_publishing = False

    def live(self, worker: Worker) -> Process:
        """A worker that loads its model, works until it is lost, and loads again."""
        setup, run = self.setup, self.run
        while True:
            if worker.lives or not run.is_steady:
                yield run.loading.serve(run.read_seconds) + setup.load_seconds
            for _ in range(setup.slots):
                self._free_slot(worker)
            yield self.clock.now + run.chance.exponential(3600 * setup.mtbf_hours)
            worker.lives += 1
            worker.device.drop()
            self._planned.extendleft(worker.batches)
            self._running -= len(worker.batches)
            self._waiting += sum(len(batch.parts) for batch in worker.batches)
            worker.batches.clear()
            self.fill()


class Simulation:
    """One job, from the first claim to the last file. Run it once."""

    def __init__(self, setup: Setup, workers: int, daemons: int, samples: int | None, seed: int) -> None:
        """Without `samples` all workers are loaded at the start, and the steady rate is of interest."""
        self.setup, self.clock, self.is_steady = setup, Clock(), samples is None
        self.chance = np.random.Generator(np.random.PCG64(seed))
        samples = samples or setup.batch_samples * min(MAX_BATCHES, max(2000, 16 * workers))
        self.part_samples = min(setup.file_samples, PART_SAMPLES, samples)
        self.parts_of_file = min(setup.file_samples, samples) / self.part_samples
        self.parts = np.arange(-(-samples // self.part_samples))
        self.samples = len(self.parts) * self.part_samples
        self.operations, self.bandwidth, self.lock = (Line(self.clock) for _ in range(3))
        self.loading = Line(self.clock) if setup.load_gbps else self.bandwidth
        self.read_seconds = setup.model_gb / setup.per_node / (setup.load_gbps or setup.store_gbps)
        self.claimed, self.published = (np.zeros(len(self.parts)) for _ in range(2))  # seconds, by part
        self.n_published = self.n_claimed = self._received = 0
        self.last_shipped = 0.0
        self._missing = np.full(len(self.parts), self.part_samples)  # samples, by part
        self._marks: list[tuple[float, int]] = []
        self._daemons = [Daemon(self, len(range(n, workers, daemons))) for n in range(daemons)]
        self._workers = [Worker(self.clock) for _ in range(workers)]
        for number, worker in enumerate(self._workers):
            self.clock.start(self._daemons[number % daemons].live(worker))

    def slowness(self) -> float:
        """How much longer than the mean a batch takes: 1 on average."""
        spread, tail = self.setup.spread, self.setup.tail
        body = math.exp(self.chance.normal(-(spread**2) / 2, spread))
        drawn = min(TAIL_TO, TAIL_FROM * math.exp(self.chance.exponential() / TAIL_POWER))
        return body * (drawn if self.chance.random() < tail else 1.0) / (1 + tail * (TAIL_MEAN - 1))

    def arrive(self, batch: Batch) -> NDArray[np.int64]:
        """Count in a batch; the parts that are whole now."""
        self._received += len(batch.parts)
        if self._received >= (0.25, 0.75, math.inf)[len(self._marks)] * self.samples:
            self._marks.append((self.clock.now, self._received))
        parts, counts = np.unique(batch.parts, return_counts=True)
        self._missing[parts] -= counts
        whole: NDArray[np.int64] = parts[self._missing[parts] == 0]
        return whole

    def _asked(self) -> dict[str, float]:
        """Seconds of the whole job, of a daemon or worker on average."""
        daemons, workers = self._daemons, self._workers
        return {
            "workers": sum(worker.device.asked for worker in workers) / len(workers),
            "daemon's core": sum(daemon.cpu.asked for daemon in daemons) / len(daemons),
            "daemon's link": sum(daemon.received.asked for daemon in daemons) / len(daemons),
            "claiming": sum(daemon.claiming for daemon in daemons) / len(daemons),
            "writing": sum(daemon.writing for daemon in daemons) / len(daemons),
            "publishing": sum(daemon.publishing for daemon in daemons) / len(daemons),
            "store operations": self.operations.asked,
            "store bandwidth": self.bandwidth.asked,
            "publishing lock": self.lock.asked,
        }

    def run(self) -> Prediction:
        self.clock.run(lambda: self.n_published == len(self.parts))
        asked, workers = self._asked(), len(self._workers)
        seconds = max(self.clock.now, *(daemon.cpu.free_at for daemon in self._daemons))
        binds = max(asked, key=asked.__getitem__)
        loading = self.setup.load_seconds + workers * self.read_seconds
        tail = seconds - self.last_shipped
        rate = self.samples / seconds
        if self.is_steady:  # what is asked faster than it is done would be late more and more
            (since, before), (until, after) = self._marks
            rate = min((after - before) / (until - since), self.samples / asked[binds])
        elif loading + tail > seconds / 2:
            binds = "loading" if loading > tail else "tail"
        busy = {name: round(rate * its / self.samples, 3) for name, its in asked.items()}
        if busy.get(binds, 1.0) < SATURATED:
            binds = f"none alone, {binds} most"
        return Prediction(
            workers=workers,
            daemons=len(self._daemons),
            samples_per_second=rate,
            efficiency=rate / (workers * self.setup.worker_rate),
            binds=binds,
            busy=busy,
            load_seconds=loading,
            tail_seconds=tail,
            file_seconds=float(np.median(self.published - self.claimed)),
            held_gb=max(daemon.most_held for daemon in self._daemons) * self.setup.back_kb / 1e6,
        )

"""A cluster of workers in this process: what a test says happens to them, happens."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ray.exceptions import RayError, RayTaskError

from daemon.errors import MachineError
from daemon.executor.ray_cluster import Needs
from daemon.executor.worker import Build, Computed, Place, Ready
from daemon.records import SampleBatch
from tests.support.fakes import INFO, FakeTokenizer, result_of_samples

READY = Ready(INFO, shares_prefixes=False, slots=2, tokenizer=FakeTokenizer(), max_batch_tokens=4)


class Reference:
    """The answer of a call, to come."""

    def __init__(self) -> None:
        self.result: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.result


class FakeActor:
    """A worker's process: it answers `place`, `load` and `restudy`; batches wait for the test."""

    def __init__(self, cluster: FakeCluster, number: int) -> None:
        self.number = number  # of all that were ever started
        self.alive = True
        self.batches: list[tuple[SampleBatch, Reference]] = []
        self.calls: list[str] = []
        self.watched: list[Reference] = []  # calls that end with the process
        self._cluster = cluster

    def __getattr__(self, method: str) -> Any:
        class Method:
            @staticmethod
            def remote(*args: Any) -> Reference:
                return self._call(method, *args)

        return Method

    def _call(self, method: str, *args: Any) -> Reference:
        reference = Reference()
        self.calls.append(method)
        if not self.alive:
            reference.result.set_exception(RayError("it is dead"))
        elif method == "live":
            self.watched.append(reference)
        elif method == "run":
            self.batches.append((args[0], reference))
            if self._cluster.answers(args[0]):
                self.finish()
            elif self._cluster.kills(args[0]):
                self.die()
        elif method in self._cluster.errors:
            error = self._cluster.errors[method]
            reference.result.set_exception(RayTaskError(method, "a trace", error))
        else:
            answers = {"place": Place(f"node{self.number}", self._cluster.build), "load": self._cluster.ready}
            reference.result.set_result(answers.get(method))
        return reference

    def finish(self, error: Exception | None = None) -> None:
        """End the batch that it has had longest."""
        batch, reference = self.batches.pop(0)
        if error is not None:
            reference.result.set_exception(RayTaskError("run", "a trace", error))
        else:
            reference.result.set_result(Computed(result_of_samples(batch.samples), 1.0, 1000))

    def die(self) -> None:
        self.alive = False
        for reference in [*self.watched, *(reference for _, reference in self.batches)]:
            if not reference.result.done():
                reference.result.set_exception(RayError(f"worker {self.number} died"))
        self.batches = []


class FakeCluster:
    """Gives workers at once. `unreachable` tries to connect fail first."""

    def __init__(self, workers: int = 1, *, unreachable: int = 0) -> None:
        self.workers = workers
        self.actors: list[FakeActor] = []
        self.ready = READY
        self.build = Build.here()
        self.errors: dict[str, Exception] = {}  # that methods raise in the worker
        self.answers: Callable[[SampleBatch], bool] = lambda batch: False  # whether a batch ends at once
        self.kills: Callable[[SampleBatch], bool] = lambda batch: False  # whether a worker dies of it at once
        self.connections = 0
        self.is_alive = False
        self.rooms = 100
        self._refusals = itertools.repeat("no answer", unreachable)

    def __str__(self) -> str:
        return "the fake cluster"

    def connect(self) -> None:
        if (refusal := next(self._refusals, None)) is not None:
            raise MachineError(f"{self}: {refusal}")
        self.connections += 1
        self.is_alive = True

    def disconnect(self) -> None:
        self.is_alive = False

    def die(self) -> None:
        self.is_alive = False
        for actor in self.actors:
            actor.alive = False  # and no call is answered any more

    needs = Needs(1, 0.0)

    def wanted(self) -> int:
        return self.workers

    def room(self) -> int:
        return self.rooms

    def worker(self) -> FakeActor:
        self.actors.append(FakeActor(self, len(self.actors)))
        return self.actors[-1]

    def kill(self, actor: FakeActor | None) -> None:
        if actor is not None:
            actor.die()

    @property
    def living(self) -> list[FakeActor]:
        return [actor for actor in self.actors if actor.alive]

"""One worker, as the executor sees it: a place in a cluster, and the process that is in it at the moment.

Knows no other worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import time
from typing import Any

import ray

from daemon.errors import MachineError
from daemon.executor.ray_cluster import one_line
from daemon.executor.worker import Build, Computed, Place, Ready
from daemon.records import SampleBatch, WorkerLoad

COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal, in Ray's messages
NOT_THE_BATCH = (
    ray.exceptions.ActorUnavailableError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfDiskError,
    ray.exceptions.RaySystemError,
)


class Gone(Exception):
    """A worker was lost with the batches that it had. `alone`: it had this one and nothing else."""

    def __init__(self, message: str, *, alone: bool) -> None:
        super().__init__(message)
        self.alone = alone


class RemoteWorker:
    """One worker: a place in the cluster, and the process that is in it at the moment."""

    def __init__(self, number: int) -> None:
        self.load = WorkerLoad(number, "starting", "")
        self.ready: Ready | None = None  # while it takes batches
        self.reserved = False  # for a suspect batch
        self.retiring = False  # wanted no more: it ends its batches
        self.in_flight = 0
        self.mixed = False  # it had another batch beside one that it still has
        self.gone = asyncio.Event()  # set while there is no process
        self.why_gone = ""
        self.charged = True  # its end may be its batch's fault
        self.busy_before = 0.0  # its device's seconds, as of the last batch
        self.last_progress = 0.0  # monotonic seconds: when it ended a batch, or was given one while idle
        self.actor: Any = None  # Ray's handle of the process

    @property
    def slots(self) -> int:
        """How many batches it takes at a time, others than a suspect one."""
        return self.ready.slots if self.ready is not None and not (self.reserved or self.retiring) else 0

    def idle_or_gone(self) -> bool | None:
        """True once it has no batch, or no process; None before."""
        return not self.in_flight or self.ready is None or None

    def note(self, **changes: Any) -> None:
        self.load = dataclasses.replace(self.load, **changes)

    def begin(self, actor: Any) -> None:
        """Another process is in its place from now on."""
        self.actor = actor
        self.gone = asyncio.Event()
        self.reserved = False
        self.note(state="starting", node="")

    def start(self, ready: Ready) -> None:
        """Its model is loaded: it takes batches."""
        self.ready, self.busy_before = ready, ready.busy_seconds
        self.note(state="ready")

    def retire(self, retiring: bool) -> None:
        """Take no more batches; or take them again, where it is wanted again."""
        self.retiring = retiring
        self.note(state="draining" if retiring else "ready" if self.ready is not None else "starting")

    def lose(self, why: str, *, charged: bool = True) -> None:
        """Take the process for gone, and with it all that it was asked.

        Unless `charged`, nothing that it was asked can be the cause.
        """
        self.ready = None
        if not self.gone.is_set():
            self.note(state="starting")
            self.why_gone, self.charged = why, charged
            self.gone.set()

    async def call(self, method: str, *args: object) -> Any:
        """Call a method of the process. Raises what it raises, and Gone where the process is lost."""
        actor, gone = self.actor, self.gone
        lost = asyncio.ensure_future(gone.wait())
        answer: asyncio.Future[Any] | None = None
        try:
            if gone.is_set():
                raise Gone(self.why_gone, alone=False)
            answer = asyncio.wrap_future(getattr(actor, method).remote(*args).future())
            await asyncio.wait({answer, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise Gone(self.why_gone, alone=self.charged and not self.mixed)
            return answer.result()
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            charged = may_be_the_batch(error)
            if actor is self.actor:
                self.lose(reason(error), charged=charged)
            raise Gone(reason(error), alone=charged and not self.mixed) from None
        finally:
            lost.cancel()
            if answer is not None:
                answer.cancel()

    async def end(self) -> str:
        """Wait until the process is gone, also an idle one; returns why."""
        with contextlib.suppress(Gone):
            await self.call("live")
        return self.why_gone

    async def place(self) -> str:
        """Wait for a place; its node. Raises Gone, and MachineError where it is not this lensd."""
        place: Place = await self.call("place")
        self.note(node=place.node)
        if place.build != Build.here():
            raise MachineError(
                f"{place.node} runs {place.build}, this daemon {Build.here()}: install the same"
            )
        return place.node

    async def run(self, batch: SampleBatch) -> Computed:
        """Compute a batch. Raises OutOfMemory, and Gone, also where the device is unfit for another batch."""
        if not self.in_flight:
            self.last_progress = time.monotonic()
        self.mixed = self.in_flight > 0
        self.in_flight += 1
        try:
            computed: Computed = await self.call("run", batch)
        except RuntimeError as error:  # of torch: after one on a GPU nothing else runs in that process
            self.lose(one_line(error))
            raise Gone(one_line(error), alone=not self.mixed) from None
        finally:
            self.in_flight -= 1
        self.last_progress = time.monotonic()
        return computed

    def count(self, computed: Computed, samples: int) -> float:
        """Count a batch that it ended; the seconds that its device worked since the one before."""
        busy = max(0.0, computed.busy_seconds - self.busy_before)
        self.busy_before = computed.busy_seconds
        self.note(
            batches=self.load.batches + 1,
            samples=self.load.samples + samples,
            busy_seconds=self.load.busy_seconds + busy,
            memory_bytes=computed.memory_bytes,
        )
        return busy


def may_be_the_batch(error: ray.exceptions.RayError) -> bool:
    """Whether the loss of a process may be its batch's fault: not where its node or network went."""
    if isinstance(error, NOT_THE_BATCH) or getattr(error, "preempted", False):
        return False
    return "node" not in reason(error).partition("Some common causes")[0].lower()


def reason(error: ray.exceptions.RayError) -> str:
    """Why a worker is lost, in one line."""
    text = COLOURS.sub("", str(error))
    if "ModuleNotFoundError" in text:
        missing = next(line for line in text.splitlines() if "ModuleNotFoundError" in line).strip()
        return f"{missing}: is this lensd installed there?"
    for line in text.splitlines():
        said = line.strip()
        if said.startswith(("The actor is dead because", "Worker exit detail", "The actor died because of")):
            return said
    return one_line(text)

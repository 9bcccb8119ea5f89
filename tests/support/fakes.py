"""A source, an executor, a sink and an observer in memory, for tests of the main loop.

All of them write into one list of events, so that a test can say what came before what.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from daemon.errors import FileError
from daemon.model_info import ModelInfo, SaeInfo
from daemon.recipes import PLAIN_RECIPE
from daemon.records import (
    Arrival,
    Batch,
    BatchResult,
    Claim,
    FeatureRows,
    FileFailed,
    FileIdentity,
    FinishedFile,
    FinishedPart,
    InputFile,
    KeptPart,
    LayerSums,
    Outcome,
    Part,
    PartExtent,
    Presence,
    Sample,
    Stored,
    TokenizedPart,
    TokenizedSample,
    WorkerLoad,
)

Event = tuple[str, ...]
D_OUT = 2
INFO = ModelInfo(
    name="fake",
    architecture="Fake",
    d_model=D_OUT,
    n_layers=1,
    dtype="float32",
    device="cpu",
    engine="packed",
    weights_sha256=None,
    saes=(SaeInfo("hook", "hook", 0, D_OUT, 4, D_OUT, "topk", "fake", ""),),
)


@dataclass
class FakeFile:
    """A file of texts, `per_part` to a part; `breaks_after` parts it turns out to be unusable."""

    name: str
    texts: Sequence[str]
    content: str = ""  # the same for files of the same unit; its name where empty
    attempt: int = 1
    per_part: int = 2
    breaks_after: int | None = None
    unreadable: bool = False
    presence: Presence = "same"

    @property
    def claim(self) -> Claim:
        return Claim(self.name, self.name, self.attempt, FileIdentity(0, 0, 0, 0, 0))

    @property
    def file(self) -> InputFile | None:
        if self.unreadable:
            return None
        return InputFile(
            self.claim, sha256=self.content, size=len(self.texts), unit=self.content or self.name
        )

    @property
    def error(self) -> FileError | None:
        return FileError("unreadable", "no") if self.unreadable else None

    async def parts(self, stored: Mapping[int, PartExtent]) -> AsyncIterator[Part | KeptPart]:
        file = self.file
        assert file is not None
        starts = range(0, len(self.texts), self.per_part)
        for number, start in enumerate(starts):
            if number == self.breaks_after:
                raise FileError("structure", "broken")
            texts = self.texts[start : start + self.per_part]
            extent = PartExtent(number, start, len(texts), start)
            last = start == starts[-1]
            if stored.get(number) == extent:
                yield KeptPart(file, extent, last, PLAIN_RECIPE)
                continue
            samples = tuple(
                Sample(start + i, f"{self.name}{start + i}", None, None, None, (text,), None, 0)
                for i, text in enumerate(texts)
            )
            yield Part(file, extent, last, PLAIN_RECIPE, samples, ())
            await asyncio.sleep(0)
        if self.breaks_after == len(starts):
            raise FileError("structure", "broken at its end")

    def close(self) -> None:
        pass


class FakeSource:
    """Hands out groups of files in turn; a file that is given back comes again, as it is by then."""

    def __init__(self, *groups: Sequence[FakeFile], events: list[Event]) -> None:
        self.waiting = [list(group) for group in groups]
        self.files = {file.name: file for group in groups for file in group}
        self.events = events
        self.left = 0

    @property
    def backlog(self) -> bool:
        return bool(self.waiting)

    async def claims(self, stop: asyncio.Event, once: bool) -> AsyncIterator[list[Claim]]:
        while not stop.is_set():
            if self.waiting:
                yield [file.claim for file in self.waiting.pop(0)]
            elif once:
                return
            else:
                await stop.wait()

    async def open(self, claims: Sequence[Claim]) -> Sequence[FakeFile]:
        return [self.files[claim.name] for claim in claims]

    async def recheck(self, claims: Sequence[Claim]) -> list[Presence]:
        self.events.append(("recheck", *(claim.name for claim in claims)))
        return [self.files[claim.name].presence for claim in claims]

    async def done(self, claims: Sequence[Claim]) -> None:
        self.events.append(("done", *(claim.name for claim in claims)))

    async def failed(self, claim: Claim, error: FileError, sha256: str | None) -> None:
        self.events.append(("failed", claim.name, error.reason))

    async def give_back(self, claims: Sequence[Claim]) -> None:
        for claim in claims:
            self.events.append(("given back", claim.name))
            self.files[claim.name].presence = "same"
            self.waiting.append([self.files[claim.name]])

    async def give_back_all(self, *, flush: bool) -> None:
        self.events.append(("given back all", "flushed" if flush else "not flushed"))


class FakeTokenizer:
    """One token for each character."""

    def tokenize(self, parts: Sequence[Part]) -> list[TokenizedPart]:
        return [
            TokenizedPart(
                part, tuple(TokenizedSample(one, (tuple(map(ord, one.texts[0])),)) for one in part.samples)
            )
            for part in parts
        ]


def result_of(batch: Batch) -> BatchResult:
    return result_of_samples(batch.samples)


def result_of_samples(samples: Sequence[TokenizedSample]) -> BatchResult:
    """One number for each sample, its record's index, and no features."""
    n = len(samples)
    none = np.zeros(0, dtype=np.int64)
    ones = np.ones(n)
    return BatchResult(
        columns={"record": np.array([sample.sample.record_index for sample in samples])},
        features=FeatureRows(
            none, none, none, none, none, np.zeros(1, dtype=np.int64), none.astype(np.uint32), ones[:0]
        ),
        layers=(LayerSums(np.ones(n, dtype=np.int64), ones, ones, ones, np.ones((n, D_OUT))),),
        forward_seconds=0.0,
        sae_seconds=0.0,
        analysis_seconds=0.0,
    )


class FakeExecutor:
    """Takes `slots` batches at a time. `errors` are raised in turn, before anything is computed.

    With `hold`, batches end when they are `release`d; else each takes a turn of the event loop.
    """

    def __init__(self, slots: int = 1, *, errors: Sequence[Exception] = (), hold: bool = False) -> None:
        self.info = INFO
        self.slots = slots
        self.shares_prefixes = False
        self.batches: list[Batch] = []  # in the order in which they began
        self.most_at_a_time = 0
        self._errors: Iterator[Exception] = iter(errors)
        self._hold = hold
        self._running: dict[int, asyncio.Future[None]] = {}
        self._grown = asyncio.Event()

    def grow(self, slots: int) -> None:
        self.slots = slots
        self._grown.set()

    async def more_slots(self, than: int) -> None:
        while self.slots <= than:
            await self._grown.wait()
            self._grown.clear()

    @property
    def workers_wanted(self) -> int:
        return 0

    def workers(self) -> tuple[WorkerLoad, ...]:
        return ()

    @property
    def running(self) -> int:
        return len(self._running)

    async def run(self, batch: Batch) -> BatchResult:
        number = len(self.batches)
        self.batches.append(batch)
        released = self._running[number] = asyncio.get_running_loop().create_future()
        self.most_at_a_time = max(self.most_at_a_time, self.running)
        try:
            if self._hold:
                await released
            else:
                await asyncio.sleep(0)
            if (error := next(self._errors, None)) is not None:
                raise error
            return result_of(batch)
        finally:
            del self._running[number]

    def release(self, number: int) -> None:
        self._running[number].set_result(None)


@dataclass
class Written:
    file: InputFile
    records: dict[int, int] = field(default_factory=dict)  # record index to how often it came
    rejects: list[int] = field(default_factory=list)
    arrived: int = 0
    parts: int | None = None
    failed: FileFailed | None = None


class FakeSink:
    """Keeps what it is given; `published` and `extents` are there from before."""

    def __init__(
        self,
        *,
        events: list[Event],
        published: Sequence[str] = (),
        extents: Mapping[str, Mapping[int, PartExtent]] | None = None,
    ) -> None:
        self.events = events
        self.published = set(published)
        self.extents = extents or {}
        self.results: dict[str, Written] = {}  # of what was published here
        self._units: dict[str, Written] = {}

    async def stored(self, unit: str) -> Stored:
        return Stored(Path(unit) if unit in self.published else None, self.extents.get(unit, {}))

    async def write(self, arrivals: Sequence[Arrival]) -> list[FinishedFile]:
        touched = {}
        for arrival in arrivals:
            part = arrival.part.part if isinstance(arrival, FinishedPart) else arrival
            unit = touched.setdefault(
                part.file.unit, self._units.setdefault(part.file.unit, Written(part.file))
            )
            if isinstance(arrival, FileFailed):
                unit.failed = arrival
                continue
            unit.arrived += 1
            if part.last:
                unit.parts = part.number + 1 if isinstance(part, Part) else part.extent.number + 1
            if isinstance(arrival, FinishedPart):
                arrival.check_covered()
                for piece in arrival.pieces:
                    for record in piece.result.columns["record"][piece.result_rows].tolist():
                        unit.records[record] = unit.records.get(record, 0) + 1
                unit.rejects += [reject.record_index for reject in arrival.rejects]
        ended = []
        for unit in touched.values():
            if unit.failed is not None and unit.arrived == unit.failed.parts:
                ended.append(FinishedFile(unit.file, unit.failed.error, 1))
            elif unit.failed is None and unit.arrived == unit.parts:
                ended.append(FinishedFile(unit.file, None, 1))
        return ended

    async def flush(self, files: Sequence[FinishedFile]) -> None:
        self.events.append(("flush", *(file.file.claim.name for file in files)))

    async def publish(self, files: Sequence[FinishedFile]) -> list[Outcome]:
        self.events.append(("publish", *(file.file.claim.name for file in files)))
        outcomes = []
        for file in files:
            unit = self.results[file.file.unit] = self._units[file.file.unit]
            self.published.add(file.file.unit)
            outcomes.append(
                Outcome(
                    "committed",
                    file.file.claim.name,
                    file.file.unit,
                    Path(file.file.unit),
                    rows=len(unit.records),
                    rejects=len(unit.rejects),
                )
            )
        return outcomes

    async def confirm(self) -> None:
        self.events.append(("confirm",))

    async def forget(self, units: Sequence[str]) -> None:
        self.events.append(("forget", *units))
        for unit in units:
            self._units.pop(unit, None)

    def close(self) -> None:
        if ("closed",) not in self.events:
            self.events.append(("closed",))


@dataclass
class FakeObserver:
    """Counts what it hears."""

    outcomes: list[Outcome] = field(default_factory=list)
    batches: int = 0
    parts: int = 0
    deaths: list[int] = field(default_factory=list)  # samples of batches of which workers died
    limits: list[int | None] = field(default_factory=list)  # told with batches that were too large

    def taken_up(self, file: InputFile) -> None:
        pass

    def read(self, part: Part | KeptPart) -> None:
        self.parts += 1

    def tokenized(self, parts: Sequence[TokenizedPart]) -> None:
        pass

    def computed(self, batch: Batch, result: BatchResult, plan_seconds: float) -> None:
        self.batches += 1

    def out_of_memory(self, batch: Batch, message: str, max_batch_tokens: int | None) -> None:
        self.limits.append(max_batch_tokens)

    def workers_died(self, batch: Batch, message: str) -> None:
        self.deaths.append(len(batch.entries))

    def settled(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes += outcomes

"""The ports of the main loop: source, tokenizer, executor, sink and observer.

`daemon.pipeline` knows these and the messages of `daemon.records`; an implementation knows the messages and
no other implementation. Methods run on the event loop and must not block it, but for `Tokenizer.tokenize`,
which is called on a thread, and `Sink.close`, which waits for writes under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from daemon.errors import FileError
from daemon.model_info import ModelInfo
from daemon.records import (
    Arrival,
    Batch,
    BatchResult,
    Claim,
    FinishedFile,
    InputFile,
    KeptPart,
    Outcome,
    Part,
    PartExtent,
    Presence,
    Stored,
    TokenizedPart,
    WorkerLoad,
)


class OpenFile(Protocol):
    """A claimed file that was opened and hashed. Close it."""

    @property
    def claim(self) -> Claim: ...

    @property
    def file(self) -> InputFile | None:
        """None where the file can't be used."""

    @property
    def error(self) -> FileError | None:
        """Why the file can't be used."""

    def parts(self, stored: Mapping[int, PartExtent]) -> AsyncIterator[Part | KeptPart]:
        """Read the file as parts; a part of which the extent is in `stored` is only counted.

        Raises FileError where the file as a whole can't be used, possibly after some parts.
        """

    def close(self) -> None: ...


class Source(Protocol):
    """Where files come from. It hears how each one ended, and keeps a file until then."""

    @property
    def backlog(self) -> bool:
        """Whether files are known that can be claimed at once."""

    @property
    def left(self) -> int:
        """How many inputs lay there, unclaimed, when `claims` came to its end."""

    def claims(self, stop: asyncio.Event, once: bool) -> AsyncIterator[list[Claim]]:
        """Claim files as they are asked for, until `stop`, or with `once` until none is left.

        A file on which work was begun before comes alone.
        """

    async def open(self, claims: Sequence[Claim]) -> Sequence[OpenFile]:
        """Open claimed files."""

    async def recheck(self, claims: Sequence[Claim]) -> list[Presence]:
        """Tell whether each file is still as it was when it was claimed."""

    async def done(self, claims: Sequence[Claim]) -> None:
        """Results of these files are published. Safe to repeat."""

    async def failed(self, claim: Claim, error: FileError, sha256: str | None) -> None:
        """Set a file aside that can't be used, with the reason. Safe to repeat."""

    async def give_back(self, claims: Sequence[Claim]) -> None:
        """Put files back, as if they had not been claimed."""

    async def give_back_all(self, *, flush: bool) -> None:
        """Put back every claimed file that has no outcome; without `flush`, sync nothing."""


class Tokenizer(Protocol):
    """Turns texts into token ids."""

    def tokenize(self, parts: Sequence[Part]) -> list[TokenizedPart]:
        """Tokenize the samples of parts; those without tokens of use become rejects. Blocks."""


class Executor(Protocol):
    """Runs batches through the model, the SAEs and the analysis."""

    @property
    def info(self) -> ModelInfo:
        """Describes what it runs: columns, manifests and the identity of units follow from it."""

    @property
    def slots(self) -> int:
        """How many batches it takes at a time; it may change."""

    async def more_slots(self, than: int) -> None:
        """Wait until it takes more than so many batches at a time."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether tokens with which texts of a batch begin alike are computed once."""

    async def run(self, batch: Batch) -> BatchResult:
        """Compute a batch.

        Raises OutOfMemory where the device can't hold it; with `shared`, where it could not hold it beside
        another batch: the same batch is then run again. Raises WorkersDied where workers died of it.
        """

    @property
    def workers_wanted(self) -> int:
        """How many processes are to compute beside this one; 0 where it computes itself."""

    def workers(self) -> Sequence[WorkerLoad]:
        """Describe the processes that compute beside this one; none where it computes itself."""


class Sink(Protocol):
    """Where results go. A file's results appear whole or not at all."""

    async def stored(self, unit: str) -> Stored:
        """Tell what there is of a unit already: its published folder, or parts of an earlier attempt."""

    async def write(self, arrivals: Sequence[Arrival]) -> list[FinishedFile]:
        """Store finished parts; return the files of which everything has arrived, complete or failed."""

    async def flush(self, files: Sequence[FinishedFile]) -> None:
        """Bring the results of complete files to disk, so that only their names are missing."""

    async def publish(self, files: Sequence[FinishedFile]) -> list[Outcome]:
        """Make flushed results visible: `committed`, or `duplicate` where the unit was published before."""

    async def confirm(self) -> None:
        """Bring to disk what is visible already, whoever published it."""

    async def forget(self, units: Sequence[str]) -> None:
        """Remove everything unpublished that is stored of these units."""

    def close(self) -> None:
        """Wait for writes under way. Stored parts stay for another attempt."""


class Observer(Protocol):
    """Hears what happens to files, parts and batches."""

    def taken_up(self, file: InputFile) -> None: ...

    def read(self, part: Part | KeptPart) -> None: ...

    def tokenized(self, parts: Sequence[TokenizedPart]) -> None: ...

    def computed(self, batch: Batch, result: BatchResult, plan_seconds: float) -> None: ...

    def out_of_memory(self, batch: Batch, message: str, max_batch_tokens: int | None) -> None:
        """A batch did not fit; `max_batch_tokens` is the new limit, None where the batch is one sample,
        which becomes a reject."""

    def workers_died(self, batch: Batch, message: str) -> None:
        """Workers died of a batch: it is halved, or becomes a reject where it is one sample."""

    def settled(self, outcomes: Sequence[Outcome]) -> None: ...
